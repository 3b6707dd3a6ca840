"""Features of a known spectrum, blocks whose Jacobians are known, and the formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np


def feats_with(variances, num_samples, *, seed=0, mean=0.0):
    """(n, m), whose covariance has exactly these eigenvalues, in random directions, around a random mean."""
    rng = np.random.default_rng(seed)
    m = len(variances)
    raw = rng.normal(size=(num_samples, m))
    rows = np.linalg.qr(raw - raw.mean(axis=0))[0]
    directions = np.linalg.qr(rng.normal(size=(m, m)))[0]
    return np.sqrt(num_samples) * rows * np.sqrt(variances) @ directions + mean * rng.normal(size=m)


def geometry_of(variances, fit_range=None):
    """Of eigenvalues, the largest first."""
    sigma = np.sqrt(variances)
    metrics = {
        "rankme": np.exp(entropy(sigma)),
        "rankme_of_variances": np.exp(entropy(variances)),
        "participation_ratio": np.sum(variances) ** 2 / np.sum(variances**2),
    }
    if fit_range:
        i = np.arange(fit_range[0], fit_range[1] + 1)
        # polyfit squares its weights.
        slope, intercept = np.polyfit(np.log(i), np.log(variances[i - 1]), 1, w=i**-0.5)
        logs = np.log(variances[i - 1])
        errors = logs - slope * np.log(i) - intercept
        around = logs - np.average(logs, weights=1 / i)
        metrics |= {"alpha_req": -slope, "alpha_req_r_squared": 1 - np.sum(errors**2 / i) / np.sum(around**2 / i)}
    return metrics


def entropy(sizes):
    p = sizes[sizes > 0] / np.sum(sizes)
    return -np.sum(p * np.log(p))


def covariance_spectrum(feats, weights):
    """Eigenvalues of the weighted covariance, the largest first, by definition."""
    feats, weights = feats.reshape(-1, feats.shape[-1]), weights.reshape(-1)
    mean = np.average(feats, axis=0, weights=weights)
    covariance = sum(w * np.outer(h - mean, h - mean) for h, w in zip(feats, weights, strict=True)) / weights.sum()
    return np.linalg.eigvalsh(covariance)[::-1]


def assert_geometry(got, want, rtol):
    for name, value in want.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=rtol, err_msg=name)


# Blocks.

L, N, T, M = 3, 2, 4, 7


def mixing_block(params, x):
    """Each position sees the earlier ones, and the features mix and bend."""
    attended = x + jnp.tanh(jnp.cumsum(x, axis=1) @ params["mix"])
    return attended + jnp.tanh(attended @ params["up"]) @ params["down"]


_jitted_block = jax.jit(mixing_block)


def network(seed=0, dtype=np.float64, num_blocks=L):
    """Parameters of each block, and the stream (l + 1, n, t, m)."""
    rng = np.random.default_rng(seed)
    shapes = {"mix": (M, M), "up": (M, 2 * M), "down": (2 * M, M)}
    params = [
        {name: (0.4 * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}
        for _ in range(num_blocks)
    ]
    stream = [jnp.asarray(rng.normal(size=(N, T, M)).astype(dtype))]
    for block in params:
        stream.append(_jitted_block(block, stream[-1]))
    return params, jnp.stack(stream)


def blocks_of(params):
    return [jax.tree_util.Partial(mixing_block, block) for block in params]


def dense_jacobians(blocks, stream, position, sequence=0):
    """(l, m, m), by autodiff of the whole block in all of its inputs."""

    @jax.jit
    def at(block, inputs):
        # All of ∂x_{l+1}/∂x_l, of which one token's own part is taken.
        full = jax.jacobian(lambda x: block(x[None])[0])(inputs)
        return full[position, :, position, :] - jnp.eye(inputs.shape[1], dtype=inputs.dtype)

    return np.stack([at(block, inputs[sequence]) for block, inputs in zip(blocks, stream, strict=False)])
