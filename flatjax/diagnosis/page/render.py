"""Make the page of a diagnosis from its record only: one file of HTML that needs no other, and no network."""

import html
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flatjax.diagnosis.page import figures, words
from flatjax.diagnosis.page.style import STYLE
from flatjax.diagnosis.page.words import Word
from flatjax.diagnosis.page.words import with_conventions as with_conventions
from flatjax.run.records import Record
from flatjax.run.tables import aligned

NAME, RECORD = "diagnosis.html", "diagnosis.json"


class Section(NamedTuple):
    """A section of the page has a title, a text, words on its numbers, and a figure."""

    title: str
    says: str
    words: Sequence[Word]
    figure: Callable[[Sequence[Record]], str | None] | None = None


SECTIONS = (
    Section("Loss", "How well it predicts the text.", words.LOSS, figures.of_loss),
    Section(
        "Flatness of the head", "Relative flatness of the last layer, which turns features into logits. Larger is "
        "sharper. Every token is counted and nothing is sampled; the standard error says how much another text like "
        "this one would change it.",
        words.FLATNESS,
    ),
    Section(
        "Flatness of the layers", "Relative flatness of every kernel, to see where the network is flat (low) "
        "and where it is sharp (high).", words.PROFILE, figures.of_profile,
    ),
    Section(
        "Neural collapse over the vocabulary", "A class is a next token, and what belongs to it are the "
        "features before it. In a collapsed network the features of a class are one point, and the points are spread "
        "as evenly as can be, along the rows of the head. Classes of few tokens are left out.",
        words.COLLAPSE, figures.of_collapse,
    ),
    Section(
        "Geometry of the stream", "How many directions the residual stream fills at each layer. With fewer than ten "
        "tokens for each of its dimensions the numbers are those of the sample, and too low.", words.GEOMETRY,
        figures.of_geometry,
    ),
    Section(
        "The way through the blocks", "How a token moves from block to block. Each number is the median over the "
        "tokens of a sequence, then the mean over sequences.", words.TRAJECTORY, figures.of_trajectory,
    ),
    Section(
        "Jacobians of the blocks", "What a small change of the stream at one token becomes in a block, "
        "J_l = ∂x_{l+1}/∂x_l − I, and whether blocks act alike. Taken at the last token of some windows of the text; "
        "the standard error is over these.", words.JACOBIANS, figures.of_jacobians,
    ),
    Section(
        "Logit sharpness", "How much the loss rises when every logit may be off by a share ε, as under a coarse number "
        "format.", words.SHARPNESS, figures.of_sharpness,
    ),
)  # fmt: skip


def write(folder: Path, record: Record) -> None:
    """Write the record and the page, each wholly or not at all."""
    _replace(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if record["checkpoints"]:
        redraw(folder)


def redraw(folder: Path) -> Path:
    """Make the page anew from the record in the folder."""
    if not (folder / RECORD).exists():
        raise SystemExit(f"{folder} has no {RECORD}: nothing was measured there")
    _replace(folder / NAME, render(json.loads((folder / RECORD).read_text())))
    return folder / NAME


def summary(folder: Path) -> str:
    """Return the headlines as a table of text."""
    record = json.loads((folder / RECORD).read_text())
    checkpoints = _labelled(record)
    rows = [["", *(each["label"] for each in checkpoints)]]
    for word in _measured(words.HEADLINES, checkpoints):
        rows.append([word.label, *(_cell(each, word) for each in checkpoints)])
    rows.append(["cost in forward passes", *(f"{each['cost']['forward_passes']:.1f}" for each in checkpoints)])
    return aligned(rows)


def render(record: Record) -> str:
    """Return the page as HTML."""
    checkpoints = _labelled(record)
    title = f"Diagnosis of {checkpoints[0]['title']}"
    sections = [_section(each, checkpoints) for each in SECTIONS if _measured(each.words, checkpoints)]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, _ in sections)
    headlines = _table(_measured(words.HEADLINES, checkpoints), checkpoints)
    body = "\n".join(
        [
            f"<header><h1>{_escape(title)}</h1>{_about(record, checkpoints)}</header>",
            f'<nav><a href="#summary">Summary</a>{links}<a href="#cost">Cost</a>'
            '<a href="#how">How it was measured</a></nav>',
            f'<section id="summary"><h2>Summary</h2>{headlines}</section>',
            *(content for *_, content in sections),
            _cost(checkpoints),
            _how(record, checkpoints),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _labelled(record: Record) -> list[Record]:
    """Label each checkpoint as a table calls it: by its step where that is enough."""
    checkpoints = record["checkpoints"]
    runs = {each["name"].split("/checkpoints/")[0] for each in checkpoints}
    labelled = []
    for each in checkpoints:
        run = each["name"].split("/checkpoints/")[0].rstrip("/").split("/")[-1]
        step = "" if each["step"] is None else f"step {each['step']}"
        label = step if step and len(runs) == 1 else " ".join(filter(None, [run, step]))
        labelled.append(each | {"label": label, "title": run})
    return labelled


def _model(checkpoint: Record) -> str:
    config = checkpoint["config"]
    return (
        f"{config['depth']} blocks of width {config['width']}, {config['vocab_size']:,} tokens of vocabulary, "
        f"{checkpoint['num_parameters']:,} parameters"
    )


def _about(record: Record, checkpoints: Sequence[Record]) -> str:
    text = checkpoints[-1]["text"]
    files = record["text"]["files"]
    named = ", ".join(files[:3]) + (f" and {record['text']['num_files'] - 3} more" if len(files) > 3 else "")
    models = {_model(each): each["label"] for each in checkpoints}
    facts = [
        *(model if len(models) == 1 else f"{_escape(label)}: {model}" for model, label in models.items()),
        f"{text['num_tokens']:,} tokens of text in {text['num_sequences']:,} sequences, from {_escape(named)}",
    ]
    if len(checkpoints) > 1:
        facts.append(f"{len(checkpoints)} checkpoints")
    if len({each["text"]["digest"] for each in checkpoints}) > 1:
        facts.append("Their tokens are not the same: losses and κ a token are not to be compared.")
    return "<p class=facts>" + "<br>".join(facts) + "</p>"


def _section(section: Section, checkpoints: Sequence[Record]) -> tuple[str, str, str]:
    anchor = section.title.lower().replace(" ", "-")
    measured = _measured(section.words, checkpoints)
    scalars = [word for word in measured if not isinstance(_quantity(checkpoints[-1], word).get("value"), list)]
    by_layer = [word for word in measured if word not in scalars]
    figure = section.figure(checkpoints) if section.figure else None
    content = [f"<h2>{section.title}</h2><p>{_math(section.says)}</p>", _counts(section, checkpoints)]
    content += [f"<figure>{figure}</figure>"] if figure else []
    content += [_table(scalars, checkpoints)] if scalars else []
    content += [_table_by_layer(word, checkpoints) for word in by_layer]
    content.append(_definitions(measured))
    return section.title, anchor, f'<section id="{anchor}">{"".join(content)}</section>'


def _counts(section: Section, checkpoints: Sequence[Record]) -> str:
    """List what a reader must know of how much was read."""
    first = _quantity(checkpoints[-1], _measured(section.words, checkpoints)[0])
    said = []
    if "num_classes" in first and "vocab_size" in first:
        said.append(
            f"{first['num_classes']:,} classes with at least {first['min_count']} tokens each, of "
            f"{first['num_classes_seen']:,} tokens that come next in the text and {first['vocab_size']:,} in the "
            f"vocabulary; {first['num_tokens']:,} tokens are of these classes"
        )
    if "is_rank_limited" in first:
        width, tokens = first["width"], first["num_tokens"]
        enough = "fewer than" if first["is_rank_limited"] else "at least"
        said.append(f"{tokens:,} tokens for {width} dimensions: {enough} ten each")
    if "num_windows" in first:
        said.append(
            f"{first['num_windows']} windows of {first['window_context']} tokens, the top {first['num_directions']} "
            f"singular vectors of each Jacobian, {first['method']}"
        )
    if "num_probes" in first:
        tokens, batches = first["num_tokens"], first["num_batches"]
        said.append(f"{tokens:,} tokens in {batches} batches, {max(first['num_probes'])} probes of each layer in all")
    return f"<p class=counts>{'. '.join(said)}.</p>" if said else ""


def _table(chosen: Sequence[Word], checkpoints: Sequence[Record]) -> str:
    head = "".join(f"<th scope=col>{_escape(each['label'])}</th>" for each in checkpoints)
    rows = []
    for word in chosen:
        cells = "".join(f"<td>{_cell(each, word)}</td>" for each in checkpoints)
        rows.append(f"<tr><th scope=row>{_math(word.label)}</th>{cells}</tr>")
    return f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _table_by_layer(word: Word, checkpoints: Sequence[Record]) -> str:
    """Return a folded table by layer, as it is long."""
    record = _quantity(checkpoints[-1], word)
    names = record.get("layers") or [f"ε = {each:g}" for each in record.get("radii", [])]
    head = "".join(f"<th scope=col>{_escape(each['label'])}</th>" for each in checkpoints)
    rows = []
    for place, name in enumerate(names):
        cells = []
        for each in checkpoints:
            values = _quantity(each, word)
            pair = [(values.get(key) or [])[place : place + 1] for key in ("value", "standard_error")]
            cells.append(f"<td>{_with_error(*(each[0] if each else None for each in pair))}</td>")
        rows.append(f"<tr><th scope=row>{_escape(name)}</th>{''.join(cells)}</tr>")
    open_ = " open" if len(names) <= _FEW else ""
    return (
        f"<details{open_}><summary>{_math(word.label)}, in numbers</summary><div class=wide><table><thead><tr><th></th>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


_FEW = 6


def _definitions(chosen: Sequence[Word]) -> str:
    items = []
    for word in chosen:
        formula = f"<span class=formula>{_math(word.formula)}</span>" if word.formula else ""
        items.append(f"<div><dt>{_math(word.label)}</dt><dd>{_math(word.says)}{formula}</dd></div>")
    return f"<dl>{''.join(items)}</dl>"


def _cost(checkpoints: Sequence[Record]) -> str:
    cost = checkpoints[-1]["cost"]
    rows = [
        f"<tr><th scope=row>{_escape(name)}</th><td>{each['forward_passes']:.2f}</td><td>{each['seconds']:.1f} s</td>"
        f"<td>{each['seconds_finishing']:.1f} s</td><td>{each['seconds_compiling']:.1f} s</td></tr>"
        for name, each in cost["parts"].items()
    ]
    return (
        f"<section id=cost><h2>Cost</h2><p>What was done batch by batch took as long as {cost['forward_passes']:.1f} "
        f"forward passes on the same tokens, of {cost['seconds_of_a_forward_pass']:.2f} s each (logits and "
        "loss, nothing else). Compiling for it came on top, once for all checkpoints of one structure; and so did "
        "what is done once in "
        "the end, decompositions and the jackknife, which are compiled for as well. “Reading” is the forward passes "
        f"that the parts after it share. In all it took {cost['seconds']:.0f} s.</p>"
        f"<figure>{figures.of_cost(checkpoints)}</figure><div class=wide><table>"
        "<thead><tr><th></th><th scope=col>forward passes</th><th scope=col>on batches</th><th scope=col>at the "
        "end</th>"
        f"<th scope=col>compiling</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _how(record: Record, checkpoints: Sequence[Record]) -> str:
    blocks = checkpoints[-1]["text"]["num_blocks"]
    options = "".join(
        f"<tr><th scope=row>{_escape(name)}</th><td>{_escape(str(value))}</td></tr>"
        for name, value in record["options"].items()
    )
    names = "".join(f"<li>{_escape(each['name'])}</li>" for each in checkpoints)
    machine = record["machine"]
    return (
        "<section id=how><h2>How it was measured</h2><p>“±” is one standard error, and tells how far another text like "
        f"this one would lead. Sequences next to each other are alike, so the text is cut into {blocks} blocks of "
        "consecutive sequences, and what comes out without each of them gives the error (the jackknife; of means it is "
        "that of batch means). With so few blocks the error itself is known to about "
        f"{100 / math.sqrt(2 * max(blocks - 1, 1)):.0f} %. κ of the layers has the error over its batches, and "
        "Jacobians over their windows. That seeds of training differ is in none of them. Every number is in "
        f"<code>{RECORD}</code>, with its standard error, its number of tokens and its convention.</p>"
        f"<p>Checkpoints:</p><ul>{names}</ul><p>{_escape(machine['device'])}, {machine['devices']} "
        f"{'devices' if machine['devices'] > 1 else 'device'}, jax {_escape(machine['jax'])}; the text’s digest is "
        f"<code>{record['text']['digest']}</code>.</p><details><summary>Options</summary><div class=wide><table><tbody>"
        f"{options}</tbody></table></div></details></section>"
    )


def _measured(chosen: Sequence[Word], checkpoints: Sequence[Record]) -> list[Word]:
    return [word for word in chosen if any(_quantity(each, word) for each in checkpoints)]


def _quantity(checkpoint: Record, word: Word) -> Record:
    return checkpoint["parts"].get(word.part, {}).get(word.name, {})


def _cell(checkpoint: Record, word: Word) -> str:
    record = _quantity(checkpoint, word)
    return _with_error(record.get("value"), record.get("standard_error"))


def _with_error(value: Any, error: Any) -> str:
    """Format a value with two digits of its error, and itself to as many places."""
    if value is None:
        return "–"
    if isinstance(value, str):  # an infinity, by its name
        return _minus(value.replace("inf", "∞"))
    if not error or isinstance(error, str):
        return _number(value, 4)
    if error < _BELOW_ROUNDING * abs(value):
        return f"{_number(value, 6)} ± {_number(error, 1)}"
    size = math.floor(math.log10(max(abs(value), error))) if value or error else 0
    digits = max(0, 1 - math.floor(math.log10(error)))
    if -4 < size < 5 and digits <= 6:
        return _minus(f"{value:.{digits}f} ± {error:.{digits}f}")
    scaled = [each / 10.0**size for each in (value, error)]
    digits = min(6, max(0, 1 - math.floor(math.log10(scaled[1]))))
    return _minus(f"({scaled[0]:.{digits}f} ± {scaled[1]:.{digits}f})·10{_superscript(size)}")


_BELOW_ROUNDING = 1e-6


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return _minus(text)
    mantissa, exponent = text.split("e")
    return f"{_minus(mantissa)}·10{_superscript(int(exponent))}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _math(text: str) -> str:
    """Set x_i, x_{i+1} and x^i as mathematics."""
    text = re.sub(r"_\{([^}]*)\}|_(\w′?)", lambda found: f"<sub>{found[1] or found[2]}</sub>", _escape(text))
    return re.sub(r"\^(−?\w)", r"<sup>\1</sup>", text)


def _escape(text: str) -> str:
    return html.escape(text)


def _replace(file: Path, text: str) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)
