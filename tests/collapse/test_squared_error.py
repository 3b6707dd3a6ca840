"""The parts of a mean squared error, against the error itself and against the best head by least squares, in NumPy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.squared_error import central_path, least_squares_head, squared_error_decomposition

from .cases import simplex

decompose = jax.jit(squared_error_decomposition)


class Case(NamedTuple):
    """Weight (C, m), bias (C,), feats (n, m), labels (n,)."""

    weight: np.ndarray
    bias: np.ndarray
    feats: np.ndarray
    labels: np.ndarray

    @property
    def params(self):
        return {"kernel": self.weight.T, "bias": self.bias}

    @property
    def moments(self):
        """Means, covariance within the classes, and counts; means of empty classes are NaN."""
        counts = np.bincount(self.labels, minlength=len(self.weight))
        means = np.array([sum(self.feats[self.labels == c]) / n if n else self.feats[0] * np.nan
                          for c, n in enumerate(counts)])  # fmt: skip
        residuals = self.feats - means[self.labels]
        return means, residuals.T @ residuals / len(residuals), counts

    def cast(self, dtype):
        """What the decomposition takes."""
        means, covariance, counts = self.moments
        return (
            {k: v.astype(dtype) for k, v in self.params.items()},
            means.astype(dtype),
            covariance.astype(dtype),
            counts,
        )


def random_case(counts, num_features, spread=0.7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    centres = 1 + rng.normal(size=(len(counts), num_features))
    feats = centres[labels] + spread * rng.normal(size=(len(labels), num_features))
    return Case(rng.normal(size=centres.shape), rng.normal(size=len(counts)), feats, labels)


def best_head(case, weight_decay):
    """By least squares on the samples, with √λ I below them."""
    n, m = case.feats.shape
    rows = np.concatenate([np.c_[case.feats, np.ones(n)] / np.sqrt(n), np.sqrt(weight_decay) * np.eye(m + 1)])
    targets = np.zeros((len(rows), len(case.bias)))
    targets[np.arange(n), case.labels] = 1 / np.sqrt(n)
    solution = np.linalg.lstsq(rows, targets, rcond=1e-14)[0]
    return solution[:m].T, solution[m]


def squared_error(case, weight_decay):
    targets = np.eye(len(case.bias))[case.labels]
    errors = case.feats @ case.weight.T + case.bias - targets
    return (np.mean(np.sum(errors**2, axis=1)) + weight_decay * (np.sum(case.weight**2) + np.sum(case.bias**2))) / 2


def parts_by_samples(case, weight_decay):
    weight, bias = best_head(case, weight_decay)
    means, _, counts = case.moments
    spread = (case.feats - means[case.labels]) @ weight.T
    present = counts > 0
    at_means = (means @ weight.T + bias - np.eye(len(bias)))[present]
    nc1 = np.mean(np.sum(spread**2, axis=1)) + weight_decay * (np.sum(weight**2) + np.sum(bias**2))
    nc2_and_nc3 = (counts / counts.sum())[present] @ np.sum(at_means**2, axis=1)
    by, off = case.weight - weight, case.bias - bias
    perpendicular = np.mean(np.sum((case.feats @ by.T + off) ** 2, axis=1))
    return nc1 / 2, nc2_and_nc3 / 2, (perpendicular + weight_decay * (np.sum(by**2) + np.sum(off**2))) / 2


CASES = {
    "balanced": random_case((12, 12, 12, 12, 12), 7),
    "unbalanced": random_case((3, 19, 1, 12, 25), 7),
    "more classes than features": random_case((5, 9, 7, 8, 6, 4, 11), 3),
    "one feature": random_case((3, 6), 1),
    "a class without samples": random_case((8, 0, 14, 9), 5),
}
of_every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
of_every_decay = pytest.mark.parametrize("weight_decay", [0.0, 1e-3, 0.3])


@of_every_case
@of_every_decay
def test_the_three_parts_sum_to_the_mean_squared_error_and_the_decay_of_the_weights(case, weight_decay):
    total = decompose(*case.cast(float), weight_decay=weight_decay).total
    np.testing.assert_allclose(total, squared_error(case, weight_decay), rtol=3e-15)


@of_every_case
@of_every_decay
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-13), (np.float32, 5e-6)])
def test_each_part_is_what_the_best_head_by_least_squares_makes_of_the_samples(case, weight_decay, dtype, rtol):
    parts = decompose(*case.cast(dtype), weight_decay=weight_decay)
    assert parts.nc1.dtype == dtype
    np.testing.assert_allclose(parts, parts_by_samples(case, weight_decay), rtol=rtol)


@pytest.mark.parametrize("weight_decay", [1e-3, 0.3])
def test_for_classes_of_one_size_the_formulas_are_those_published(weight_decay):
    case = CASES["balanced"]
    means, within, _ = case.moments
    M, C, lam = means.T, len(means), weight_decay
    mean = M.mean(axis=1)
    total = within + (M - mean[:, None]) @ (M - mean[:, None]).T / C
    inverse = np.linalg.inv(total + lam / (1 + lam) * np.outer(mean, mean) + lam * np.eye(len(M)))
    weight = (M.T - np.ones((C, 1)) * mean / (1 + lam)) @ inverse / C
    bias = (1 / C - weight @ mean) / (1 + lam)
    delta = np.c_[case.weight - weight, case.bias - bias]
    A = np.block([[total + np.outer(mean, mean) + lam * np.eye(len(M)), mean[:, None]], [mean, 1 + lam]])
    wanted = (
        (np.trace(weight @ (within + lam * np.eye(len(M))) @ weight.T) + lam * bias @ bias) / 2,
        np.sum((weight @ M + bias[:, None] - np.eye(C)) ** 2) / (2 * C),
        np.trace(delta @ A @ delta.T) / 2,
    )
    np.testing.assert_allclose(decompose(*case.cast(float), weight_decay=lam), wanted, rtol=1e-12)
    head = least_squares_head(*case.cast(float)[1:], weight_decay=lam)
    np.testing.assert_allclose(head["kernel"].T, weight, rtol=1e-10)
    np.testing.assert_allclose(head["bias"], bias, rtol=1e-10)


@of_every_decay
def test_the_best_head_loses_nothing_beside_itself_and_any_other_does(weight_decay):
    case = CASES["unbalanced"]
    _, *moments = case.cast(float)
    best = least_squares_head(*moments, weight_decay=weight_decay)
    on_path = decompose(best, *moments, weight_decay=weight_decay)
    assert on_path.perpendicular < 1e-28
    off_path = decompose({**best, "bias": best["bias"] + 1e-6}, *moments, weight_decay=weight_decay)
    # ½(1 + λ)‖Δ_b‖² of five outputs
    np.testing.assert_allclose(off_path.perpendicular, 2.5e-12 * (1 + weight_decay), rtol=1e-8)
    assert on_path[:2] == off_path[:2]


@pytest.mark.parametrize("counts", [(5, 5, 5), (3, 1, 8, 2)], ids=str)
def test_with_fewer_samples_than_features_and_no_decay_the_best_head_is_right_at_every_sample(counts):
    """Σ_W has no inverse, and infinitely many heads are best: its norm is nearly the least of all that are."""
    case = random_case(counts, 30)
    _, *moments = case.cast(float)
    parts = decompose(case.params, *moments)
    assert max(parts.nc1, parts.nc2_and_nc3) < 1e-14
    np.testing.assert_allclose(parts.total, squared_error(case, 0), rtol=1e-14)
    head, (weight, _) = least_squares_head(*moments), best_head(case, 0)
    centred = case.feats - case.feats.mean(axis=0)
    np.testing.assert_allclose(head["kernel"].T @ centred.T, weight @ centred.T, atol=2e-8)
    of_least_norm = np.linalg.lstsq(centred, np.eye(len(counts))[case.labels], rcond=1e-12)[0]
    assert 1 - 1e-9 < np.linalg.norm(head["kernel"]) / np.linalg.norm(of_least_norm) < 1.01


@of_every_decay
def test_features_that_are_always_zero_change_nothing(weight_decay):
    case = CASES["unbalanced"]
    dead = case._replace(weight=np.pad(case.weight, ((0, 0), (0, 3))), feats=np.pad(case.feats, ((0, 0), (0, 3))))
    got = decompose(*dead.cast(float), weight_decay=weight_decay)
    np.testing.assert_allclose(got, decompose(*case.cast(float), weight_decay=weight_decay), rtol=1e-13)
    assert not np.any(least_squares_head(*dead.cast(float)[1:], weight_decay=weight_decay)["kernel"][7:])


@pytest.mark.parametrize("name", ["unbalanced", "more classes than features"])
@pytest.mark.parametrize(("spread", "rtol"), [(1e-3, 1e-5), (1e-6, 2e-2)])
def test_in_float32_collapsed_features_leave_the_digits_that_the_moments_have(name, spread, rtol):
    """Variances of 1e-6 and 1e-12 of the squared distances: nc1 falls as they do, where 1 has 1e-7 digits."""
    counts, m = {"unbalanced": ((3, 19, 1, 12, 25), 7), "more classes than features": ((5, 9, 7, 8, 6, 4, 11), 3)}[name]
    case = random_case(counts, m, spread)
    got, wanted = decompose(*case.cast(np.float32)), parts_by_samples(case, 0)
    assert wanted[0] < 10 * spread**2
    np.testing.assert_allclose(got.nc1, wanted[0], rtol=rtol)
    np.testing.assert_allclose(got.nc2_and_nc3, wanted[1], rtol=1e-2, atol=1e-13)
    np.testing.assert_allclose(got.total, squared_error(case, 0), rtol=1e-6)


def test_an_exactly_collapsed_frame_costs_only_what_the_decay_makes_it():
    means, within, counts = simplex(4, 5), np.zeros((5, 5)), np.full(4, 6)
    head = {"kernel": np.zeros((5, 4))}
    assert max(decompose(head, means, within, counts)[:2]) < 1e-30
    lam = 0.01
    # Σ_T = I/4 on the three dimensions of the frame: W_LS = ¼M̄ᵀ/(¼ + λ), b_LS = 1/(4(1 + λ)).
    gain = 0.25 / (0.25 + lam)
    parts = decompose(head, means, within, counts, weight_decay=lam)
    np.testing.assert_allclose(parts.nc1, lam * (3 * gain**2 + 4 / (4 * (1 + lam)) ** 2) / 2, rtol=1e-13)
    off = 1 / (1 + lam) - 1
    np.testing.assert_allclose(parts.nc2_and_nc3, (3 * (1 - gain) ** 2 + off**2) / 8, rtol=1e-13)


@jax.jit
def parts_of(arguments, counts, weight_decay):
    return jnp.stack(squared_error_decomposition(*arguments, counts, weight_decay=weight_decay))


derivatives = jax.jit(jax.jacrev(parts_of))


@of_every_case
@of_every_decay
def test_the_gradient_is_that_of_finite_differences(case, weight_decay):
    *arguments, counts = case.cast(float)
    arguments[1] = np.nan_to_num(arguments[1])
    rng = np.random.default_rng(0)
    head, of_means, root = jax.tree.map(lambda x: rng.normal(size=x.shape), arguments)
    along = head, of_means, root @ root.T

    def at(step):
        moved = jax.tree.map(lambda x, v: x + step * v, tuple(arguments), along)
        return np.asarray(parts_of(moved, counts, weight_decay))

    gradients = derivatives(tuple(arguments), counts, weight_decay)
    got = sum(
        np.asarray(gradient).reshape(3, -1) @ direction.ravel()
        for gradient, direction in zip(jax.tree.leaves(gradients), jax.tree.leaves(along), strict=True)
    )
    step = 1e-4
    wanted = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    np.testing.assert_allclose(got, wanted, rtol=2e-8, atol=1e-9)


def test_derivatives_of_first_and_second_order_are_finite_and_right_at_exact_collapse():
    """Where all singular values are one, and nothing is within the classes."""
    means, within, counts = simplex(4, 5), np.zeros((5, 5)), np.full(4, 6)
    head = {"kernel": np.ones((5, 4))}

    def least(scale, weight_decay):
        return sum(squared_error_decomposition(head, means * scale, within, counts, weight_decay=weight_decay)[:2])

    gradients = derivatives((head, means, within), counts, 0.0)
    assert all(np.all(np.isfinite(each)) for each in jax.tree.leaves(gradients))
    # Of the loss ⅜·λ/(s²/4 + λ), and what does not depend on s.
    second = jax.jit(jax.grad(jax.grad(least)))
    assert abs(second(1.0, 0.0)) < 1e-12
    a = 0.25 + 0.3
    np.testing.assert_allclose(second(1.0, 0.3), 0.375 * 0.3 * (0.5 / a**3 - 0.5 / a**2), rtol=1e-12)


def test_of_a_stream_of_weighted_batches_every_sample_counts_by_its_weight():
    """A weight of 3 is three samples; the class of one sample counts, and so does the one of none."""
    case = CASES["a class without samples"]
    weights = np.random.default_rng(1).integers(0, 4, len(case.labels)).astype(float)
    moments, update = ClassMoments.init(4, 5, covariance=True, dtype=np.float64), jax.jit(ClassMoments.update)
    for start in range(0, len(weights), 8):
        batch = slice(start, start + 8)
        moments = update(moments, case.feats[batch], case.labels[batch], weights[batch])
    times = weights.astype(int)
    repeated = case._replace(feats=np.repeat(case.feats, times, axis=0), labels=np.repeat(case.labels, times))
    for weight_decay in (0.0, 0.3):
        got = jax.jit(central_path)(moments, case.params, weight_decay=weight_decay)
        np.testing.assert_allclose(got, parts_by_samples(repeated, weight_decay), rtol=1e-12)
        np.testing.assert_allclose(got.total, squared_error(repeated, weight_decay), rtol=3e-15)


def test_it_is_the_same_under_vmap_and_on_sharded_classes():
    case = random_case((7, 9, 8, 3, 6, 5, 4, 9), 5)
    params, means, within, counts = case.cast(float)
    wanted = decompose(params, means, within, counts, weight_decay=0.1)
    both = jax.vmap(functools.partial(squared_error_decomposition, params), in_axes=(0, None, None))(
        np.stack([means, 2 * means]), within, counts
    )
    np.testing.assert_allclose(both.nc1[1], decompose(params, 2 * means, within, counts).nc1, rtol=1e-12)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("class",), axis_types=(kind,))
        sharded = jax.device_put(means, NamedSharding(mesh, PartitionSpec("class")))
        got = jax.jit(squared_error_decomposition)(params, sharded, within, counts, weight_decay=0.1)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        by_name = {"means": sharded, "within_covariance": within, "masses": counts}
        got = jax.jit(squared_error_decomposition)(params, **by_name, weight_decay=0.1)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_a_head_in_bfloat16_is_measured_as_it_is():
    case = CASES["unbalanced"]
    params, *moments = case.cast(np.float32)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = decompose(rounded, *moments)
    wanted = decompose(jax.tree.map(lambda x: x.astype(np.float32), rounded), *moments)
    assert got.total.dtype == jnp.float32
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda params, means, within, counts: (params, means, within, counts * np.array([1, 1, -1, 1, 1])),
        lambda params, means, within, counts: (params, means, -within, counts),
        lambda params, means, within, counts: (params, means, within * np.nan, counts),
        lambda params, means, within, counts: (params, means + np.eye(5, 7) * np.nan, within, counts),
        lambda params, means, within, counts: (params, means, within, 0 * counts),
    ],
    ids=["a negative count", "no covariance", "NaN covariance", "NaN mean", "no samples"],
)
def test_moments_that_are_none_leave_no_part_that_looks_like_one(change):
    assert np.all(np.isnan(decompose(*change(*CASES["unbalanced"].cast(float)))))


@pytest.mark.parametrize("weight_decay", [-1e-3, -2.0])
def test_a_negative_decay_leaves_no_part_that_looks_like_one(weight_decay):
    params, means, within, counts = CASES["unbalanced"].cast(float)
    # Wide enough for Σ_W + λI to be a covariance.
    moments = means, within + 5 * np.eye(7), counts
    assert np.all(np.isnan(decompose(params, *moments, weight_decay=weight_decay)))
    head = least_squares_head(*moments, weight_decay=weight_decay)
    assert all(np.all(np.isnan(x)) for x in head.values())


def test_a_diverged_head_leaves_nothing_that_looks_like_a_loss():
    params, *moments = CASES["unbalanced"].cast(float)
    diverged = decompose({**params, "bias": params["bias"] * np.nan}, *moments)
    assert np.isnan(diverged.perpendicular)
    assert np.isnan(diverged.total)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": np.zeros((5, 6))}, r"within_covariance has shape \(7, 7\), wanted \(6, 6\), as means"),
        ({"masses": np.zeros(4)}, r"masses has shape \(4,\), wanted \(5,\)"),
        ({"means": np.zeros((4, 7)), "masses": np.ones(4)}, r"means has shape \(4, 7\), .* head takes 7 features to 5"),
        ({"means": np.zeros(7)}, r"means has shape \(7,\), wanted \(classes, features\)"),
        ({"weight_decay": np.zeros(2)}, r"weight_decay has shape \(2,\), wanted \(\)"),
    ],
    ids=["features", "masses", "classes", "axes", "decay"],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(changes, message):
    params, means, within, counts = CASES["unbalanced"].cast(float)
    with raises(ValueError, message):
        squared_error_decomposition(
            params, **({"means": means, "within_covariance": within, "masses": counts} | changes)
        )


def test_whole_numbers_are_no_means():
    params, _, within, counts = CASES["unbalanced"].cast(float)
    with raises(TypeError, "means has dtype int64, wanted a floating dtype"):
        squared_error_decomposition(params, np.zeros((5, 7), int), within, counts)
