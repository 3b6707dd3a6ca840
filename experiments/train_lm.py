"""Train a small language model on local text, and measure relative flatness κ of its head at every step.

    python experiments/train_lm.py                               # Python's own sources: a few minutes on 2 cores
    python experiments/train_lm.py --strength 0.01               # with λκ of the head in the loss
    python experiments/train_lm.py --strength 1e-3 --layers blocks/2 --name block-2      # of a block's kernels
    python experiments/train_lm.py --text ~/books --pattern '*.txt' --name books
    python experiments/train_lm.py --model-devices 2             # split the parameters over 2 of all devices

κ of the head is a by-product of the loss. That of other kernels is estimated by one random direction a step on a
quarter of the batch, for which the step takes two to five times as long. By default the text is the standard library,
with some files held out, and some whole modules: the loss on those is transfer.

Writes to `runs/train_lm/<name>/`: `config.json` (the model under "model"), `tokenizer.json`, `metrics.jsonl` (a line a
step), `checkpoints/` (Orbax, all of them), `figure.png` and `summary.json`. Killed at any moment, the same command with
--resume goes on, and ends with the same metrics to the last bit. (On a GPU that takes
XLA_FLAGS=--xla_gpu_deterministic_ops=true.)
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from flatjax.models import DecoderConfig
from flatjax.run.checkpoints import checkpointer, load_latest
from flatjax.run.options import RunOptions, check_heads, check_least
from flatjax.run.progress import Progress
from flatjax.run.records import Record, RunFolder, number
from flatjax.run.text import Document, evenly, read, standard_library
from harness.data import text
from harness.data.batches import batch_at
from harness.results.figures import COLOURS, draw_curve
from harness.results.style import plt, tidy
from harness.training.decoders import HEAD, Descent, evaluating, network, one_step, penalty, placement


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Train a small language model, and measure relative flatness of its head at every step."""

    text: tuple[Path, ...] = ()
    """Files or folders of text; by default Python's standard library."""
    pattern: str = "*"
    """Pattern for the names of the folders' files to read."""
    held_out_share: float = 0.05
    """Share of files to hold out, among those of modules that are trained on."""
    transfer_share: float = 0.1
    """Share of modules to hold out: topmost folders, or files in none."""
    modules: tuple[str, ...] = ()
    """Modules to hold out by name, instead of by chance."""
    split_seed: int = 0
    """Seed that chooses what is held out."""
    vocab_size: int = 2048
    """Number of tokens in the vocabulary, of byte pairs."""
    width: int = 128
    """Width of the residual stream."""
    depth: int = 4
    """Number of decoder blocks."""
    heads: int = 4
    """Number of attention heads per block."""
    key_value_heads: int = 0
    """Number of heads of keys and values, which attention heads share; 0 stands for as many as attention heads."""
    untied: bool = False
    """Give the head its own weights, instead of those of the token embedding."""
    context: int = 128
    """Number of tokens per sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type that the network computes in; parameters are in float32. In bfloat16 κ of kernels other than the
    head's is biased, by 2 % to a third in trials."""
    batch_size: int = 16
    """Number of sequences per step."""
    steps: int = 1000
    """Number of training steps."""
    learning_rate: float = 3e-3
    """Learning rate of AdamW, between warm-up and decay."""
    warm_up: int = 50
    """Number of steps in which the learning rate rises from 0."""
    decay_share: float = 0.2
    """Share of the steps in which the learning rate falls to 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW, on all matrices."""
    clip: float = 1.0
    """Largest norm of a gradient; longer ones are clipped."""
    strength: float = 0.0
    """Strength λ of κ in the loss."""
    layers: tuple[str, ...] = (HEAD,)
    """Layers to regularise, by name: head, blocks/1/perceptron/down/kernel, or all below blocks/1."""
    probe_share: float = 0.25
    """Share of a batch's sequences on which κ of other layers than the head is estimated."""
    measure_every: int = 50
    """Steps between two measurements on held-out text."""
    measure_on: int = 64
    """Largest number of sequences measured of each part of the held-out text."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; step 0 and the last have one too."""
    model_devices: int = 1
    """Number of devices to split the parameters among; the others split the batch."""
    seed: int = 0
    """Seed of the initial weights, the batches and the probes."""
    folder: Path = Path("runs/train_lm")

    may_differ = frozenset({"model_devices"})

    def __post_init__(self):
        check_least(
            self, 1, "batch_size", "steps", "warm_up", "measure_every", "checkpoint_every", "context", "measure_on"
        )
        check_least(self, 1, "width", "depth", "vocab_size")
        check_heads(self.width, self.heads, self.key_value_heads)

    @property
    def default_name(self) -> str:
        return "standard-library"

    @property
    def model(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            depth=self.depth,
            num_heads=self.heads,
            num_key_value_heads=self.key_value_heads or None,
            context=self.context,
            tied=not self.untied,
        )

    @property
    def descent(self) -> Descent:
        return Descent(self.steps, self.learning_rate, self.warm_up, self.decay_share, self.weight_decay, self.clip)


def main(config: Config) -> None:
    """Read the text, train, draw the figure and report the results."""
    started = time.monotonic()
    documents = read(config.text, config.pattern) if config.text else standard_library()
    shares = text.Shares(config.held_out_share, config.transfer_share, config.split_seed)
    parts = text.split(documents, shares, config.modules)
    run = config.open_run(files=held_out_files(parts), model=config.model)
    tokenizer = text.saved_or_trained_tokenizer(run.folder / "tokenizer.json", parts["train"], config.vocab_size)
    windows = text.corpus(parts, tokenizer, config.context)
    print(describe(parts, windows))
    train(config, run, tokenizer, windows)
    draw(run.path / "figure.png", config, run.records)
    summary = run.records[-1] | {"tokens": config.steps * config.batch_size * config.context}
    run.summarise(summary)
    print(report(summary))
    print(f"{time.monotonic() - started:.0f} s. The figure is {run.path / 'figure.png'}")


def held_out_files(parts: dict[text.Part, list[Document]]) -> dict[str, list[str]]:
    """List the files that are held out, by which a diagnosis finds them again."""
    return {part: [each.name for each in parts[part]] for part in parts if part != "train"}


def describe(parts: dict[text.Part, list[Document]], windows: dict[text.Part, np.ndarray]) -> str:
    counts = {part: f"{len(parts[part])} files, {windows[part][:, 1:].size:,} tokens" for part in parts}
    modules = ", ".join(sorted({each.module for each in parts["transfer"]}))
    return f"trained on {counts['train']}; held out {counts['held_out']}; transfer to {counts['transfer']} ({modules})"


def train(config: Config, run: RunFolder, tokenizer: text.Tokenizer, windows: dict[text.Part, np.ndarray]) -> None:
    """Train from the last checkpoint to the end, with a record of every step, measured of the network before it."""
    placed = placement(config.model_devices, config.batch_size)
    decoder, params = network(config.model, config.seed, config.dtype)
    chosen = penalty(params, config.layers if config.strength else (), config.probe_share)
    optimizer, rate = config.descent.optimizer(), config.descent.rate()
    state, shardings = placed.put(params, optimizer)
    step_of = jax.jit(
        functools.partial(one_step, decoder, chosen, optimizer), donate_argnums=0, out_shardings=(shardings, None)
    )
    batch_key, probe_key = (jax.random.fold_in(jax.random.key(config.seed), i) for i in range(2))
    choose = jax.jit(batch_at, static_argnums=(2, 3))
    number = len(windows["train"])
    if number < config.batch_size:
        raise SystemExit(f"--batch-size is {config.batch_size}, but the text has {number} sequences to train on")
    held_out: dict[text.Part, np.ndarray] = {
        part: evenly(windows[part], config.measure_on) for part in windows if part != "train"
    }

    evaluate = evaluating(decoder, placed, held_out, config.batch_size)
    # All that was asked for can be done: from here on the run has a folder.
    text.save_tokenizer(tokenizer, run.path / "tokenizer.json")
    with (
        jax.set_mesh(placed.mesh),
        checkpointer(run.path / "checkpoints", keep=None) as checkpoints,
    ):
        left_at, state = load_latest(checkpoints, state)
        run.keep(lambda record: record["step"] < left_at)
        first = max(left_at, 0)
        with Progress(config.run_name, {"step": config.steps}) as progress:
            progress.were_done({"step": first})
            for step in range(first, config.steps + 1):
                is_last = step == config.steps
                if (step % config.checkpoint_every == 0 or is_last) and step > left_at:
                    checkpoints.save(step, state)
                record: Record = {"step": step}
                if step % config.measure_every == 0 or is_last:
                    record |= evaluate(state)
                if not is_last:
                    rows = windows["train"][np.asarray(choose(batch_key, step, number, config.batch_size))]
                    key = jax.random.fold_in(probe_key, step)
                    state, logged = step_of(state, placed.batch(rows), key, config.strength)
                    logged = {name: value.item() for name, value in jax.device_get(logged).items()}
                    record |= logged | {"learning_rate": np.asarray(rate(step)).item()}
                    progress.done("step", note=f"loss {logged['loss']:.3f}, κ {logged['kappa']:.3g}")
                run.append(record)


def draw(path: Path, config: Config, records: list[Record]) -> None:
    """Draw loss and κ over the steps, of each batch and of held-out text."""
    batches = [record for record in records if "loss" in record]
    measured = [record for record in records if "held_out_loss" in record]
    with plt.rc_context({"font.size": 9}):
        figure, all_axes = plt.subplots(2, sharex=True, figsize=(6.4, 4.8), layout="constrained", dpi=200)
        for axes, quantity, label in zip(all_axes, ("loss", "kappa"), _LABELS, strict=True):
            draw_curve(axes, [batches], quantity, "0.75", "batches trained on")
            draw_curve(axes, [measured], f"held_out_{quantity}", COLOURS["held_out"], "files held out")
            draw_curve(axes, [measured], f"transfer_{quantity}", "#3a7d44", "modules held out")
            axes.set_ylabel(label)
            tidy(axes)
        all_axes[1].set_yscale("log")
        all_axes[0].legend(frameon=False)
        all_axes[1].set_xlabel("step")
        penalised = f", λ = {config.strength:g} on {', '.join(config.layers)}" if config.strength else ""
        all_axes[0].set_title(f"{config.run_name}: width {config.width}, depth {config.depth}{penalised}")
        figure.savefig(path)
    plt.close(figure)


_LABELS = ("loss, nats a token", "κ of the head (larger is sharper)")


def report(summary: Record) -> str:
    def of(part: str) -> str:
        loss, kappa = (number(summary[f"{part}_{name}"]) for name in ("loss", "kappa"))
        return f"loss {loss:.4f} (perplexity {np.exp(loss):.2f}), κ of the head {kappa:.4g} (larger is sharper)"

    return f"files held out:   {of('held_out')}\nmodules held out: {of('transfer')}"


if __name__ == "__main__":
    main(tyro.cli(Config))
