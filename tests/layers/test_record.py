"""What a profile prints, and what it exports."""

import json

import jax.numpy as jnp
import pytest

from flatjax.curvature.estimate import Estimate, exactly
from flatjax.layers.record import FlatnessProfile


def profile():
    estimates = {
        "blocks/kernel[0]": Estimate(jnp.asarray(2.0), jnp.asarray(0.5), jnp.asarray(16)),
        "blocks/kernel[1]": Estimate(jnp.asarray(3.0), jnp.asarray(0.25), jnp.asarray(16)),
        "head/kernel": exactly(jnp.asarray(7.0)),
        "lost/kernel": exactly(jnp.asarray(jnp.nan)),
    }
    return FlatnessProfile(estimates.items(), {"lost/kernel": "'lost/kernel' is used by 'sort'"})


def test_a_profile_prints_a_line_a_layer_and_why_a_kernel_is_not_among_them():
    assert str(profile()).splitlines() == [
        "layer             κ, larger is sharper  standard error  probes",
        "blocks/kernel[0]  2                     0.5             16",
        "blocks/kernel[1]  3                     0.25            16",
        "head/kernel       7                     exact           0",
        "not measured: 'lost/kernel' is used by 'sort'",
    ]


def test_a_profile_is_exported_as_plain_numbers():
    rows = json.loads(json.dumps(profile().to_rows()))
    assert rows[0] == {
        "layer": "blocks/kernel[0]", "value": 2.0, "standard_error": 0.5, "num_probes": 16, "unread": None,
    }  # fmt: skip
    assert rows[3]["value"] is None
    assert rows[3]["unread"] == "'lost/kernel' is used by 'sort'"
    assert [row["layer"] for row in rows] == list(profile()) == list(profile().to_dict())


def test_a_stack_is_found_by_its_path():
    value, error, num_probes = profile()["blocks/kernel"]
    assert (value.tolist(), error.tolist(), int(num_probes)) == ([2, 3], [0.5, 0.25], 16)
    with pytest.raises(KeyError, match="blocks"):
        profile()["blocks"]
