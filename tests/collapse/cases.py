"""Labelled features and heads to measure, and how two measurements are compared.

Nearly all cases are of the shapes below, and most of `MANY_CLASSES` and `FEW_CLASSES`: compiling takes most of the time
of a test, and every shape is compiled anew.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatjax import ClassMoments, NeuralCollapse, neural_collapse

from . import oracle

METRICS = tuple(name for name in NeuralCollapse.__annotations__ if not name.startswith("num_"))
COUNTS = ("num_classes_kept", "num_classes_empty", "num_classes_single")

# Samples of each class, and features.
MANY_CLASSES = (5, 4, 6, 5, 4, 6), 4
FEW_CLASSES = (6, 5, 7, 6), 9
FILLED = (6, 4, 6, 7, 7), 4  # one class more than features
TWO_CLASSES = (13, 11), 3
ONE_FEATURE = (6, 5, 7, 6), 1
SHAPES = {"more classes than features": MANY_CLASSES, "fewer classes than features": FEW_CLASSES}


class Case(NamedTuple):
    """What `neural_collapse` takes, with kernel (m, C) and feats (n, m)."""

    kernel: np.ndarray
    bias: np.ndarray
    feats: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    @property
    def params(self) -> dict[str, np.ndarray]:
        return {"kernel": self.kernel, "bias": self.bias}

    def astype(self, dtype: str) -> "Case":
        """The same in `dtype`, but for the labels."""
        return self._replace(**{name: getattr(self, name).astype(dtype) for name in FLOATING})


FLOATING = ("kernel", "bias", "feats", "weights")


def random_case(counts: Sequence[int], num_features: int, *, spread: float = 0.4, seed: int = 0) -> Case:
    """Gaussian classes of `counts` samples around Gaussian means, in random order, with weights and a Gaussian head."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(counts), num_features))
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return Case(
        kernel=rng.normal(size=(num_features, len(counts))),
        bias=rng.normal(size=len(counts)),
        feats=means[labels] + spread * rng.normal(size=(len(labels), num_features)),
        labels=labels,
        weights=rng.uniform(0.5, 2, len(labels)),
    )


def collapsed_case(means: np.ndarray, counts: Sequence[int]) -> Case:
    """Features that are their class means (C, m), and the head of the same rows."""
    labels = np.repeat(np.arange(len(means)), counts)
    return Case(means.T.copy(), np.zeros(len(means)), means[labels], labels, np.ones(len(labels)))


def simplex(num_classes: int, num_features: int) -> np.ndarray:
    """An equiangular tight frame (C, m) of C ≤ m + 1 vectors, in some orientation."""
    # The corners of the standard simplex, in a basis of what is orthogonal to 1.
    corners = np.linalg.eigh(np.eye(num_classes) - 1 / num_classes)[1][:, 1:]
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(num_features, num_features)))[0]
    return corners @ directions[: num_classes - 1]


def measure(case: Case) -> NeuralCollapse:
    return neural_collapse(case.params, case.feats, case.labels, num_classes=len(case.bias), weights=case.weights)


def expected(case: Case) -> Mapping[str, float]:
    return oracle.neural_collapse(*case)


def metrics_of(case: Case) -> Callable[..., dict[str, jax.Array]]:
    """The metrics of `case` by name as a function of kernel, bias and feats."""

    def metrics(kernel: jax.Array, bias: jax.Array, feats: jax.Array) -> dict[str, jax.Array]:
        record = measure(case._replace(kernel=kernel, bias=bias, feats=feats))
        return {name: getattr(record, name) for name in METRICS}

    return metrics


@jax.jit
def gradients(case: Case) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Of every metric, with respect to kernel, bias and feats."""
    return jax.jacrev(metrics_of(case), argnums=(0, 1, 2))(*case[:3])


def assert_close(
    actual: NeuralCollapse,
    wanted: NeuralCollapse | Mapping[str, float],
    *,
    rtol: float,
    atol: float,
    names: Collection[str] = METRICS + COUNTS,
) -> None:
    for name in names:
        value = wanted[name] if isinstance(wanted, Mapping) else getattr(wanted, name)
        np.testing.assert_allclose(getattr(actual, name), value, rtol=rtol, atol=atol, err_msg=name)


def moments_of(feats, labels, weights, num_classes, **options) -> ClassMoments:
    """Of one batch, in the dtype of `feats`."""
    empty = ClassMoments.init(num_classes, feats.shape[1], dtype=jnp.asarray(feats).dtype, **options)
    return empty.update(feats, labels, weights)
