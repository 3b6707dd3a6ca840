"""The loss as a function of a layer's outputs, with the layer's features, read off the program of the loss.

The loss is traced, and the one product of matrices that a kernel enters is looked up in its program: the features are
the other operand, and a shift of the outputs is added to the result. So no model has to be rewritten for its hidden
layers to be read, whatever it is written in.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Float

from flatjax.curvature.leaves import Tree, leaves_by_path
from flatjax.curvature.programs import as_function
from flatjax.layers.kernels import Layer


class NotOneProductError(ValueError):
    """A kernel is used otherwise than in one product of matrices with the features."""


class MisreadKernelError(ValueError):
    """A kernel's axes are not what they were said to be: κ of it as a matrix would be that of no layer."""


class LayerOutputs(NamedTuple):
    """Where a layer lies in a loss."""

    rows: tuple[int, ...]
    """The shape of all feature vectors, as (samples, tokens)."""
    is_last: bool
    """Nothing between the layer's outputs and the loss is a product of matrices or a convolution."""
    is_before_attention: bool
    """A product of one array with another for each entry of a batch follows, as that of queries with keys."""
    shifted: Callable[[Float[Array, "n d"]], tuple[Float[Array, ""], Float[Array, "n m"]]]
    """The loss when the outputs are shifted, and the features, the rows in one axis."""


def layer_outputs(loss_fn: Callable[..., Any], params: Tree, batch: tuple[Any, ...], layer: Layer) -> LayerOutputs:
    """Finds a layer in `loss_fn(params, *batch)`.

    Raises:
        NotOneProductError: the kernel is used in no product, in several, in a convolution, by look-up, or in a loop.
        MisreadKernelError: it is used in a product along other axes than those of the features, or is a stack of
            kernels.
    """
    return _outputs(_program(loss_fn, params, batch), layer)


def try_layer_outputs(
    loss_fn: Callable[..., Any], params: Tree, batch: tuple[Any, ...], layers: Sequence[Layer]
) -> list[LayerOutputs | None]:
    """`layer_outputs` of several layers, or None where one does not enter the loss by one product of matrices."""
    program = _program(loss_fn, params, batch)

    def tried(layer: Layer) -> LayerOutputs | None:
        try:
            return _outputs(program, layer)
        except NotOneProductError:
            return None

    return [tried(layer) for layer in layers]


class _Program(NamedTuple):
    """A loss, traced, with what it is called with."""

    traced: ClosedJaxpr
    arguments: list[Any]
    places: dict[str, int]
    """Of the parameters among the arguments, by path."""


def _program(loss_fn: Callable[..., Any], params: Tree, batch: tuple[Any, ...]) -> _Program:
    arguments, tree = jax.tree.flatten((params, batch))
    traced = jax.make_jaxpr(lambda *leaves: _call(loss_fn, tree, leaves))(*arguments)
    return _Program(traced, arguments, {path: place for place, path in enumerate(leaves_by_path(params))})


def _outputs(program: _Program, layer: Layer) -> LayerOutputs:
    traced, arguments, place = program.traced, program.arguments, program.places[layer.path]
    shape = jnp.shape(arguments[place])
    axes = tuple((axis,) for axis in range(len(shape)))
    site = _find(traced.jaxpr, {traced.jaxpr.invars[place]: axes}, _Kernel(layer, shape))

    def shifted(shift: Float[Array, "n d"]) -> tuple[Float[Array, ""], Float[Array, "n m"]]:
        (loss,), feats = site.run([*traced.consts, *arguments], shift)
        return loss, feats

    is_before_attention = any(map(_is_of_tokens, site.products_after))
    return LayerOutputs(site.rows or (1,), not site.products_after, is_before_attention, shifted)


Axes = tuple[tuple[int, ...], ...]
"""Which of a kernel's axes each axis of an array runs along that is the kernel itself, rearranged."""


class _Kernel(NamedTuple):
    layer: Layer
    shape: tuple[int, ...]


class _Site(NamedTuple):
    """The product in a program: `run` takes the program's constants and arguments, and gives results and features."""

    rows: tuple[int, ...]
    products_after: tuple[JaxprEqn, ...]
    run: Callable[[list[Any], Float[Array, "n d"]], tuple[list[Any], Float[Array, "n m"]]]


def _call(loss_fn: Callable[..., Any], tree: Any, leaves: Sequence[Any]) -> Any:
    params, batch = jax.tree.unflatten(tree, leaves)
    return loss_fn(params, *batch)


def _find(program: Jaxpr, kernels: dict[Var, Axes], kernel: _Kernel) -> _Site:
    """The product that the kernel enters; `kernels` holds it, and takes in its rearrangements."""
    uses = []
    for place, equation in enumerate(program.eqns):
        if any(_is_in(value, kernels) for value in equation.invars):
            rearranged = _rearranged(equation, kernels, kernel.shape)
            if rearranged is None:
                uses.append(place)
            else:
                kernels[equation.outvars[0]] = rearranged
    if len(uses) != 1 or any(_is_in(value, kernels) for value in program.outvars):
        raise NotOneProductError(f"{kernel.layer.path!r} is used {len(uses)} times, wanted once, in a product")
    return _around(program, uses[0], _at(program.eqns[uses[0]], kernels, kernel))


def _around(program: Jaxpr, place: int, site: _Site) -> _Site:
    """The site in an equation as one in the whole program."""
    equation, later = program.eqns[place], program.eqns[place + 1 :]
    read = {value for each in (equation, *later) for value in each.invars if isinstance(value, Var)}
    read |= {value for value in program.outvars if isinstance(value, Var)}
    given = [*program.constvars, *program.invars]
    known = [*given, *(value for each in program.eqns[:place] for value in each.outvars)]
    known = [value for value in known if value in read]
    results = [value for value in equation.outvars if value in read]
    before = as_function(program, program.eqns[:place], given, known)
    after = as_function(program, later, [*known, *results], program.outvars)

    def run(arguments: list[Any], shift: Float[Array, "n d"]) -> tuple[list[Any], Float[Array, "n m"]]:
        values = dict(zip(known, before(*arguments), strict=True))
        operands = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        outputs, feats = site.run(operands, shift)
        values |= dict(zip(equation.outvars, outputs, strict=True))
        return after(*(values[value] for value in (*known, *results))), feats

    return _Site(site.rows, (*site.products_after, *_products(later)), run)


def _at(equation: JaxprEqn, kernels: dict[Var, Axes], kernel: _Kernel) -> _Site:
    """The site in an equation that the kernel enters: a product, or a function that is called."""
    name = equation.primitive.name
    entering = [place for place, value in enumerate(equation.invars) if _is_in(value, kernels)]
    if name == "dot_general" and len(entering) == 1:
        return _in_product(equation, entering[0], kernels, kernel)
    if name in _CALLS and len(entering) == 1:
        called = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
        consts = list(called.consts) if isinstance(called, ClosedJaxpr) else []
        inner = called.jaxpr if isinstance(called, ClosedJaxpr) else called
        (place,) = entering
        site = _find(inner, {inner.invars[place]: _axes(equation, place, kernels)}, kernel)
        return site._replace(run=lambda operands, shift: site.run([*consts, *operands], shift))
    if name == "scan" and entering[0] >= equation.params["num_consts"] + equation.params["num_carry"]:
        raise MisreadKernelError(
            f"{kernel.layer.path!r}, of shape {kernel.shape}, is a stack of kernels, one a step of a scan: relative "
            "flatness is that of one of them; give a loss in which each is a leaf of its own"
        )
    raise NotOneProductError(f"{kernel.layer.path!r} is used by {name!r}, wanted a product of matrices")


def _in_product(equation: JaxprEqn, place: int, kernels: dict[Var, Axes], kernel: _Kernel) -> _Site:
    """The site in a product that the kernel is the operand `place` of."""
    axes = _axes(equation, place, kernels)
    contracted, batched = equation.params["dimension_numbers"]
    of_kernel, of_feats = contracted[place], contracted[1 - place]
    pairs = sorted(zip(of_kernel, of_feats, strict=True), key=lambda pair: axes[pair[0]])
    summed = _joined(axes[axis] for axis, _ in pairs)
    free = _joined(each for axis, each in enumerate(axes) if axis not in of_kernel)
    feature_axes = kernel.layer.feature_axes
    output_axes = tuple(axis for axis in range(len(kernel.shape)) if axis not in feature_axes)
    if any(batched):
        raise MisreadKernelError(
            f"{kernel.layer.path!r}, of shape {kernel.shape}, is a stack of kernels, one an entry of a batch: relative "
            "flatness is that of one of them; give a loss in which each is a leaf of its own"
        )
    if summed != feature_axes or free != output_axes:
        raise MisreadKernelError(
            f"{kernel.layer.path!r}, of shape {kernel.shape}, is multiplied along its axes {summed}, but was read with "
            f"the features along {feature_axes}: give Layer({kernel.layer.path!r}, feature_axes={summed})"
        )
    features, outputs = _shape(equation.invars[1 - place]), _shape(equation.outvars[0])
    row_axes = tuple(axis for axis in range(len(features)) if axis not in of_feats)
    rows = tuple(features[axis] for axis in row_axes)
    num_rows, num_features = math.prod(rows), math.prod(kernel.shape[axis] for axis in feature_axes)

    def run(operands: list[Any], shift: Float[Array, "n d"]) -> tuple[list[Any], Float[Array, "n m"]]:
        result = equation.primitive.bind(*operands, **equation.params)
        # The axes of the first operand come first in a product.
        shift = (shift.T if place == 0 else shift).reshape(outputs).astype(result.dtype)
        feats = jnp.transpose(operands[1 - place], (*row_axes, *(axis for _, axis in pairs)))
        return [result + shift], feats.reshape(num_rows, num_features)

    return _Site(rows, (), run)


_CALLS = ("jit", "pjit", "checkpoint", "remat", "remat2", "closed_call")


def _rearranged(equation: JaxprEqn, kernels: dict[Var, Axes], sizes: tuple[int, ...]) -> Axes | None:
    """The axes of the result of an equation that only moves the kernel's entries; None for another."""
    operand, name = equation.invars[0], equation.primitive.name
    if not isinstance(operand, Var) or operand not in kernels:
        return None
    axes = kernels[operand]
    if name in ("convert_element_type", "copy", "copy_p", "sharding_constraint", "reshard"):
        return axes
    if name == "transpose":
        return tuple(axes[axis] for axis in equation.params["permutation"])
    if name in ("reshape", "squeeze"):
        return _grouped(_joined(axes), sizes, _shape(equation.outvars[0]))
    return None


def _grouped(axes: tuple[int, ...], sizes: tuple[int, ...], shape: Sequence[int]) -> Axes | None:
    """Consecutive axes put together to axes of the sizes wanted, if they can be."""
    groups, left = [], list(axes)
    for size in shape:
        group: list[int] = []
        while left and math.prod(sizes[axis] for axis in group) < size:
            group.append(left.pop(0))
        if math.prod(sizes[axis] for axis in group) != size:
            return None
        groups.append(tuple(group))
    return None if left else tuple(groups)


def _joined(groups: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(itertools.chain.from_iterable(groups))


def _shape(value: Any) -> tuple[int, ...]:
    """Of a variable or a literal of a program."""
    return value.aval.shape


def _axes(equation: JaxprEqn, place: int, kernels: dict[Var, Axes]) -> Axes:
    value = equation.invars[place]
    assert isinstance(value, Var)
    return kernels[value]


def _is_in(value: Any, kernels: dict[Var, Axes]) -> bool:
    return isinstance(value, Var) and value in kernels


def _products(equations: Iterable[JaxprEqn]) -> Iterator[JaxprEqn]:
    """Those of matrices, and convolutions, among equations and in what they call."""
    for equation in equations:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for program in _programs(equation.params.values()):
            yield from _products(program.eqns)


def _is_of_tokens(product: JaxprEqn) -> bool:
    """For each entry of a batch, of many rows of one array with many of another."""
    if product.primitive.name != "dot_general":
        return False
    contracted, batched = product.params["dimension_numbers"]
    used = [len(axes) + len(of_batch) for axes, of_batch in zip(contracted, batched, strict=True)]
    are_many = [len(_shape(operand)) > number for operand, number in zip(product.invars, used, strict=True)]
    return any(batched) and all(are_many)


def _programs(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs(value)
