"""Oracles in float64, and heads to measure.

Flatness by its definition, with none of the package's formulas; and, where that cancels, as in a collapsed head, from
sums of non-negative terms in NumPy, which the definition confirms where it does not.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import flatjax


def jit_as_usual(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled as users compile: with fusion emitters, without which a few roundings are others."""
    flag = "xla_cpu_use_fusion_emitters"
    return jax.jit(function, compiler_options={flag: True} if flag in os.environ["XLA_FLAGS"] else None)


# Losses of one sample, (logits (d,), label) -> scalar.


def softmax_cross_entropy(logits, label):
    """The label is a class, or weights of the classes."""
    targets = jax.nn.one_hot(label, len(logits), dtype=logits.dtype) if label.ndim == 0 else label
    return jnp.sum(targets * (jax.nn.logsumexp(logits) - logits))


def squared_error(logits, label):
    targets = jax.nn.one_hot(label, len(logits), dtype=logits.dtype) if label.ndim == 0 else label
    return 0.5 * jnp.sum((logits - targets) ** 2)


def sigmoid_cross_entropy(logits, label):
    targets = jax.nn.one_hot(label, len(logits), dtype=logits.dtype) if label.ndim == 0 else label
    return jnp.sum(jax.nn.softplus(logits) - targets * logits)


def focal(logits, label):
    """(1 − p_y)² · −log p_y: neither convex in the logits nor blind to the label."""
    log_p = jax.nn.log_softmax(logits)[label]
    return -(jnp.expm1(log_p) ** 2) * log_p


def pseudo_huber(logits, label):
    """Σ_s √(1 + (z_s − y_s)²), and a wave that couples the outputs."""
    return jnp.sum(jnp.sqrt(1 + (logits - label) ** 2)) + 0.3 * jnp.cos(jnp.sum(logits))


def tempered(logits, label):
    """Cross-entropy of logits / τ for a label (class, τ): a label whose size is not the number of outputs."""
    return softmax_cross_entropy(logits / label[1], label[0].astype(int))


def name_of(value: Any) -> str:
    """Of a parameter of a test: a function's without its address, which differs from process to process."""
    return getattr(value, "__name__", str(value))


NAMED = {f.__name__: f for f in (softmax_cross_entropy, squared_error, sigmoid_cross_entropy)}

# Heads.


class Problem(NamedTuple):
    """A head in its one-row-an-output layout, and its samples."""

    weight: np.ndarray
    bias: np.ndarray
    feats: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    @property
    def params(self) -> dict[str, np.ndarray]:
        return {"kernel": self.weight.T, "bias": self.bias}

    def astype(self, dtype: Any) -> "Problem":
        labels = self.labels if np.issubdtype(self.labels.dtype, np.integer) else self.labels.astype(dtype)
        weight, bias, feats, weights = (x.astype(dtype) for x in (self.weight, self.bias, self.feats, self.weights))
        return Problem(weight, bias, feats, labels, weights)


def random_problem(d: int, m: int, leading: tuple[int, ...], labels: str = "classes", seed: int = 0) -> Problem:
    """`labels` is "classes", "distribution" (sums to 1), "mass" (does not), "binary", "targets" or "tempered"."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, d, leading)
    match labels:
        case "classes":
            values = classes
        case "distribution":
            values = rng.dirichlet(np.ones(d), leading)
        case "mass":
            values = rng.uniform(0, 2, (*leading, d))
        case "binary":
            values = rng.integers(0, 2, (*leading, d)).astype(float)
        case "targets":
            values = rng.normal(size=(*leading, d))
        case "tempered":
            values = np.stack([classes, rng.uniform(0.5, 2, leading)], axis=-1)
    weights = rng.uniform(0.1, 2, leading)
    if weights.size > 1:
        weights.flat[weights.size // 2] = 0
    return Problem(rng.normal(size=(d, m)), rng.normal(size=d), rng.normal(size=(*leading, m)), values, weights)


def collapsed_problem(d: int, m: int, n: int, scale: float, seed: int = 0) -> Problem:
    """Nearly orthonormal rows, and features near `scale` times their row: logits ahead by about `scale`.

    All numbers are float32's, so that truth and measurement have the same input.
    """
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.normal(size=(max(d, m), max(d, m))))[0][:d, :m] + 0.003 * rng.normal(size=(d, m))
    classes = np.arange(n) % d
    feats = scale * (rows[classes] + 0.01 * rng.normal(size=(n, m)) / np.sqrt(m))
    problem = Problem(rows, 0.1 * rng.normal(size=d), feats, classes, np.ones(n))
    return problem.astype(np.float32)


# Flatness, by definition and as the package measures it.


class Flatness(NamedTuple):
    """κ, κ̂, κ_max and T."""

    kappa: Any
    simplified: Any
    maximal: Any
    traces: Any


def dense_flatness(loss: Callable, problem: Problem, *, bias: bool = True, weights: bool = True) -> Flatness:
    """From the Hessian (d, m, d, m) of the weighted mean loss in the rows of W, by autodiff in float64."""
    problem = problem.astype(np.float64)
    m = problem.weight.shape[1]
    feats = problem.feats.reshape(-1, m)
    labels = problem.labels.reshape(len(feats), *problem.labels.shape[problem.feats.ndim - 1 :])
    omega = problem.weights.reshape(-1) if weights else np.ones(len(feats))
    shift = problem.bias if bias else np.zeros_like(problem.bias)

    H = np.asarray(_dense_hessian(loss, problem.weight, shift, feats, labels, omega))
    W = problem.weight
    traces = np.einsum("sktk->st", H)
    return Flatness(
        kappa=np.sum((W @ W.T) * traces),
        simplified=np.sum(W**2) * np.trace(H.reshape(W.size, W.size)),
        maximal=sum(np.sum(w**2) * np.linalg.eigvalsh(H[s, :, s, :])[-1] for s, w in enumerate(W)),
        traces=traces,
    )


@functools.partial(jax.jit, static_argnums=0)
def _dense_hessian(loss, weight, bias, feats, labels, omega):
    def mean_loss(weight):
        losses = jax.vmap(lambda phi, label: loss(weight @ phi + bias, label))(feats, labels)
        return jnp.sum(omega * losses) / jnp.sum(omega)

    return jax.hessian(mean_loss)(weight)


def softmax_flatness_without_cancellation(problem: Problem) -> Flatness:
    """Softmax cross-entropy in float64, from sums of terms of one sign alone, so right to 1e-12 at any confidence."""
    weight, bias, feats, _, _ = problem.astype(np.float64)
    logits = feats @ weight.T + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rest = p @ (1 - np.eye(len(weight)))
    measure = np.sum(feats**2, axis=1) / len(feats)
    distances = np.sum((weight[:, None] - weight[None, :]) ** 2, axis=-1)
    squares = np.sum(weight**2, axis=1)
    diagonal = measure[:, None] * p * rest
    traces = -np.einsum("i,is,it->st", measure, p, p)
    np.fill_diagonal(traces, diagonal.sum(axis=0))

    def largest_eigenvalue(measure):
        # An eigensolver's error is relative to the largest entry, so bring that to 1.
        size = measure.max() or 1
        return size * np.linalg.eigvalsh((feats.T * (measure / size)) @ feats)[-1]

    shares = p * rest / len(feats)
    return Flatness(
        kappa=0.5 * np.einsum("i,is,it,st->", measure, p, p, distances, optimize=True),
        simplified=squares.sum() * diagonal.sum(),
        maximal=sum(square * largest_eigenvalue(share) for square, share in zip(squares, shares.T, strict=True)),
        traces=traces,
    )


def kappa_gradient_without_cancellation(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """∂κ of softmax cross-entropy by the weight, bias and features in float64, from differences of rows alone.

    With c = Σ_s p_s w_s, v = Σ_s p_s ‖w_s − c‖² and u_s = p_s (‖w_s − c‖² − v), a sample's part of κ = E ‖φ‖² v has
    ∂v/∂z = u, and ∂v/∂w_s at fixed p is 2 p_s (w_s − c).
    """
    weight, bias, feats, _, _ = problem.astype(np.float64)
    logits = feats @ weight.T + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    deviations = np.einsum("it,stk->isk", p, weight[:, None] - weight[None])
    squares = np.sum(deviations**2, axis=-1)
    variances = np.sum(p * squares, axis=1)
    u = p * (squares - variances[:, None])
    measure = np.sum(feats**2, axis=1)
    by_weight = np.einsum("i,is,ik->sk", measure, u, feats) + 2 * np.einsum("i,is,isk->sk", measure, p, deviations)
    by_feats = 2 * variances[:, None] * feats + measure[:, None] * (u @ weight)
    return by_weight / len(feats), measure @ u / len(feats), by_feats / len(feats)


@functools.partial(jax.jit, static_argnames="loss")
def measured_flatness(params, feats, labels, *, weights=None, loss="softmax_cross_entropy") -> Flatness:
    """The four public functions, compiled once a shape."""
    return Flatness(
        flatjax.relative_flatness(params, feats, labels, weights=weights, loss=loss),
        flatjax.simplified_relative_flatness(params, feats, labels, weights=weights, loss=loss),
        flatjax.max_relative_flatness(params, feats, labels, weights=weights, loss=loss),
        flatjax.row_block_traces(params, feats, labels, weights=weights, loss=loss),
    )


def measure(problem: Problem, loss: str | Callable = "softmax_cross_entropy") -> Flatness:
    return measured_flatness(problem.params, problem.feats, problem.labels, weights=problem.weights, loss=loss)


def assert_same_flatness(got: Flatness, want: Flatness, rtol: float) -> None:
    """Each entry to `rtol`, of itself or of the largest trace: an entry of T may be a sum that cancels."""
    atol = rtol * np.max(np.abs(want.traces))
    for name in Flatness._fields:
        assert np.all(np.isfinite(getattr(want, name))), name  # NumPy takes two NaN for equal.
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=rtol, atol=atol, err_msg=name)


@contextlib.contextmanager
def raises(error: type[Exception], match: str) -> Iterator[None]:
    """`pytest.raises` without jaxtyping's run-time checks: users do not have them, and they would speak before us."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=match):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
