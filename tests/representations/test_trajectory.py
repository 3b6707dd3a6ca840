"""Ways of tokens that are known: lines, right angles, exponential growth; and NumPy."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.representations import growth_variation, line_shape_score, spacing_variation

METRICS = (line_shape_score, spacing_variation, growth_variation)


def random_stream(dtype=np.float64):
    return np.random.default_rng(0).normal(size=(6, 2, 3, 5)).astype(dtype)


def test_the_score_of_a_line_is_1_and_of_steps_at_right_angles_the_root_of_their_number():
    line = np.arange(6.0)[:, None, None] ** 2 * np.random.default_rng(0).normal(size=(1, 4, 5)) + 3
    np.testing.assert_allclose(line_shape_score(line), np.ones(4), rtol=1e-13)
    corners = np.cumsum(np.eye(6)[:, None] * np.arange(1, 7), axis=0)
    np.testing.assert_allclose(line_shape_score(corners), np.sqrt(5), rtol=1e-13)


def test_equal_steps_do_not_vary_whatever_their_directions():
    directions = np.random.default_rng(0).normal(size=(5, 4, 3))
    steps = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    assert np.all(spacing_variation(np.cumsum(steps, axis=0)) < 1e-14)


def test_the_growth_of_a_size_that_doubles_does_not_vary():
    directions = np.random.default_rng(0).normal(size=(5, 4, 3))
    sizes = 2.0 ** np.arange(5)[:, None, None]
    assert np.all(growth_variation(sizes * directions / np.linalg.norm(directions, axis=-1, keepdims=True)) < 1e-13)


def test_the_metrics_are_those_of_numpy():
    stream = random_stream()
    steps = np.diff(stream, axis=0)
    lengths = np.linalg.norm(steps, axis=-1)
    straight = len(steps) / np.linalg.norm(np.sum(steps / lengths[..., None], axis=0), axis=-1)
    growth = np.diff(np.log(np.linalg.norm(stream, axis=-1)), axis=0)
    variations = [x.std(axis=0) / np.abs(x.mean(axis=0)) for x in (lengths, growth)]
    for metric, want in zip(METRICS, [straight, *variations], strict=True):
        np.testing.assert_allclose(jax.jit(metric)(stream), want, rtol=1e-11)
        np.testing.assert_allclose(jax.vmap(metric, in_axes=1)(stream), want, rtol=1e-11)


@pytest.mark.parametrize("metric", METRICS)
def test_bfloat16_is_computed_on_in_float32_and_gradients_are_finite(metric):
    stream = random_stream(jnp.bfloat16)
    got = metric(stream)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, metric(stream.astype(np.float64)), rtol=1e-4)
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(metric(x))))(random_stream())))


@pytest.mark.parametrize("metric", METRICS)
def test_a_bad_value_gives_no_number_for_its_token_alone(metric):
    stream = random_stream()
    stream[2, 1, 0, 3] = np.nan
    bad = np.isnan(metric(stream))
    np.testing.assert_array_equal(bad, [[False] * 3, [True, False, False]])


def test_a_step_of_no_length_has_no_direction():
    stream = random_stream()
    stream[3] = stream[2]
    assert np.all(np.isnan(line_shape_score(stream)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("stream", "error", "match"),
    [
        (np.ones((1, 2, 3)), ValueError, r"stream has shape \(1, 2, 3\)"),
        (np.ones(3), ValueError, r"stream has shape \(3,\)"),
        (np.ones((4, 2, 3), int), TypeError, "stream has dtype int64"),
    ],
)
def test_what_is_no_stream_is_refused(metric, stream, error, match):
    with helpers.raises(error, match):
        metric(stream)
