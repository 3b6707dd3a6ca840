"""Steer flatness by λκ in an optimizer chain, and compare κ at equal training loss, for λ of either sign.

    python experiments/steering.py    # about two minutes on 2 cores

Perceptrons learn handwritten digits by `optax.chain(flat_reg(λ, penalty), optax.adam(η))`, one for each λ and seed, and
κ of the head on the training images is compared where their cross-entropy on these is the same, as κ falls with the
loss whatever λ is. λ < 0 pushes sharp; too far below 0 nothing is learned. Prints a table with 95 % intervals over the
seeds, and writes `runs/steering/figure.png` and `record.json`.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import trange

from flatjax import cross_entropy, flat_reg, relative_flatness
from flatjax.models import MLP
from flatjax.run.records import write_record
from harness.data import images
from harness.results.intervals import interval
from harness.results.style import plt, tidy

LOSSES = (0.3, 0.1, 0.03, 0.01, 0.003)
"""κ is compared at these training losses."""


def main(
    strengths: tuple[float, ...] = (-3e-4, -1e-4, -3e-5, 0.0, 1e-3, 1e-2, 1e-1),
    num_seeds: int = 5,
    num_steps: int = 1500,
    learning_rate: float = 1e-3,
    num_train: int = 500,
    folder: Path = Path("runs/steering"),
) -> None:
    """Train every network, compare κ, and draw the figure.

    Args:
        strengths: values of λ, with 0 among them.
        num_seeds: number of seeds, which choose images and initial weights, and which the intervals are over.
        num_steps: steps of training, each on all the images.
        learning_rate: learning rate of Adam.
        num_train: number of training images.
        folder: folder for the figure and the record.
    """
    if 0 not in strengths:
        raise SystemExit(f"--strengths is {strengths}, wanted 0 among them, to compare with")
    curves = {name: [] for name in ("loss", "kappa", "accuracy")}
    for seed in trange(num_seeds, desc="seeds", disable=None):
        of_seed = train(jnp.asarray(strengths, jnp.float32), seed, num_steps, learning_rate, num_train)
        for name, values in of_seed.items():
            curves[name].append(values)
    loss, kappa, accuracy = (np.stack(curves[name]) for name in ("loss", "kappa", "accuracy"))
    plain = strengths.index(0.0)

    rows: list[dict[str, Any]] = []
    print("κ (larger is sharper) over that of λ = 0 at the same training loss (95 % interval over seeds)")
    print(f"{'λ':>8} " + " ".join(f"{f'loss {level:g}':>22}" for level in LOSSES) + "   loss, test accuracy at the end")
    for i, strength in enumerate(strengths):
        cells = []
        for level in LOSSES:
            ratios = np.log([at_loss(loss[s, i], kappa[s, i], level) for s in range(num_seeds)]) - np.log(
                [at_loss(loss[s, plain], kappa[s, plain], level) for s in range(num_seeds)]
            )
            mean, reach = interval(ratios.tolist())
            ratio, low, high = np.exp([mean, mean - reach, mean + reach])
            is_reached = bool(np.all(np.isfinite(ratios)))
            cells.append(f"{ratio:.3g} [{low:.3g}, {high:.3g}]" if is_reached else "not by all")
            values = {"ratio": ratio, "low": low, "high": high} if is_reached else {}
            rows.append({"strength": strength, "loss": level} | values)
        end = f"{np.median(loss[:, i, -1]):.2g}, {np.mean(accuracy[:, i, -1]):.1%}"
        print(f"{strength:8g} " + " ".join(f"{cell:>22}" for cell in cells) + f"   {end}")
    draw(folder, strengths, loss, kappa)
    write_record(folder / "record.json", rows)
    print(f"the figure is {folder / 'figure.png'}")


def train(
    strengths: jax.Array, seed: int, num_steps: int, learning_rate: float, num_train: int
) -> dict[str, np.ndarray]:
    """Train from one start at every strength; return training loss, κ and test accuracy, with a row per strength."""
    data, test = images.load("digits", None, seed)
    (x, y), (x_test, y_test) = (
        (jnp.asarray(part.pixels.reshape(len(part.labels), -1) / 255, jnp.float32), jnp.asarray(part.labels))
        for part in (data.some(num_train, seed), test)
    )
    graphdef, start = nnx.split(MLP((x.shape[1], 128, 128, images.NUM_CLASSES), rngs=nnx.Rngs(seed)), nnx.Param)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return cross_entropy(nnx.merge(graphdef, params)(batch[0]), batch[1]).mean()

    def kappa(params: Any, batch: Any) -> jax.Array:
        return relative_flatness(params["head"], nnx.merge(graphdef, params).features(batch[0]), batch[1])

    @functools.partial(jax.jit, static_argnames="num_steps")
    def run(strengths: jax.Array, start: Any, batch: Any, test: Any, num_steps: int) -> dict[str, jax.Array]:
        def of_strength(strength: jax.Array) -> dict[str, jax.Array]:
            tx = optax.chain(flat_reg(strength, kappa), optax.adam(learning_rate))

            def step(carry: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
                params, state = carry
                loss, grads = jax.value_and_grad(loss_fn)(params, batch)
                right = jnp.argmax(nnx.merge(graphdef, params)(test[0]), axis=1) == test[1]
                updates, state = tx.update(grads, state, params, batch=batch)
                measured = {"loss": loss, "kappa": optax.tree.get(state, "kappa"), "accuracy": jnp.mean(right)}
                return (optax.apply_updates(params, updates), state), measured

            return jax.lax.scan(step, (start, tx.init(start)), length=num_steps)[1]

        return jax.vmap(of_strength)(strengths)

    curves = run(strengths, start, (x, y), (x_test, y_test), num_steps)
    return {name: np.asarray(values, float) for name, values in curves.items()}


def at_loss(loss: np.ndarray, kappa: np.ndarray, level: float) -> float:
    """Return κ where the loss first falls to a level, interpolated between logarithms; NaN if it never does."""
    below = np.flatnonzero(loss <= level)
    if len(below) == 0 or below[0] == 0:
        return np.nan
    after = below[0]
    before = after - 1
    share = np.log(loss[before] / level) / np.log(loss[before] / loss[after])
    return float(kappa[before] ** (1 - share) * kappa[after] ** share)


def draw(folder: Path, strengths: tuple[float, ...], loss: np.ndarray, kappa: np.ndarray) -> None:
    """Draw κ against the loss, a curve per seed and a colour per strength: red is sharp, blue is flat.

    Losses above the initial ones are left out: they belong to runs that lost what they had learned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {strength: i for i, strength in enumerate(sorted(set(map(abs, strengths)) - {0.0}), start=1)}
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(figsize=(5.2, 3.8), layout="constrained", dpi=200)
        for i, strength in enumerate(strengths):
            shade = 0.35 + 0.6 * ranks.get(abs(strength), 0) / max(ranks.values(), default=1)
            colour = "black" if strength == 0 else plt.get_cmap("Reds" if strength < 0 else "Blues")(shade)
            for seed in range(len(loss)):
                label = f"λ = {strength:g}" if seed == 0 else None
                axes.plot(loss[seed, i], kappa[seed, i], color=colour, linewidth=0.8, alpha=0.8, label=label)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="cross-entropy of the training images",
            ylabel="κ of the head (larger is sharper)",
        )
        axes.set_xlim(1.1 * np.max(loss[:, :, 0]), np.min(loss) / 1.5)
        learned = loss <= np.max(loss[:, :, 0])
        axes.set_ylim(np.min(kappa[learned]) / 2, 2 * np.max(kappa[learned]))
        tidy(axes)
        axes.legend(frameon=False)
        figure.savefig(folder / "figure.png")
    plt.close(figure)


if __name__ == "__main__":
    tyro.cli(main)
