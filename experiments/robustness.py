"""Check that flatness in weights is robustness in features: the loss under perturbed features against κ, for many δ.

    python experiments/robustness.py    # half a minute on 2 cores

Trains a perceptron on handwritten digits, then perturbs all features of its head by random matrices of size δ, from
1e-4 to 3. Prints the ratio of the rise to what κ says it is, with its standard error; writes
`runs/robustness/figure.png` and `record.json`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import trange

from flatjax import cross_entropy, feature_robustness, relative_flatness
from flatjax.models import MLP
from flatjax.run.records import write_record
from harness.results.style import plt, tidy


def main(num_steps: int = 300, num_samples: int = 256, seed: int = 0, folder: Path = Path("runs/robustness")) -> None:
    """Compare E_F(δ) with κ δ²/2m for orthogonal matrices, and with κ δ²/2 for normal ones.

    Args:
        num_steps: steps of training, by Adam on all the data.
        num_samples: number of random matrices for each δ, each taken with both signs.
        seed: seed of the network and the matrices.
        folder: folder for the figure and the record.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(np.asarray(images) / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    model = MLP((64, 128, 32, 10), rngs=nnx.Rngs(seed))
    loss = train(model, x, y, num_steps)
    head, feats = nnx.state(model.head), model.features(x)
    kappa = float(relative_flatness(head, feats, y))
    print(f"cross-entropy {loss:.4f}, κ {kappa:.4f} (larger is sharper)")

    deltas = np.logspace(-4, 0.5, 10)
    scales = {"orthogonal": 2 * feats.shape[1], "normal": 2}
    measure = jax.jit(feature_robustness, static_argnames=("distribution", "num_samples"))
    rows = []
    for distribution, scale in scales.items():
        for i, delta in enumerate(deltas):
            key = jax.random.fold_in(jax.random.key(seed), i)
            options = {"delta": delta, "key": key, "distribution": distribution, "num_samples": num_samples}
            value, error, _ = measure(head, feats, y, **options)
            ratio, error = (float(each * scale / (delta**2 * kappa)) for each in (value, error))
            print(f"{distribution:10}  δ = {delta:7.4f}  rise / (κ δ²/{scale}) = {ratio:.4f} ± {error:.4f}")
            rows.append({"distribution": distribution, "delta": delta, "ratio": ratio, "standard_error": error})
    write_record(folder / "record.json", [{"kappa": kappa, "cross_entropy": loss}, *rows])
    draw(folder / "figure.png", rows, scales)
    print(f"the figure is {folder / 'figure.png'}")


def train(model: MLP, x: jax.Array, y: jax.Array, num_steps: int) -> float:
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss_fn(model: MLP) -> jax.Array:
        return cross_entropy(model(x), y).mean()

    @nnx.jit
    def step(model: MLP, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradient = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradient)
        return loss

    for _ in trange(num_steps, desc="training", leave=False, disable=None):
        step(model, optimizer)
    return float(loss_fn(model))


def draw(path: Path, rows: list[dict], scales: dict[str, int]) -> None:
    """Draw the ratio against δ, with a curve for each kind of matrix."""
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained", dpi=200)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        for i, (distribution, scale) in enumerate(scales.items()):
            chosen = [row for row in rows if row["distribution"] == distribution]
            axes.errorbar(
                [row["delta"] * (1 + 0.03 * i) for row in chosen],
                [row["ratio"] for row in chosen],
                yerr=[2 * row["standard_error"] for row in chosen],
                marker="o", markersize=3, linewidth=1.2, capsize=2,
                label=f"{distribution} A: over κ δ²/{scale}",
            )  # fmt: skip
        axes.set(
            xscale="log",
            xlabel="δ, the size of the change of the features",
            ylabel="rise of the loss over what κ says (1 is as κ says)",
        )
        tidy(axes)
        axes.legend(frameon=False, title="± 2 standard errors")
        figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    tyro.cli(main)
