"""The loss as a function of a layer's outputs, with the layer's features, read off the program of the loss.

The products of matrices that a kernel enters are looked up in the program of the loss. The features are the other
operand, and a shift of the outputs is added to the result. So no model has to be rewritten for its hidden layers to be
read, whatever it is written in.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Var
from jaxtyping import Array, Float, Integer

from flatjax.layers.kernels import Layer
from flatjax.layers.reading.moves import sizes_of
from flatjax.layers.reading.products import LayerProduct, NotOneProductError, layer_product
from flatjax.layers.reading.program import Program, called, programs_in
from flatjax.layers.reading.rerun import rerun
from flatjax.layers.reading.uses import Use, uses_of


class LayerOutputs(NamedTuple):
    """The place of a layer in a loss."""

    rows: tuple[int, ...]
    """The shape of all feature vectors, for example (samples, tokens)."""
    is_last: bool
    """Whether nothing between the layer's outputs and the loss is a product of matrices or a convolution."""
    is_before_attention: bool
    """Whether a product of one array with another for each entry of a batch follows, as that of queries with keys."""
    shifted: Callable[[Float[Array, "n d"], Integer[Array, ""] | int], tuple[Float[Array, ""], Float[Array, "n m"]]]
    """The loss when the outputs are shifted, and the features, the rows in one axis; in a stack, those of one layer.

    A row that is not of that layer has no shift and the features 0.
    """


def layer_outputs(program: Program, layer: Layer) -> LayerOutputs:
    """Finds a layer in a loss.

    Raises:
        NotOneProductError: the kernel is used in no product, in several, changed before it, in a convolution, by
            look-up, or in a loop that it is not a stack of.
    """
    path, place = layer.path, program.places[layer.path]
    shape = sizes_of(program.traced.jaxpr.invars[place])
    uses = uses_of(program, path).of_data
    products = {use.place: layer_product(use, layer, shape) for use in uses}
    _check_one_a_layer(program.traced.jaxpr, layer, uses, list(products.values()))
    rows = next(iter(products.values())).rows
    later = [_later(program.traced.jaxpr, use.place) for use in uses]

    def shifted(
        shift: Float[Array, "n d"], index: Integer[Array, ""] | int = 0
    ) -> tuple[Float[Array, ""], Float[Array, "n m"]]:
        arguments = [*program.traced.consts, *program.arguments]
        (loss,), feats = rerun(program.traced.jaxpr, arguments, products, shift, index)
        return loss, feats

    is_before_attention = any(any(map(_is_of_tokens, products)) for products in later)
    return LayerOutputs(rows or (1,), not any(later), is_before_attention, shifted)


def try_layer_outputs(program: Program, layer: Layer) -> LayerOutputs | None:
    """Finds a layer in a loss; None where it does not enter the loss by one product of matrices."""
    try:
        return layer_outputs(program, layer)
    except NotOneProductError:
        return None


def _check_one_a_layer(program: Jaxpr, layer: Layer, uses: Sequence[Use], products: Sequence[LayerProduct]) -> None:
    """Raises a `NotOneProductError` if a layer enters the loss in several products, or several times in one."""
    fixed = [tuple(product.fixed_index(axis) for axis in layer.stack_axes) for product in products]
    is_one_each = all(None not in index for index in fixed) and len(set(fixed)) == len(fixed)
    if not uses or (len(uses) > 1 and not (layer.stack_axes and is_one_each)):
        raise NotOneProductError(f"{layer.path!r} is used {len(uses)} times, wanted once, in a product")
    if len({product.rows for product in products}) > 1:
        raise NotOneProductError(f"{layer.path!r} is a stack of layers of different numbers of feature vectors")
    for use, product in zip(uses, products, strict=True):
        loops = list(_loops(program, use.place))
        stacks = [variable for loop in loops for variable in _stacks(loop)]
        if len(loops) != sum(product.is_stepped(axis, stacks) for axis in layer.stack_axes):
            raise NotOneProductError(f"{layer.path!r} is used in a loop, wanted once, in a product")


def _loops(program: Jaxpr, place: Sequence[int]) -> Iterator[JaxprEqn]:
    """The loops that an equation lies in."""
    for number in place[:-1]:
        equation = program.eqns[number]
        name = equation.primitive.name
        if name == "scan":
            program = equation.params["jaxpr"].jaxpr
            yield equation
            continue
        inner = called(equation)
        if inner is None or name.startswith("custom") or name == "shard_map":
            raise NotOneProductError(f"a kernel is used within {name!r}, wanted once, in a product")
        program = inner


def _stacks(loop: JaxprEqn) -> Sequence[Var]:
    return loop.params["jaxpr"].jaxpr.invars[loop.params["num_consts"] + loop.params["num_carry"] :]


def _later(program: Jaxpr, place: Sequence[int]) -> list[JaxprEqn]:
    """The products after an equation: after one in a loop comes the loop again."""
    later = list(_products(program.eqns[place[0] + 1 :]))
    if len(place) == 1:
        return later
    equation = program.eqns[place[0]]
    if equation.primitive.name == "scan":
        return [*_products(equation.params["jaxpr"].jaxpr.eqns), *later]
    inner = called(equation)
    assert inner is not None
    return [*_later(inner, place[1:]), *later]


def _products(equations: Iterable[JaxprEqn]) -> Iterator[JaxprEqn]:
    """The products of matrices, and convolutions, among equations and in what they call."""
    for equation in equations:
        if equation.primitive.name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            yield equation
        for program in itertools.chain.from_iterable(map(programs_in, equation.params.values())):
            yield from _products(program.eqns)


def _is_of_tokens(product: JaxprEqn) -> bool:
    """Whether a product is, for each entry of a batch, of many rows of one array with many of another."""
    if product.primitive.name != "dot_general":
        return False
    contracted, batched = product.params["dimension_numbers"]
    used = [len(axes) + len(of_batch) for axes, of_batch in zip(contracted, batched, strict=True)]
    are_many = [len(sizes_of(operand)) > number for operand, number in zip(product.invars, used, strict=True)]
    return any(batched) and all(are_many)
