"""What a language model's checkpoint is like: flatness, collapse, and the geometry of its residual stream.

    python experiments/diagnose_llm.py runs/train_lm/standard-library            # all checkpoints of a run side by side
    python experiments/diagnose_llm.py ~/models/pythia-160m --text book.txt      # a folder as it is published
    python experiments/diagnose_llm.py EleutherAI/pythia-160m@step1000 EleutherAI/pythia-160m --text book.txt

Reads sequences of tokens from the text and reports, each number with its standard error: loss and perplexity; relative
flatness κ and κ̂ of the head, exactly; κ of the layers, by probes on a part of the text; neural collapse over the
vocabulary; the geometry of the residual stream by layer, how straight it is and how it grows; how the Jacobians of the
blocks align; logit sharpness; and what all that has cost in forward passes.

Writes to `runs/diagnose_llm/<name>/`: `config.json`, `metrics.jsonl` (a line a part), `diagnosis.json` (every number,
with its standard error, the number of its tokens and its convention) and `diagnosis.html`, one page that needs nothing
else. Killed at any moment, the same command with --resume goes on to the same numbers; with more checkpoints or steps
it adds these. --redraw makes the page anew from `diagnosis.json`.

Memory, beside the parameters, in numbers (depth L, width m, vocabulary d, batches of b sequences of t tokens, G blocks
of text): the stream of a batch, (L + 2)·b·t·m, and as much again for what is made of it; for each block of text the
moments of the C classes that are kept, 2·G·C·m, and a triangle a layer, G·(L + 2)·m²; for NC4 moments of the whole
vocabulary, about 6·d·m; for the profile the logits of `profile_batch` sequences, and what a second derivative keeps of
a forward pass on them. None of these grows with the text: only some numbers a sequence do.
"""

import dataclasses
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal, get_args

# Its threads spin as they wait: where others compute beside, decompositions take a hundred times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from harness import checkpoint_sources, page
from harness.checkpoint_sources import Source
from harness.diagnosis.collapse import Classes, collapse_part, decisions_part
from harness.diagnosis.geometry import geometry_part
from harness.diagnosis.head import head_part, sharpness_part
from harness.diagnosis.jacobians import jacobians_part
from harness.diagnosis.profile import batch_reader, layers_named, profile_part
from harness.diagnosis.reading import Network, Text, mean_loss, reader, tokens_of
from harness.diagnosis.stages import Done, Stage, run_stage, seconds_of, usual_seconds
from harness.diagnosis.trajectory import trajectory_part
from harness.options import check_least
from harness.progress import Progress
from harness.runs import Record, RunFolder, as_json
from harness.text import Document, evenly, read, windows
from jax.sharding import AxisType, Mesh

from flatjax.heads import linear_head

Name = Literal["head", "sharpness", "collapse", "geometry", "trajectory", "profile", "jacobians"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Diagnose checkpoints of language models on a text."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Hugging Face folders, hub names (or name@revision), runs of train_lm.py, or `checkpoints/<step>` in one."""
    text: tuple[Path, ...] = ()
    """Files of text, or folders of them; by default a part of the text of the first run."""
    split: Literal["held_out", "transfer", "train"] = "held_out"
    """Which part, if there is no --text: held out by file, by whole modules, or what was trained on."""
    steps: tuple[int, ...] = ()
    """Of the runs' checkpoints; by default all."""
    parts: tuple[Name, ...] = get_args(Name)
    """What to measure."""
    context: int = 256
    """Tokens a sequence."""
    max_tokens: int = 65_536
    """At most so many are predicted, in sequences evenly spaced over the text."""
    batch_size: int = 8
    """Sequences at a time."""
    blocks: int = 8
    """Of consecutive sequences, that standard errors are over."""
    min_count: int = 10
    """Of a next token, to be a class whose collapse is measured: the mean of few samples is itself spread."""
    radii: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """Relative changes ε of logits, that sharpness is under."""
    fit_range: tuple[int, int] = (11, 98)
    """Of the eigenvalues that α-ReQ is fitted to; none has a smaller width."""
    layers: tuple[str, ...] = ("blocks",)
    """Patterns of the paths of kernels that κ is estimated of, as "blocks/*/perceptron" or "token_embedding"."""
    profile_sequences: int = 16
    """Evenly spaced among those read."""
    profile_batch: int = 2
    """Of them at a time."""
    num_probes: int = 4
    """Of such a batch, at least; even, and at least 4."""
    max_probes: int = 16
    """Of such a batch, at most."""
    relative_error: float | None = None
    """Probes are added until their standard error is this share of κ, for every layer."""
    windows: int = 8
    """At whose last tokens the Jacobians of the blocks are taken."""
    window_context: int = 64
    """Tokens that such a token sees, itself included."""
    directions: int = 10
    """Singular vectors of each Jacobian that are compared."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """That the network computes in; what is measured of it is summed in float32. In bfloat16 κ of kernels is biased, by
    2 % to a third in trials."""
    tensor_parallel: int = 0
    """Devices that share the head and the blocks; the others share the sequences. 0 is 2 if it divides them, or 1."""
    save_every: int = 16
    """Batches."""
    seed: int = 0
    """Of the probes and of the Jacobians' first guesses."""
    name: str | None = None
    """Of the folder written to; that of the first checkpoint by default."""
    folder: Path = Path("runs/diagnose_llm")
    """Where such folders are."""
    resume: bool = False
    """Go on where it was left, or with more checkpoints."""
    redraw: bool = False
    """Make the page anew, of what was measured."""

    def __post_init__(self):
        check_least(self, 1, "profile_batch", "batch_size", "profile_sequences", "windows", "save_every")
        check_least(self, 2, "context", "max_tokens", "blocks", "min_count", "window_context", "directions")
        check_least(self, 0, "tensor_parallel")
        if self.num_probes < 4 or self.num_probes % 2 or self.max_probes < self.num_probes:
            raise SystemExit(
                f"--num-probes is {self.num_probes} and --max-probes {self.max_probes}, wanted an even number of at "
                "least 4, and no more than --max-probes"
            )
        if not self.redraw and not self.checkpoints:
            raise SystemExit("wanted a checkpoint: a run of train_lm.py, a folder as it is published, or a hub name")
        if self.redraw and not (self.checkpoints or self.name):
            raise SystemExit("wanted the checkpoint or the --name whose page is to be made anew")


def main(config: Config) -> None:
    """Diagnoses every checkpoint that is not yet, and writes the record and the page after each."""
    folder = config.folder / (config.name or Path(config.checkpoints[0]).resolve().name)
    if config.redraw:
        print(f"the page is {page.redraw(folder)}")
        return
    sources = checkpoint_sources.find(config.checkpoints, config.steps)
    documents = (
        read(config.text) if config.text else checkpoint_sources.documents_of_run(config.checkpoints[0], config.split)
    )
    if not documents:
        raise SystemExit(f"--text has no text: {', '.join(map(str, config.text))}")
    texts = Texts(config, documents)
    for source in sources:
        texts.of(source)  # of a checkpoint that cannot be read there is nothing to record
    recorded = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_OF_THE_RUN}
    run = RunFolder(folder, as_json(recorded) | {"text": digest(documents)}, resume=config.resume)
    mesh = mesh_of(config)
    started = time.monotonic()
    left = [source for source in sources if not of_checkpoint(run, source.name, "cost")]
    with Progress("diagnosis", planned(config, [texts.of(source) for source in left])) as progress:
        for source in left:
            diagnose(config, source, texts.of(source), mesh, run, progress)
            write(config, run, sources, texts)
    write(config, run, sources, texts)
    print(page.summary(run.path))
    print(f"{time.monotonic() - started:.0f} s. The page is {run.path / page.NAME}")


_NOT_OF_THE_RUN = {"resume", "redraw", "name", "folder", "checkpoints", "steps", "text", "split",
                   "tensor_parallel", "save_every"}  # fmt: skip
"""Options that may differ when it is resumed; of the text it is its content that may not."""


def digest(documents: list[Document]) -> str:
    return hashlib.sha256("\0".join(each.text for each in documents).encode()).hexdigest()[:16]


def mesh_of(config: Config) -> Mesh:
    """Of all devices.

    Raises:
        SystemExit: they cannot be shared as asked for.
    """
    number = jax.device_count()
    model = config.tensor_parallel or (2 if number % 2 == 0 else 1)
    data = number // model
    if number % model or config.batch_size % data:
        raise SystemExit(
            f"of {number} devices --tensor-parallel {model} leaves {number / model:g} to share the sequences, wanted "
            f"a divisor of --batch-size, {config.batch_size}"
        )
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class Texts:
    """The sequences of tokens that each checkpoint is diagnosed on, the same where the tokenizer is."""

    def __init__(self, config: Config, documents: list[Document]):
        self.config, self.documents = config, documents
        self._of_tokenizers: dict[str, Text] = {}
        self._of_sources: dict[str, Text] = {}

    def of(self, source: Source) -> Text:
        if source.name not in self._of_sources:
            tokenizer = source.tokenizer()
            key = tokenizer.to_str()
            if key not in self._of_tokenizers:
                context = self.config.context
                tokens = tokens_of(tokenizer, (each.text for each in self.documents))
                sequences = evenly(windows(tokens, context), max(1, self.config.max_tokens // context))
                self._of_tokenizers[key] = Text(sequences, self.config.batch_size, self.config.blocks)
            self._of_sources[source.name] = self._of_tokenizers[key]
        return self._of_sources[source.name]


def part_of(config: Config, text: Text) -> Text:
    """What the profile is of, in whole batches."""
    size = min(config.profile_batch, len(text.sequences))
    number = max(1, min(config.profile_sequences, len(text.sequences)) // size) * size
    return Text(evenly(text.sequences, number), size, number)


def windows_of(config: Config, text: Text) -> Text:
    """Beginnings of sequences, one at a time."""
    length = min(config.window_context, text.sequences.shape[1] - 1)
    return Text(evenly(text.sequences, config.windows)[:, : length + 1], 1, config.windows)


def planned(config: Config, texts: list[Text]) -> dict[str, int]:
    """How many sequences each stage has to read."""
    left = {"sequence": 0, "nearest mean": 0, "layers": 0, "blocks": 0}
    for text in texts:
        left["sequence"] += len(text.sequences)
        left["nearest mean"] += len(text.sequences) * ("collapse" in config.parts)
        left["layers"] += len(part_of(config, text).sequences) * ("profile" in config.parts)
        left["blocks"] += len(windows_of(config, text).sequences) * ("jacobians" in config.parts)
    return left


def diagnose(config: Config, source: Source, text: Text, mesh: Mesh, run: RunFolder, progress: Progress) -> None:
    """All parts of one checkpoint, in stages that each read the text anew."""
    model = source.load(jnp.dtype(config.dtype), mesh)
    network = Network(*nnx.split(model, nnx.Param), mesh)
    settings, decoder = config.parts, model.config
    vocab_size = linear_head(network.head).num_outputs
    if text.sequences.max() >= vocab_size:
        raise SystemExit(f"{source.name} has {vocab_size} tokens, and its tokenizer gives {text.sequences.max()}")
    states = run.path / "states" / hashlib.sha256(source.name.encode()).hexdigest()[:12]
    costs: Record = {}

    def run_and_record(stage: Stage) -> Done:
        done = run_stage(states, stage, config.save_every, progress)
        costs[stage.name] = seconds_of(done, stage)
        for name, part in stage.parts.items():
            if not of_checkpoint(run, source.name, name):
                started = time.perf_counter()
                numbers = part.finish(done.states[name])
                seconds = time.perf_counter() - started
                run.append({"checkpoint": source.name, "part": name, "numbers": numbers, "finishing": seconds})
        return done

    if not of_checkpoint(run, source.name, "model"):
        described = describe(source, network, decoder, text)
        run.append({"checkpoint": source.name, "part": "model", "numbers": described})
    classes = Classes.of(text, vocab_size, config.min_count) if "collapse" in settings else None
    parts = {}
    if "head" in settings:
        parts["head"] = head_part(network, text)
    if "sharpness" in settings:
        parts["sharpness"] = sharpness_part(network, text, config.radii)
    if classes is not None:
        parts["collapse"] = collapse_part(network, text, classes, config.min_count)
    if "geometry" in settings:
        parts["geometry"] = geometry_part(network, text, config.fit_range)
    if "trajectory" in settings:
        parts["trajectory"] = trajectory_part(network, text)
    done = run_and_record(Stage("tokens", "sequence", text, reader(network, text), parts))
    if classes is not None:
        decisions = decisions_part(network, text, classes, done.states["collapse"], config.min_count)
        nearest = {"decisions": decisions}
        run_and_record(Stage("nearest mean", "nearest mean", text, reader(network, text), nearest))
    if "profile" in settings:
        part = part_of(config, text)
        profile = profile_part(
            network, part, layers_named(network, config.layers, tied=decoder.tied), seed=config.seed,
            num_probes=config.num_probes, max_probes=config.max_probes, relative_error=config.relative_error,
        )  # fmt: skip
        layers = {"profile": profile}
        run_and_record(Stage("layers", "layers", part, batch_reader(network, part), layers))
    if "jacobians" in settings:
        chosen = windows_of(config, text)
        blocks = {"jacobians": jacobians_part(network, chosen, config.directions, config.seed)}
        run_and_record(Stage("blocks", "blocks", chosen, reader(network, chosen), blocks))
    run.append({"checkpoint": source.name, "part": "cost", "numbers": cost(network, text, costs, run, source.name)})
    shutil.rmtree(states, ignore_errors=True)


def describe(source: Source, network: Network, decoder: object, text: Text) -> Record:
    """The model, and what it is diagnosed on."""
    return {
        "step": source.step,
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(network.params)),
        "config": dataclasses.asdict(decoder),  # pyrefly: ignore
        "text": {
            "num_sequences": len(text.sequences),
            "num_tokens": text.num_tokens,
            "num_blocks": int(text.blocks[-1]) + 1,
            "digest": hashlib.sha256(np.ascontiguousarray(text.sequences).tobytes()).hexdigest()[:16],
        },
    }


def cost(network: Network, text: Text, costs: Record, run: RunFolder, checkpoint: str) -> Record:
    """Of each part on all batches in forward passes on all tokens; and apart, compiling and what is done in the end."""
    batches = [[network.placed(each) for each in text.batch(index)] for index in range(min(text.num_batches, 5))]
    seconds = []
    for batch in [batches[0], *batches]:
        started = time.perf_counter()
        jax.block_until_ready(mean_loss(network.graphdef, network.params, *batch))
        seconds.append(time.perf_counter() - started)
    one_pass = usual_seconds(np.array(seconds)) * text.num_batches
    parts = {}
    for stage, of_parts in costs.items():
        for name, (computing, compiling) in of_parts.items():
            record = of_checkpoint(run, checkpoint, name)
            finishing = record["finishing"] if record else 0.0
            parts[f"{stage}: {name}"] = {
                "seconds": computing,
                "seconds_compiling": compiling,
                "seconds_finishing": finishing,
                "forward_passes": computing / one_pass,
            }
    return {
        "seconds_of_a_forward_pass": one_pass,
        "forward_passes": sum(each["forward_passes"] for each in parts.values()),
        "seconds": sum(value for each in parts.values() for name, value in each.items() if name.startswith("seconds")),
        "parts": parts,
    }


def of_checkpoint(run: RunFolder, checkpoint: str, part: str) -> Record | None:
    return next((each for each in run.records if (each["checkpoint"], each["part"]) == (checkpoint, part)), None)


def write(config: Config, run: RunFolder, sources: list[Source], texts: Texts) -> None:
    """What was measured so far, in the order of steps, as JSON and as a page."""
    names = list(dict.fromkeys([record["checkpoint"] for record in run.records]))
    finished = [name for name in names if of_checkpoint(run, name, "cost")]
    checkpoints = []
    for name in finished:
        parts = {record["part"]: record["numbers"] for record in run.records if record["checkpoint"] == name}
        about = {"name": name, **parts.pop("model"), "cost": parts.pop("cost")}
        parts = {part: page.with_conventions(part, numbers) for part, numbers in parts.items()}
        checkpoints.append(about | {"parts": parts})
    checkpoints.sort(key=lambda each: -1 if each["step"] is None else each["step"])
    device = jax.devices()[0]
    page.write(
        run.path,
        {
            "format": 1,
            "text": {"files": [each.name for each in texts.documents][:_FILES_NAMED], "num_files": len(texts.documents),
                     "digest": digest(texts.documents)},
            "options": as_json({key: value for key, value in dataclasses.asdict(config).items()
                                  if key not in _NOT_OF_THE_RUN}),
            "machine": {"jax": jax.__version__, "device": device.device_kind, "platform": device.platform,
                        "devices": jax.device_count()},
            "checkpoints": checkpoints,
        },
    )  # fmt: skip


_FILES_NAMED = 20


if __name__ == "__main__":
    main(tyro.cli(Config))
