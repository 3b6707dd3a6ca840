"""Each regulariser adds the term that it is named after."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense_flatness, random_problem, softmax_cross_entropy

from harness.training.regularisers import REGULARISERS


@contextlib.contextmanager
def as_experiments_run():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", ["label_smoothing", "confidence_penalty", "kappa", "simplified_kappa"])
def test_the_objective_is_cross_entropy_with_the_term_that_is_named(name):
    problem, strength = random_problem(4, 3, (6,)), 0.3
    logits = problem.feats @ problem.weight.T + problem.bias
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    loss = -log_p[np.arange(6), problem.labels].mean()
    flatness = dense_flatness(softmax_cross_entropy, problem, weights=False)
    wanted = {
        "label_smoothing": (1 - strength) * loss - strength * log_p.mean(),
        "confidence_penalty": loss + strength * np.sum(np.exp(log_p) * log_p, axis=1).mean(),
        "kappa": loss + strength * flatness.kappa,
        "simplified_kappa": loss + strength * flatness.simplified,
    }[name]
    arrays = (problem.feats, problem.labels, strength)
    head = {name: jnp.asarray(value) for name, value in problem.params.items()}
    with as_experiments_run():
        got = REGULARISERS[name].objective(head, *map(jnp.asarray, arrays))
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
