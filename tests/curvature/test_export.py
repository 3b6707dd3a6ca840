"""Every estimator is lowered for accelerators that are not there, and gives the same when run here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.curvature import GaussNewton, Hessian, diagonal, extreme_eigenpairs, product, spectral_density, trace


def predict(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def squared_error(outputs, _):
    return jnp.mean(outputs**2)


def loss_fn(params, x):
    return squared_error(predict(params, x), x)


def hessian_of_a_leaf(params, x):
    """For estimators that draw from a normal distribution, which is most of their program, leaf by leaf."""
    return Hessian(loss_fn, params, (x,), ("up",))


MEASURES = {
    "hessian": lambda params, x, key: product(Hessian(loss_fn, params, (x,)), params),
    "gauss newton": lambda params, x, key: product(GaussNewton(predict, squared_error, params, (x,)), params),
    "trace": lambda params, x, key: trace(Hessian(loss_fn, params, (x,)), key, num_probes=4),
    "xtrace": lambda params, x, key: trace(hessian_of_a_leaf(params, x), key, num_probes=4, method="xtrace"),
    "diagonal": lambda params, x, key: diagonal(Hessian(loss_fn, params, (x,)), key, num_probes=4),
    "eigenpairs": lambda params, x, key: extreme_eigenpairs(
        hessian_of_a_leaf(params, x), key, num_pairs=2, num_steps=6
    )[0],
    "density": lambda params, x, key: spectral_density(
        hessian_of_a_leaf(params, x), key, num_probes=2, num_steps=4, num_points=9
    )[:2],
}


@pytest.mark.parametrize("name", MEASURES)
def test_it_is_exported_for_accelerators(name):
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(3, 5)), "down": rng.normal(size=(5, 2))}
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, rng.normal(size=(7, 3))))
    measure, key = jax.jit(MEASURES[name]), jax.random.key(0)
    exported = jax.export.export(measure, platforms=("cpu", "cuda", "tpu"))(params, x, key)
    here = exported.call(params, x, key)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3),
        jax.tree.leaves(here),
        jax.tree.leaves(measure(params, x, key)),
    )
