"""Call every public function, to count what compiles and to time what a call costs."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flatjax
from flatjax import collapse, representations
from flatjax.flatness import head_logit_sharpness


class Call(NamedTuple):
    """A call is a function, the arrays it is given and its static options."""

    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    can_be_jitted: bool = True
    """Whether `jax.jit` can take it: a loop over batches on the host cannot, nor what raises by values."""

    def __call__(self) -> Any:
        return self.function(*self.arrays, **self.options)

    def jitted(self) -> Callable[[], Any]:
        """Return the same call inside a `jax.jit` of the caller."""
        return partial(jax.jit(partial(self.function, **self.options)), *self.arrays)


def public_calls(*, num_samples: int, num_features: int, num_classes: int) -> dict[str, Call]:
    """Return the calls by name, in modules as imported.

    Functions of a whole network are given one of a hidden layer and a head.
    """
    rng, f32, (key, other_key) = np.random.default_rng(0), jnp.float32, jax.random.split(jax.random.key(0))
    hidden = jnp.asarray(rng.normal(size=(num_features, num_features)) / num_features**0.5, f32)
    kernel = jnp.asarray(rng.normal(size=(num_features, num_classes)), f32)
    feats = jnp.asarray(rng.normal(size=(num_samples, num_features)), f32)
    labels = jnp.arange(num_samples) % num_classes
    head, net = {"kernel": kernel, "bias": jnp.zeros(num_classes, f32)}, {"hidden": {"kernel": hidden}}
    net["head"] = {"kernel": kernel}
    moments = flatjax.ClassMoments.init(num_classes, num_features, covariance=True).update(feats, labels)
    weights = jnp.ones(num_samples, f32)
    batch = head, feats, labels, weights
    calls = {
        "check_inputs": Call(flatjax.check_inputs, batch, can_be_jitted=False),
        "cross_entropy": Call(flatjax.cross_entropy, (feats @ kernel, labels)),
        "cross_entropy_and_flatness": Call(flatjax.cross_entropy_and_flatness, batch),
        "feature_robustness": Call(flatjax.feature_robustness, (head, feats, labels, 0.1, key), {"num_samples": 4}),
        "head_logit_sharpness": Call(head_logit_sharpness, batch, {"radius": 0.01}),
        "logit_sharpness": Call(flatjax.logit_sharpness, (feats @ kernel, labels, weights), {"radius": 0.01}),
        "max_relative_flatness": Call(flatjax.max_relative_flatness, batch),
        "neural_collapse": Call(flatjax.neural_collapse, batch),
        "relative_flatness": Call(flatjax.relative_flatness, batch),
        "relative_flatness of a callable": Call(flatjax.relative_flatness, batch, {"loss": flatjax.cross_entropy}),
        "row_block_traces": Call(flatjax.row_block_traces, batch),
        "simplified_relative_flatness": Call(flatjax.simplified_relative_flatness, batch),
    }
    calls |= _of_moments(moments, head, feats, labels, weights, key)
    calls |= _of_networks(net, feats, labels, key)
    return calls | _of_streams(hidden, feats, moments, other_key)


def _of_moments(moments: Any, head: Any, feats: Any, labels: Any, weights: Any, key: Any) -> dict[str, Call]:
    num_classes, num_features = moments.means.shape
    sizes = {"num_classes": num_classes, "num_features": num_features}
    of_moments = {name: getattr(collapse, name) for name in ("cdnv", "etf_floor", "nc1", "ncc")}
    of_either = {name: getattr(collapse, name) for name in ("cosine_std", "equiangularity", "equinorm", "etf_error")}
    of_head = {name: getattr(collapse, name) for name in ("central_path", "nc3", "unc3")}
    layers = {"layer": moments}
    covariance = moments.means, moments.covariance, moments.masses
    return {
        "ClassMoments": Call(flatjax.ClassMoments.init, (), sizes),
        "ClassMoments.update": Call(flatjax.ClassMoments.update, (moments, feats, labels, weights)),
        "ClassMoments.merge": Call(flatjax.ClassMoments.merge, (moments, moments)),
        "collapse_report": Call(flatjax.collapse_report, (moments, head)),
        "gnc2": Call(collapse.gnc2, (moments, head)),
        "init_layers": Call(collapse.init_layers, ({"layer": feats}, labels), {"num_classes": num_classes}),
        "layer_reports": Call(collapse.layer_reports, (layers, {"layer": head})),
        "least_squares_head": Call(collapse.least_squares_head, (*covariance, 0.1)),
        "mixup": Call(collapse.mixup, (key, feats, labels, 0.3)),
        "mixup_geometry": Call(collapse.mixup_geometry, (head, feats, labels, labels[::-1], weights)),
        "nc4": Call(collapse.nc4, (moments, head, feats, labels, weights)),
        "squared_error_decomposition": Call(collapse.squared_error_decomposition, (head, *covariance, 0.1)),
        "update_layers": Call(collapse.update_layers, (layers, {"layer": feats}, labels, weights)),
        **{name: Call(function, (moments,)) for name, function in of_moments.items()},
        **{name: Call(function, (moments, head)) for name, function in (of_either | of_head).items()},
    }


def _of_networks(net: Any, feats: Any, labels: Any, key: Any) -> dict[str, Call]:
    def hidden(params: Any, batch: Any) -> tuple[Any, Any]:
        return jnp.tanh(batch[0] @ params["hidden"]["kernel"]), batch[1]

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        return flatjax.cross_entropy(hidden(params, (x, y))[0] @ params["head"]["kernel"], y).mean()

    def logits(params: Any, x: Any, y: Any) -> jax.Array:
        return hidden(params, (x, y))[0] @ params["head"]["kernel"]

    num_classes = net["head"]["kernel"].shape[1]
    flat = flatjax.flat_reg(0.1, head="head")
    collapsed = flatjax.collapse_reg(0.1, features=hidden, num_classes=num_classes)

    def of_batch(params: Any, state: Any, x: Any, y: Any) -> Any:
        return collapsed.update(params, state, params, batch=(x, y))

    def of_head(params: Any, state: Any, x: Any, y: Any) -> Any:
        return flat.update(params, state, params, feats=x, labels=y)

    probe = partial(flatjax.layer_relative_flatness, loss)
    sampled = partial(flatjax.sampled_flatness, loss)
    drawn = partial(flatjax.gauss_newton_flatness, logits)
    by_draws = partial(flatjax.gauss_newton_profile, logits, key=key)
    profile = partial(flatjax.flatness_profile, loss, route="layerwise", key=key)
    return {
        "collapse_reg": Call(of_batch, (net, collapsed.init(net), feats, labels)),
        "flat_reg": Call(of_head, (net, flat.init(net), feats, labels)),
        "flatness_profile": Call(profile, (net, [(feats, labels)]), can_be_jitted=False),
        "gauss_newton_flatness": Call(drawn, (net, feats, labels), {"key": key}),
        "gauss_newton_profile": Call(by_draws, (net, [(feats, labels)]), can_be_jitted=False),
        "layer_relative_flatness": Call(probe, (net, feats, labels), {"layer": "hidden/kernel", "key": key}),
        "layer_relative_flatness of the head": Call(probe, (net, feats, labels), {"layer": "head/kernel"}),
        "sampled_flatness": Call(sampled, (net, feats, labels), {"layers": ("hidden/kernel",), "key": key}),
    }


def _of_streams(hidden: Any, feats: Any, moments: Any, key: Any) -> dict[str, Call]:
    blocks = [jax.tree_util.Partial(lambda W, x: x + jnp.tanh(x @ W), hidden * scale) for scale in (1, 2)]
    num_features = feats.shape[1]
    stream = jnp.stack([feats, 2 * feats, 4 * feats + feats**2])[:, None, :4]
    triplets = flatjax.residual_jacobians(blocks, stream, 1)
    between = representations.projections(triplets.matrices(), triplets)
    spectrum = representations.FeatureSpectrum.init(num_features).update(feats)
    jacobians = partial(flatjax.residual_jacobians, blocks)
    projected = partial(representations.residual_projections, blocks)
    fit = {"fit_range": (1, 3)}
    J = triplets.matrices()
    of_streams = ("growth_variation", "line_shape_score", "spacing_variation")
    return {
        "FeatureSpectrum": Call(representations.FeatureSpectrum.init, (), {"num_features": num_features}),
        "FeatureSpectrum.geometry": Call(representations.FeatureSpectrum.geometry, (spectrum,), fit),
        "FeatureSpectrum.merge": Call(representations.FeatureSpectrum.merge, (spectrum, spectrum)),
        "FeatureSpectrum.update": Call(representations.FeatureSpectrum.update, (spectrum, feats)),
        "block_coupling": Call(representations.block_coupling, (J[0], J[1]), {"top": 2}),
        "block_couplings": Call(representations.block_couplings, (triplets, between)),
        "geometry_of_covariance": Call(representations.geometry_of_covariance, (moments.covariance, len(feats)), fit),
        "inverse_norm_growth": Call(representations.inverse_norm_growth, (triplets.S,)),
        "numerical_ranks": Call(representations.numerical_ranks, (triplets.S,), {"tolerance": 0.01}),
        "projections": Call(representations.projections, (J, triplets)),
        "representation_geometry": Call(flatjax.representation_geometry, (feats,), fit),
        "residual_alignment": Call(representations.residual_alignment, (between,)),
        "residual_jacobians": Call(jacobians, (stream, 1)),
        "residual_jacobians by iteration": Call(jacobians, (stream, 1), {"top": 2, "key": key}),
        "residual_projections": Call(projected, (stream, 1, triplets)),
        **{name: Call(getattr(representations, name), (stream,)) for name in of_streams},
    }
