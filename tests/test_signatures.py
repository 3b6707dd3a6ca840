"""A signature can be read in a tooltip, and the names in it are checked at run time as what they stand for."""

import inspect

import jax.numpy as jnp
import jaxtyping
import pytest

import flatjax
from flatjax.training import confidence_penalty, label_smoothing

LONGEST = 900


FUNCTIONS = [value for name in dir(flatjax) if inspect.isfunction(value := getattr(flatjax, name))]
METHODS = [flatjax.ClassMoments.init, flatjax.ClassMoments.update]


@pytest.mark.parametrize("function", [*FUNCTIONS, *METHODS], ids=lambda function: function.__qualname__)
def test_a_signature_fits_a_tooltip(function):
    assert len(str(inspect.signature(function))) <= LONGEST


def test_arrays_of_samples_go_by_their_names():
    parameters = inspect.signature(flatjax.relative_flatness).parameters
    shown = {name: str(parameters[name].annotation) for name in ("feats", "labels", "loss")}
    assert shown == {"feats": "Features", "labels": "Labels", "loss": "Loss"}
    assert "Weights" in str(parameters["weights"].annotation)


def test_names_are_checked_at_run_time():
    logits = jnp.ones((2, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match="logits"):
        confidence_penalty(jnp.ones((2, 3), int))
    with pytest.raises(jaxtyping.TypeCheckError, match="labels"):
        label_smoothing(logits, jnp.ones(5, int), 0.1)
    assert label_smoothing(logits, jnp.ones(2, int), 0.1).shape == (2,)
