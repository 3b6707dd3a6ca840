"""Results print as a table, and export as what strict JSON takes."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatjax
from flatjax.core import results
from flatjax.curvature.estimate import Estimate

FEATS = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), "float32")
LABELS = jnp.arange(8) % 2
HEAD = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), "float32")}
MOMENTS = flatjax.ClassMoments.init(2, 3).update(FEATS, LABELS)
BLOCKS = [lambda x: x + x**2, lambda x: x + jnp.tanh(x)]
KEY = jax.random.key(0)
STREAM = jnp.ones((2, 1, 4, 3), "float32")

RESULTS = {
    "neural_collapse": lambda: flatjax.neural_collapse(HEAD, FEATS, LABELS),
    "collapse_report": lambda: flatjax.collapse_report(MOMENTS),
    "logit_sharpness": lambda: flatjax.logit_sharpness(FEATS, LABELS),
    "representation_geometry": lambda: flatjax.representation_geometry(FEATS),
    "residual_jacobians": lambda: flatjax.residual_jacobians(BLOCKS, STREAM, 1),
    "feature_robustness": lambda: flatjax.feature_robustness(HEAD, FEATS, LABELS, 0.1, KEY, num_samples=2),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_a_table_and_plain_numbers(name):
    result = RESULTS[name]()
    exported = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert list(exported) == list(result._fields)
    assert [line.split()[0] for line in str(result).splitlines()] == list(result._fields)
    for field, value in exported.items():
        want = getattr(result, field)
        got = np.nan if value is None and want is not None else value
        if want is not None:
            np.testing.assert_array_equal(np.asarray(got, np.asarray(want).dtype), want)
    assert repr(result).startswith(f"{type(result).__name__}(")
    assert jax.tree.structure(type(result)(*result)) == jax.tree.structure(result)


def test_what_json_has_no_number_for_is_null_or_a_text():
    numbers = Estimate(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.5]), jnp.array(jnp.nan), jnp.array(3))
    assert numbers.to_dict() == {"value": [None, "inf", "-inf", 1.5], "standard_error": None, "num_probes": 3}
    assert float(numbers.to_dict()["value"][1]) == np.inf


class Flags(NamedTuple):
    is_small: jax.Array
    half: jax.Array
    wide: jax.Array
    tree: dict

    to_dict = results.to_dict
    __str__ = results.to_table

    @property
    def double(self):
        return 2 * self.half


FLAGS = Flags(jnp.array(True), jnp.asarray(0.5, "bfloat16"), jnp.arange(12.0).reshape(3, 4), {"a": {"b": 1}, "c": None})


def test_every_kind_of_value_is_shown_and_exported():
    assert str(FLAGS).splitlines() == [
        "is_small  True",
        "half      0.5",
        "wide      3×4 numbers, 0 to 11",
        "tree      a b 1, c none",
        "double    1",
    ]
    exported = FLAGS.to_dict()
    assert exported["is_small"] is True
    assert exported["tree"] == {"a": {"b": 1}, "c": None}
    assert exported["double"] == 1.0


def test_what_a_result_says_besides_its_fields_is_exported_too():
    decisions = flatjax.collapse.nc4(MOMENTS, HEAD, FEATS, LABELS)
    assert decisions.to_dict()["share"] == float(decisions.share)


def test_printing_inside_jit_shows_shapes_and_exporting_is_refused():
    seen = []

    @jax.jit
    def traced(feats):
        sharpness = flatjax.logit_sharpness(feats, LABELS)
        seen.append(f"{sharpness}")
        with pytest.raises(TypeError, match=r"holds float32\[\], no number yet"):
            sharpness.to_dict()
        return sharpness

    traced(FEATS)
    assert seen == ["rise      float32[]\nloss      float32[]\nrelative  float32[]"]


def test_columns_of_a_table_are_as_wide_as_their_cells():
    assert results.table([("a", 1.25), ("long", None)], header=("name", "x")).splitlines() == [
        "name  x",
        "a     1.25",
        "long  none",
    ]
