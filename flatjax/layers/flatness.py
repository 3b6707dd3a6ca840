"""Relative flatness of any layer of any network, exactly where that is cheap, else estimated."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flatjax.core.arrays import a_key
from flatjax.core.trees import Tree
from flatjax.curvature.estimate import Estimate, check_num_probes, exactly, mean_of
from flatjax.layers.curvature import LayerCurvature
from flatjax.layers.kernels import Layer, find_kernel
from flatjax.layers.reading.feature_axes import read_layer
from flatjax.layers.reading.outputs import layer_outputs, try_layer_outputs
from flatjax.layers.reading.program import Program


def layer_relative_flatness(
    loss_fn: Callable[..., Any],
    params: Tree,
    *batch: Any,
    layer: str | Layer,
    key: Key[Array, ""] | None = None,
    num_probes: int = 16,
    method: str = "auto",
    chunk_size: int = 1,
) -> Estimate:
    r"""Relative flatness κ of any layer: dense, convolution, projection of attention, embedding, head.

        κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr H_{s,s'} = E_A ⟨W A, H[W A]⟩

    with w_s the rows of the layer's kernel seen as a matrix W (d, m), one row an output, H_{s,s'} the (m, m) blocks of
    the Hessian of the loss in them, and A (m, m) of independent entries ±1. Larger is sharper. In a hidden layer κ may
    be negative.

    Several layers may lie in one array, a stack: (L, m, d), as `nn.scan`, `nnx.scan` and `jax.vmap` keep them. κ is
    then that of each layer of the stack.

    The methods:

    * "probes": the mean of ⟨W A, H[W A]⟩ over draws of A. Each takes one Hessian-vector product, restricted to the
      layer, so that nothing before it is differentiated. It is always unbiased, weight sharing and batch statistics
      included.
    * "outputs": exact, from the Hessian G of the loss in the outputs of the layer, if it enters the loss by one product
      of matrices: κ = Σ_{a,b} ⟨φ_a, φ_b⟩ tr(Wᵀ G_{a,b} W) over all feature vectors. Whether these interact is looked
      at, not assumed: κ is NaN if samples interact.
    * "weights": exact, and for any layer.
    * "auto": exact where that takes no more products than `num_probes` (and a few, log₂ of the number of feature
      vectors, to look whether they interact), or none of a layer after this one, as for heads; else by probes.

    The loss is differentiated as it is called. Fix batch statistics and dropout in it. Otherwise κ is that of a loss in
    which samples interact, or of one draw. In Linen call `model.apply({"params": p, "batch_stats": s}, x, train=False)`
    with dropout deterministic. In NNX call `graphdef, params, rest = nnx.split(model, nnx.Param, ...)` after
    `model.eval()`, and `nnx.merge(graphdef, params, rest, copy=True)(x)`, whose copy keeps the statistics of the model
    untouched.

    Args:
        loss_fn: `(params, *batch) -> scalar`, twice differentiable, in forward mode too. One function for all calls:
            each is compiled once.
        params: a tree of arrays: `nnx.state(model, nnx.Param)`, `variables["params"]`, or any other.
        batch: what the loss takes besides.
        layer: the path of a kernel, joined by slashes, for example "blocks/0/up/kernel". Which of its axes the features
            run along, and which is that of a stack, is read off the program of the loss: from where the kernel is
            multiplied with what comes of the batch, through slices, loops, calls, look-ups and what is done to it entry
            by entry. A `Layer(path, feature_axes=(1,), stack_axes=(0,))` says it instead, and is confirmed. It is
            needed where the program may be read in several ways, as for networks side by side on one input, or cannot
            be followed. An embedding is looked up, with one-hot features along its first axis; one that is tied to the
            head is measured as the head by `Layer(path, feature_axes=(1,))`.
        key: the random key of the probes. Without one, only what is exact is measured. κ is then NaN where feature
            vectors interact that were not expected to.
        num_probes: how many probes are drawn, if κ is estimated; at least 2.
        method: one of the above.
        chunk_size: how many products are in memory at a time.

    Returns:
        An `Estimate`: value and standard_error, in the unit of the loss, and num_probes; the latter two are 0 where κ
        is exact. Value and error are scalars, or arrays of the shape of a stack's `stack_axes`. They are those of one
        batch: κ of a data set is the mean over its batches, weighted by their sizes, see `flatjax.flatness_profile`.

    Raises:
        TypeError: the kernel is not of a floating dtype, a leaf of params no array, or the loss no scalar.
        ValueError: there is no such layer; the program multiplies it along other axes than was said, or only a path
            is given and does not say how it is to be read; no key for probes, too few of them, an unknown method, or,
            for "outputs", a layer that does not enter the loss by one product of matrices.

    Notes:
        Cost: "outputs" takes min(d, m) products after the layer if no feature vector interacts with another. It takes
        min(d, m) times as many as a sample has of them if only those of a sample interact. These may then come from two
        axes of the features, samples first. "weights" takes m·min(d, m) products. A stack takes so many products for
        each of its layers, from one program.

        Precision: κ has no more digits than the second derivatives of `loss_fn`. Those of logsumexp(z) − z_y lose all
        of theirs in float32 once the loss is below 1e-7; those of `flatjax.cross_entropy` do not.

        In a convolution in groups the features are those of a group, and one A is shared by all of them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax import cross_entropy, layer_relative_flatness, relative_flatness
        >>> def loss(params, x, y):
        ...     logits = jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
        ...     return cross_entropy(logits, y).mean()
        >>> keys, f32 = jax.random.split(jax.random.key(0), 4), jnp.float32
        >>> hidden, head = jax.random.normal(keys[0], (3, 8), f32), jax.random.normal(keys[1], (8, 5), f32)
        >>> params = {"hidden": {"kernel": hidden}, "head": {"kernel": head}}
        >>> x, y = jax.random.normal(keys[2], (20, 3), f32), jnp.arange(20) % 5
        >>> exact = layer_relative_flatness(loss, params, x, y, layer="hidden/kernel")
        >>> probed = layer_relative_flatness(
        ...     loss, params, x, y, layer="hidden/kernel", key=keys[0], num_probes=256, method="probes")
        >>> print(f"{exact.value:.3f}", bool(abs(probed.value - exact.value) < 4 * probed.standard_error))
        -0.946 True
        >>> of_head = layer_relative_flatness(loss, params, x, y, layer="head/kernel")
        >>> print(f"{of_head.value:.4f}, {relative_flatness(params['head'], jnp.tanh(x @ hidden), y):.4f}")
        19.1550, 19.1550
        >>> def of_stack(params, x, y):
        ...     forward = lambda x, kernel: (x + jnp.tanh(x @ kernel), None)
        ...     x, _ = jax.lax.scan(forward, x, params["blocks"]["kernel"])
        ...     return cross_entropy(x, y).mean()
        >>> stack = {"blocks": {"kernel": jax.random.normal(keys[0], (2, 3, 3), f32)}}
        >>> print(layer_relative_flatness(of_stack, stack, x, y % 3, layer="blocks/kernel").value.shape)
        (2,)

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021.
    """
    if method not in ("auto", "weights", "outputs", "probes"):
        raise ValueError(f"method is {method!r}, wanted 'auto', 'weights', 'outputs' or 'probes'")
    check_num_probes(num_probes)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, wanted at least 1")
    if method == "probes" and key is None:
        raise ValueError("key is None, but probes are drawn with one: give key=jax.random.key(seed)")
    if key is not None:
        a_key(key)
    find_kernel(params, layer)
    return _flatness(
        loss_fn, params, batch, key, layer=layer, num_probes=num_probes, method=method, chunk_size=chunk_size
    )


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer", "num_probes", "method", "chunk_size"))
def _flatness(
    loss_fn: Callable[..., Any],
    params: Tree,
    batch: tuple[Any, ...],
    key: Key[Array, ""] | None,
    *,
    layer: str | Layer,
    num_probes: int,
    method: str,
    chunk_size: int,
) -> Estimate:
    program = Program.of(loss_fn, params, batch)
    found = read_layer(program, layer)
    curvature = LayerCurvature(loss_fn, params, batch, found, chunk_size)

    def shaped(of_layers: Float[Array, "*k l"]) -> Float[Array, "..."]:
        """Shapes values as a stack is, and to () for a single layer."""
        stack = found.stack_shape(curvature.shape)
        return of_layers.reshape(*of_layers.shape[:-1], *stack)

    def by_probes() -> Estimate:
        if key is None:
            return exactly(shaped(jnp.full(curvature.num_layers, jnp.nan, curvature.dtype)))
        keys = jax.random.split(key, num_probes)
        return mean_of(shaped(curvature.probes(keys)))

    def by_weights() -> Estimate:
        return exactly(shaped(curvature.by_weights()))

    if method == "probes":
        return by_probes()
    otherwise = by_weights if method == "weights" or curvature.num_directions <= num_probes else by_probes
    if method == "outputs":
        return exactly(shaped(curvature.by_outputs(layer_outputs(program, found))))
    outputs = None if method == "weights" else try_layer_outputs(program, found)
    if outputs is None or not (outputs.is_last or curvature.rank <= num_probes):
        if key is None and otherwise is by_probes:
            exactly_by = (
                f"num_probes={curvature.num_directions} or method='weights'"
                if outputs is None
                else (f"num_probes={curvature.rank} or method='outputs'")
            )
            raise ValueError(
                f"key is None, but with num_probes={num_probes} κ of {found.path!r} is estimated by probes: give "
                f"key=jax.random.key(seed), or, for the exact value, {exactly_by}"
            )
        return otherwise()
    are_apart, kappas = curvature.by_rows(outputs)
    return jax.lax.cond(are_apart, lambda: exactly(shaped(kappas)), otherwise)
