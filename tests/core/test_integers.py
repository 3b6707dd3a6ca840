"""Sizes and places of NumPy and JAX are checked like Python's, and booleans are none."""

import helpers
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from flatjax import ClassMoments, neural_collapse, representation_geometry, residual_jacobians
from flatjax.collapse import cdnv, nc4
from flatjax.core.integers import known_integer, whole_number
from flatjax.curvature import Hessian, diagonal, extreme_eigenpairs, spectral_density, trace
from flatjax.representations import FeatureSpectrum, block_coupling, residual_projections

KINDS = [int, np.int64, np.uint8, np.array, jnp.int32, jnp.asarray]


@pytest.fixture
def _without_types():
    """Users do not have jaxtyping's checks, which take NumPy's integers for none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_integer_of_any_kind_is_a_python_one(kind):
    assert type(whole_number(kind(3), "size", least=3)) is int
    with pytest.raises(ValueError, match="size is 2, wanted at least 3"):
        whole_number(kind(2), "size", least=3)


@pytest.mark.parametrize(
    "bad", [True, np.True_, jnp.array(True), 1.0, np.float32(2), "3", None, np.array([1]), jax.random.key(0)], ids=repr
)
def test_what_is_no_integer_is_refused(bad):
    with pytest.raises(TypeError, match=r"size (is|has dtype) .*, wanted one integer"):
        whole_number(bad, "size", least=0)


def test_an_integer_that_is_traced_is_not_known():
    def function(value):
        assert known_integer(value, "size") is None
        with pytest.raises(TypeError, match="size is traced, wanted a number that is static under jit"):
            whole_number(value, "size", least=0)
        return value

    assert jax.jit(function)(3) == 3


HESSIAN = Hessian(lambda w: jnp.sum(w**3), jnp.arange(1.0, 5.0))
KEY = jax.random.key(0)
BLOCKS, STREAM = [lambda x: x + x**2, lambda x: 2 * x], jnp.ones((2, 1, 4, 3))
LABELS = np.arange(8) % 2
FEATS = np.random.default_rng(0).normal(size=(8, 3))
HEAD = {"kernel": np.ones((3, 2))}


def moments():
    return ClassMoments.init(2, 3, dtype=jnp.float64).update(FEATS, LABELS)


# What takes a number, one that is right, and one that is not.
FUNCTIONS = {
    "num_probes": (lambda k: trace(HESSIAN, KEY, num_probes=k), 3, 1),
    "max_probes": (lambda k: trace(HESSIAN, KEY, num_probes=2, relative_error=9.0, max_probes=k), 3, 1),
    "chunk_size": (lambda k: diagonal(HESSIAN, KEY, num_probes=3, chunk_size=k), 2, 0),
    "chunk_size of products": (lambda k: trace(HESSIAN, KEY, num_probes=3, chunk_size=k), 2, 0),
    "num_steps": (lambda k: extreme_eigenpairs(HESSIAN, KEY, num_steps=k), 3, 0),
    "num_pairs": (lambda k: extreme_eigenpairs(HESSIAN, KEY, num_steps=3, num_pairs=k), 2, 4),
    "num_points": (lambda k: spectral_density(HESSIAN, KEY, num_probes=2, num_steps=2, num_points=k), 64, 1),
    "position": (lambda k: residual_jacobians(BLOCKS, STREAM, k), 3, 4),
    "sequence": (lambda k: residual_jacobians(BLOCKS, STREAM, 0, sequence=k), 0, 1),
    "top": (lambda k: residual_jacobians(BLOCKS, STREAM, 0, top=k), 2, 4),
    "num_triplets": (lambda k: residual_jacobians(BLOCKS, STREAM, 0).top(k), 2, 4),
    "position of projections": (
        lambda k: residual_projections(BLOCKS, STREAM, k, residual_jacobians(BLOCKS, STREAM, 0)),
        3,
        4,
    ),
    "top of coupling": (lambda k: block_coupling(np.eye(3), np.eye(3), top=k), 2, 4),
    "fit_range": (lambda k: representation_geometry(FEATS, fit_range=(1, k)), 3, 2),
    "num_features": (lambda k: FeatureSpectrum.init(k), 3, 0),
    "num_classes": (lambda k: neural_collapse(HEAD, FEATS, LABELS, num_classes=k), 2, 1),
    "num_classes of moments": (lambda k: ClassMoments.init(k, 3), 2, 0),
    "min_count": (lambda k: cdnv(moments(), min_count=k), 2, 0),
    "tile_size": (lambda k: cdnv(moments(), tile_size=k), 2, 0),
    "tile_size of NC4": (lambda k: nc4(moments(), HEAD, FEATS, LABELS, tile_size=k), 2, 0),
}


@pytest.mark.usefixtures("_without_types")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_integer_of_numpy_is_checked_like_pythons(name):
    function, good, bad = FUNCTIONS[name]
    jax.tree.map(np.testing.assert_array_equal, function(np.int64(good)), function(good))
    for kind in (int, np.int64, np.uint8):
        with pytest.raises(ValueError, match=f"{name.split()[0]} is|num_classes|got 0 classes"):
            function(kind(bad))
    for boolean in (True, np.True_):
        with pytest.raises(TypeError, match=rf"{name.split()[0]} (is|has dtype) .*, wanted one integer"):
            function(boolean)


def test_a_position_that_jax_knows_is_checked_too():
    with helpers.raises(ValueError, "position is 4, but stream has 4"):
        residual_jacobians(BLOCKS, STREAM, jnp.int32(4))
    with helpers.raises(ValueError, "position is -5, but stream has 4"):
        residual_jacobians(BLOCKS, STREAM, np.int8(-5))
