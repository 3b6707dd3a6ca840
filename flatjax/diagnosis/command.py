"""The command diagnoses checkpoints of language models: it has options, stages, a record and a page."""

import dataclasses
import hashlib
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import AxisType, Mesh

from flatjax.diagnosis.collapse import Classes, collapse_part, decisions_part
from flatjax.diagnosis.geometry import geometry_part
from flatjax.diagnosis.head import head_part, sharpness_part
from flatjax.diagnosis.jacobians import check_depth, jacobians_part
from flatjax.diagnosis.page import render
from flatjax.diagnosis.profile import batch_reader, layers_named, profile_part
from flatjax.diagnosis.reading import PlacedDecoder, Text, mean_loss, reader, tokens_of
from flatjax.diagnosis.record import Called, Diagnoses
from flatjax.diagnosis.sources import Source, documents_of_run, find
from flatjax.diagnosis.stages import Done, Saves, Stage, run_stage, seconds_of, usual_seconds
from flatjax.diagnosis.trajectory import trajectory_part
from flatjax.heads import linear_head
from flatjax.loading.shapes import decoder_shapes
from flatjax.run.options import RunOptions, check_above_0, check_least, check_not_empty
from flatjax.run.progress import Progress
from flatjax.run.records import Record, plain
from flatjax.run.text import Document, evenly, read, windows

Name = Literal["head", "sharpness", "collapse", "geometry", "trajectory", "profile", "jacobians"]


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Diagnose checkpoints of language models on a text."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Checkpoints: Hugging Face folders, hub names (or name@revision), runs of train_lm.py, or `checkpoints/<step>` in
    one."""
    text: tuple[Path, ...] = ()
    """Files or folders of text; by default a part of the text of the first run."""
    split: Literal["held_out", "transfer", "train"] = "held_out"
    """Part of the run's text to read without --text: held out by file, by whole modules, or trained on."""
    steps: tuple[int, ...] = ()
    """Steps of the runs' checkpoints to diagnose; by default all."""
    parts: tuple[Name, ...] = get_args(Name)
    """Parts of the diagnosis to measure."""
    context: int = 256
    """Number of tokens per sequence."""
    max_tokens: int = 65_536
    """Largest number of tokens to predict, in sequences evenly spaced over the text."""
    batch_size: int = 8
    """Number of sequences at a time."""
    blocks: int = 8
    """Number of blocks of consecutive sequences, which standard errors are taken over."""
    min_count: int = 10
    """Least count of a next token whose collapse is measured as a class: the mean of few samples is itself spread."""
    radii: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """Relative changes ε of the logits, under which sharpness is measured."""
    fit_range: tuple[int, int] = (11, 98)
    """First and last eigenvalue that α-ReQ is fitted to; no stream may have a smaller width."""
    layers: tuple[str, ...] = ("blocks",)
    """Patterns for the paths of kernels whose κ is estimated, as "blocks/*/perceptron" or "token_embedding"."""
    profile_sequences: int = 16
    """Number of sequences that κ of the layers is measured on, evenly spaced among those read."""
    profile_batch: int = 2
    """Number of these sequences per batch."""
    num_probes: int = 4
    """Least number of probes per such batch; even, and 4 or more."""
    max_probes: int = 16
    """Largest number of probes per such batch."""
    relative_error: float | None = None
    """Probes are added until their standard error is this share of κ, for every layer."""
    windows: int = 8
    """Number of windows at whose last tokens the Jacobians of the blocks are taken."""
    window_context: int = 64
    """Number of tokens that such a last token sees, itself included."""
    directions: int = 10
    """Number of singular vectors that are compared between Jacobians."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type that the network computes in; measures are summed in float32. In bfloat16 κ of kernels is biased, by
    2 % to a third in trials."""
    tensor_parallel: int = 0
    """Number of devices that share the head and the blocks; the others share the sequences. 0 stands for 2 if it
    divides them, else 1."""
    save_every: float = 60.0
    """Seconds of work that may be lost when killed, or one batch if that is longer."""
    seed: int = 0
    """Seed of the probes and of the Jacobians' first guesses."""
    folder: Path = Path("runs/diagnose_llm")
    redraw: bool = False
    """Make the page anew from what was measured."""

    # The content of the text may not differ: its digest is recorded.
    may_differ = frozenset({"checkpoints", "redraw", "save_every", "split", "steps", "tensor_parallel", "text"})

    @property
    def default_name(self) -> str:
        """Return the name of the first checkpoint."""
        return Path(self.checkpoints[0]).resolve().name

    def __post_init__(self):
        check_least(self, 1, "profile_batch", "batch_size", "profile_sequences", "windows")
        check_least(self, 2, "context", "max_tokens", "blocks", "min_count", "window_context", "directions")
        check_least(self, 0, "tensor_parallel", "save_every", "seed")
        check_above_0(self, "radii", "relative_error")
        check_not_empty(self, "parts", "radii", "layers")
        if not 1 <= self.fit_range[0] < self.fit_range[1]:
            raise SystemExit(
                f"--fit-range is {self.fit_range[0]} {self.fit_range[1]}, wanted at least 1, and then more"
            )
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
    """Diagnose every checkpoint that is not diagnosed yet, and write the record and the page after each."""
    if config.redraw:
        print(f"the page is {render.redraw(config.folder / config.run_name)}")
        return
    sources = find(config.checkpoints, config.steps)
    documents = read(config.text) if config.text else documents_of_run(config.checkpoints[0], config.split)
    if not documents:
        raise SystemExit(f"--text has no text: {', '.join(map(str, config.text))}")
    mesh, texts = mesh_of(config), Texts(config, documents)
    run = config.open_run(text=digest_of_documents(documents))
    for source in sources:
        check(config, source, texts.of(source))  # before weights are read or anything is written
    diagnoses, started = Diagnoses(run), time.monotonic()
    called = [Called(each.name, each.step, known_by(each, texts.of(each))) for each in sources]
    for name in diagnoses.changed(called):
        print(f"{name} is not what it was when it was measured: it is measured anew")
    distinct = {each.digest: source for each, source in zip(called, sources, strict=True)}
    work = {known: planned(config, texts.of(source)) for known, source in distinct.items()}
    total = {kind: sum(each[kind] for each in work.values()) for kind in costs(config)}
    with Progress("diagnosis", total, costs(config)) as progress:
        for known, source in distinct.items():
            if diagnoses.is_whole(known):
                progress.were_done(work[known])
            else:
                diagnose(config, source, known, texts.of(source), mesh, diagnoses, progress)
                write(config, diagnoses, called, documents)
    write(config, diagnoses, called, documents)
    print(render.summary(run.path))
    print(f"{time.monotonic() - started:.0f} s. The page is {run.path / render.NAME}")


def digest_of_documents(documents: list[Document]) -> str:
    """Return a short name for the content of a text, whatever its files are called."""
    return hashlib.sha256("\0".join(each.text for each in documents).encode()).hexdigest()[:16]


def known_by(source: Source, text: Text) -> str:
    """Return what a checkpoint's records are known by: its weights and its tokens of the text."""
    return hashlib.sha256(f"{source.digest()} {digest_of_tokens(text)}".encode()).hexdigest()[:16]


def digest_of_tokens(text: Text) -> str:
    """Return a short name for the tokens that a checkpoint is diagnosed on."""
    return hashlib.sha256(np.ascontiguousarray(text.sequences).tobytes()).hexdigest()[:16]


def check(config: Config, source: Source, text: Text) -> None:
    """Check that the options fit a checkpoint and its text.

    Raises:
        SystemExit: the options do not fit.
    """
    decoder, largest = source.config(), text.sequences.max()
    if decoder.positions == "learned" and config.context > decoder.context:
        raise SystemExit(
            f"--context is {config.context}, but {source.name} has {decoder.context} learned positions: wanted no more"
        )
    if largest >= decoder.vocab_size:
        raise SystemExit(f"{source.name} has {decoder.vocab_size} tokens, and its tokenizer gives {largest}")
    if "collapse" in config.parts:
        Classes.of(text, decoder.vocab_size, config.min_count)
    if "profile" in config.parts:
        shapes = decoder_shapes(decoder)
        params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
        layers_named(params, config.layers, tied=decoder.tied)
    if "jacobians" in config.parts:
        check_depth(decoder.depth)


def mesh_of(config: Config) -> Mesh:
    """Build the mesh of all devices.

    Raises:
        SystemExit: the devices cannot be shared as the options ask.
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
    """Texts are the sequences of tokens that each checkpoint is diagnosed on; equal tokenizers give the same ones."""

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
    """Return the part of the text that the profile is measured on, in whole batches."""
    size = min(config.profile_batch, len(text.sequences))
    number = max(1, min(config.profile_sequences, len(text.sequences)) // size) * size
    return Text(evenly(text.sequences, number), size, number)


def windows_of(config: Config, text: Text) -> Text:
    """Return the beginnings of sequences, one at a time."""
    length = min(config.window_context, text.sequences.shape[1] - 1)
    return Text(evenly(text.sequences, config.windows)[:, : length + 1], 1, config.windows)


def planned(config: Config, text: Text) -> dict[str, int]:
    """Return how many sequences of each kind there are to read for a checkpoint."""
    return {
        "sequence": len(text.sequences),
        "classified sequence": len(text.sequences) * ("collapse" in config.parts),
        "probed sequence": len(part_of(config, text).sequences) * ("profile" in config.parts),
        "window": len(windows_of(config, text).sequences) * ("jacobians" in config.parts),
    }


def costs(config: Config) -> dict[str, float]:
    """Estimate the cost of each kind, in forward passes on a sequence, until its time is seen."""
    return {
        "sequence": 6.0,
        "classified sequence": 3.0,
        "probed sequence": 8.0 * config.num_probes,
        "window": 30.0 * config.window_context / config.context,
    }


def diagnose(
    config: Config,
    source: Source,
    digest: str,
    text: Text,
    mesh: Mesh,
    diagnoses: Diagnoses,
    progress: Progress,
) -> None:
    """Measure all parts of one checkpoint, in stages that each read the text anew."""
    model = source.load(jnp.dtype(config.dtype), mesh)
    network = PlacedDecoder(*nnx.split(model, nnx.Param), mesh)
    settings, decoder = config.parts, model.config
    run, vocab_size = diagnoses.run, linear_head(network.head).num_outputs
    saves = Saves(run.folder / "states" / digest, config.save_every, before=lambda: run.path)
    spent: Record = {}

    def run_and_record(stage: Stage) -> Done:
        done = run_stage(stage, saves, progress)
        spent[stage.name] = seconds_of(done, stage)
        if diagnoses.part(digest, "model") is None:
            diagnoses.add(digest, "model", describe(network, decoder, text))
        for name, part in stage.parts.items():
            if diagnoses.part(digest, name) is None:
                started = time.perf_counter()
                numbers = part.finish(done.states[name])
                diagnoses.add(digest, name, numbers, finishing=time.perf_counter() - started)
        return done

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
        run_and_record(Stage("nearest mean", "classified sequence", text, reader(network, text), nearest))
    if "profile" in settings:
        part = part_of(config, text)
        profile = profile_part(
            network, part, layers_named(network.params, config.layers, tied=decoder.tied), seed=config.seed,
            num_probes=config.num_probes, max_probes=config.max_probes, relative_error=config.relative_error,
        )  # fmt: skip
        layers = {"profile": profile}
        run_and_record(Stage("layers", "probed sequence", part, batch_reader(network, part), layers))
    if "jacobians" in settings:
        chosen = windows_of(config, text)
        blocks = {"jacobians": jacobians_part(network, chosen, config.directions, config.seed)}
        run_and_record(Stage("blocks", "window", chosen, reader(network, chosen), blocks))
    diagnoses.add(digest, "cost", cost(network, text, spent, diagnoses, digest))
    shutil.rmtree(saves.folder, ignore_errors=True)


def describe(network: PlacedDecoder, decoder: object, text: Text) -> Record:
    """Describe the model, and what it is diagnosed on."""
    return {
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(network.params)),
        "config": dataclasses.asdict(decoder),  # pyrefly: ignore
        "text": {
            "num_sequences": len(text.sequences),
            "num_tokens": text.num_tokens,
            "num_blocks": int(text.blocks[-1]) + 1,
            "digest": digest_of_tokens(text),
        },
    }


def cost(network: PlacedDecoder, text: Text, spent: Record, diagnoses: Diagnoses, digest: str) -> Record:
    """Return the cost of each part in forward passes on all tokens; compiling and what comes at the end stand apart."""
    batches = [[network.placed(each) for each in text.batch(index)] for index in range(min(text.num_batches, 5))]
    seconds = []
    for batch in [batches[0], *batches]:
        started = time.perf_counter()
        jax.block_until_ready(mean_loss(network.graphdef, network.params, *batch))
        seconds.append(time.perf_counter() - started)
    one_pass = usual_seconds(np.array(seconds)) * text.num_batches
    parts = {}
    for stage, of_parts in spent.items():
        for name, (computing, compiling) in of_parts.items():
            record = diagnoses.part(digest, name)
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


def write(config: Config, diagnoses: Diagnoses, called: list[Called], documents: list[Document]) -> None:
    """Write what was measured so far, in the order of steps, as JSON and as a page."""
    diagnoses.call(called)
    checkpoints = []
    for each, parts in diagnoses.whole():
        about = {"name": each.name, "step": each.step, **parts.pop("model"), "cost": parts.pop("cost")}
        checkpoints.append(about | {"parts": {part: render.with_conventions(part, of) for part, of in parts.items()}})
    device = jax.devices()[0]
    render.write(
        diagnoses.run.path,
        {
            "format": 1,
            "text": {"files": [each.name for each in documents][:_FILES_NAMED], "num_files": len(documents),
                     "digest": digest_of_documents(documents)},
            "options": plain(config.recorded()),
            "machine": {"jax": jax.__version__, "device": device.device_kind, "platform": device.platform,
                        "devices": jax.device_count()},
            "checkpoints": checkpoints,
        },
    )  # fmt: skip


_FILES_NAMED = 20
