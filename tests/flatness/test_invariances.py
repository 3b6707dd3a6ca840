"""What flatness does not notice, and what its variants do."""

import functools

import helpers
import jax
import numpy as np
import pytest

import flatjax

LOSSES = [*helpers.NAMED, helpers.focal]
# Softmax over the pairs of few rows, and around the largest logit of many.
SHAPES = [(3, 5, (9,)), (6, 4, (5,))]

either_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
any_loss = pytest.mark.parametrize("loss", LOSSES)
either_shape_or_any_loss = pytest.mark.parametrize(
    ("shape", "loss"), [(SHAPES[1], LOSSES[0]), *((SHAPES[0], loss) for loss in LOSSES)], ids=helpers.name_of
)


def orthogonal(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))[0]


@either_shape
def test_kappa_is_invariant_to_a_common_shift_of_the_rows(shape):
    problem = helpers.random_problem(*shape)
    shift = 3 * np.random.default_rng(1).normal(size=(1, shape[1]))
    want, got = helpers.measure(problem), helpers.measure(problem._replace(weight=problem.weight + shift))
    np.testing.assert_allclose(got.kappa, want.kappa, rtol=1e-12)
    np.testing.assert_allclose(got.traces, want.traces, rtol=1e-12, atol=1e-13)
    assert got.simplified > 1.5 * want.simplified
    assert got.maximal > 1.5 * want.maximal


@either_shape_or_any_loss
def test_every_variant_is_invariant_to_features_scaled_up_and_weights_down(shape, loss):
    problem = helpers.random_problem(*shape)
    scaled = problem._replace(weight=problem.weight / 7.3, feats=7.3 * problem.feats)
    want, got = helpers.measure(problem, loss), helpers.measure(scaled, loss)
    helpers.assert_same_flatness(got, want._replace(traces=7.3**2 * np.asarray(want.traces)), rtol=1e-13)


@either_shape_or_any_loss
def test_every_variant_is_invariant_to_a_rotation_of_the_feature_space(shape, loss):
    problem = helpers.random_problem(*shape)
    rotation = orthogonal(shape[1])
    rotated = problem._replace(weight=problem.weight @ rotation, feats=problem.feats @ rotation)
    helpers.assert_same_flatness(helpers.measure(rotated, loss), helpers.measure(problem, loss), rtol=1e-13)


@any_loss
def test_the_order_of_the_samples_does_not_matter(loss):
    problem = helpers.random_problem(*SHAPES[0])
    order = np.random.default_rng(1).permutation(9)
    permuted = problem._replace(
        feats=problem.feats[order], labels=problem.labels[order], weights=problem.weights[order]
    )
    helpers.assert_same_flatness(helpers.measure(permuted, loss), helpers.measure(problem, loss), rtol=1e-14)


@either_shape_or_any_loss
def test_the_order_of_the_outputs_permutes_the_traces_alone(shape, loss):
    problem = helpers.random_problem(*shape)
    order = np.random.default_rng(1).permutation(shape[0])
    permuted = problem._replace(
        weight=problem.weight[order], bias=problem.bias[order], labels=np.argsort(order)[problem.labels]
    )
    want = helpers.measure(problem, loss)
    want = want._replace(traces=np.asarray(want.traces)[np.ix_(order, order)])
    helpers.assert_same_flatness(helpers.measure(permuted, loss), want, rtol=1e-13)


@any_loss
def test_a_data_sets_flatness_is_the_weighted_mean_of_its_batches(loss):
    problem = helpers.random_problem(3, 5, (3, 9))
    want = helpers.measure(problem, loss)
    batches = [
        helpers.measure(problem._replace(feats=feats, labels=labels, weights=weights), loss)
        for feats, labels, weights in zip(problem.feats, problem.labels, problem.weights, strict=True)
    ]
    masses = problem.weights.sum(axis=1)
    mean = helpers.Flatness(*(np.average(np.stack(values), axis=0, weights=masses) for values in zip(*batches)))  # noqa: B905
    # Not κ_max: the largest eigenvalue is convex, so that a mean of Hessians has at most the mean one.
    assert want.maximal <= mean.maximal
    helpers.assert_same_flatness(mean._replace(maximal=want.maximal), want, rtol=1e-13)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", helpers.focal])
def test_a_sample_twice_is_a_sample_of_twice_the_weight(loss):
    problem = helpers.random_problem(*SHAPES[0])
    # In the place of padding, for a batch of the same size.
    again = np.where(problem.weights == 0, 2, np.arange(9))
    repeated = problem._replace(
        feats=problem.feats[again], labels=problem.labels[again], weights=problem.weights[again]
    )
    heavier = problem._replace(weights=problem.weights * (1 + (np.arange(9) == 2)))
    helpers.assert_same_flatness(helpers.measure(repeated, loss), helpers.measure(heavier, loss), rtol=1e-14)


@functools.partial(jax.jit, static_argnames="loss")
def gradients(params, feats, labels, weights, loss):
    def total(params, feats):
        kappa = flatjax.relative_flatness(params, feats, labels, weights=weights, loss=loss)
        return kappa + flatjax.simplified_relative_flatness(params, feats, labels, weights=weights, loss=loss)

    return jax.grad(total, argnums=(0, 1))(params, feats)


PADDED = [
    ("softmax_cross_entropy", "classes", -7),
    ("softmax_cross_entropy", "distribution", np.nan),
    ("squared_error", "distribution", np.inf),
    ("sigmoid_cross_entropy", "classes", 3),
    (helpers.focal, "classes", 10**6),
    (helpers.tempered, "tempered", np.nan),
]


@pytest.mark.parametrize(("loss", "labels", "junk"), PADDED)
def test_padding_counts_nowhere_whatever_it_holds(loss, labels, junk):
    problem = helpers.random_problem(3, 5, (9,), labels)
    padding = problem.weights == 0
    junked = problem._replace(feats=problem.feats.copy(), labels=problem.labels.copy())
    junked.feats[padding] = [np.nan, np.inf, -np.inf, 1e200, 0]
    junked.labels[padding] = junk
    helpers.assert_same_flatness(helpers.measure(junked, loss), helpers.measure(problem, loss), rtol=1e-14)

    got, want = (gradients(p.params, p.feats, p.labels, p.weights, loss) for p in (junked, problem))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-14)
    assert np.all(got[1][padding] == 0)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", helpers.focal])
def test_a_sample_of_weight_zero_is_no_sample(loss):
    problem = helpers.random_problem(*SHAPES[0])
    kept = problem.weights != 0
    without = problem._replace(feats=problem.feats[kept], labels=problem.labels[kept], weights=problem.weights[kept])
    helpers.assert_same_flatness(helpers.measure(without, loss), helpers.measure(problem, loss), rtol=1e-14)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("shape", "loss"), [(SHAPES[1], LOSSES[0]), *((SHAPES[0], loss) for loss in helpers.NAMED)], ids=helpers.name_of
)
def test_kappa_and_kappa_max_are_at_most_the_simplified_measure_of_a_convex_loss(shape, loss, seed):
    got = helpers.measure(helpers.random_problem(*shape, seed=seed), loss)
    assert 0 <= got.kappa <= got.simplified
    assert 0 <= got.maximal <= got.simplified


def test_kappa_is_negative_where_the_loss_curves_down():
    # At p_y = .03 the focal loss is concave along the rows' common direction e_y − e_s.
    rows, feats = np.zeros((3, 5)), np.zeros((9, 5))
    rows[:2, 0], feats[:, 0] = [1, -1], -1.7
    problem = helpers.Problem(rows, np.array([0.0, 0, -50]), feats, np.zeros(9, int), np.ones(9))
    got, want = helpers.measure(problem, helpers.focal), helpers.dense_flatness(helpers.focal, problem)
    assert want.kappa < -0.1
    helpers.assert_same_flatness(got, want, rtol=1e-13)


@either_shape_or_any_loss
def test_kappa_and_its_simplification_follow_from_the_traces(shape, loss):
    problem = helpers.random_problem(*shape)
    got = helpers.measure(problem, loss)
    np.testing.assert_allclose(got.kappa, np.sum((problem.weight @ problem.weight.T) * got.traces), rtol=1e-12)
    np.testing.assert_allclose(got.simplified, np.sum(problem.weight**2) * np.trace(got.traces), rtol=1e-14)
    np.testing.assert_allclose(got.traces, got.traces.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "loss"), [(SHAPES[1], LOSSES[0]), (SHAPES[0], LOSSES[0]), (SHAPES[0], helpers.focal)], ids=helpers.name_of
)
def test_traces_sum_to_zero_over_a_row_where_the_loss_sees_differences_of_logits_alone(shape, loss):
    traces = np.asarray(helpers.measure(helpers.random_problem(*shape), loss).traces)
    assert np.max(np.abs(np.sum(traces, axis=1))) < 1e-14
    assert np.max(np.abs(traces)) > 0.1
