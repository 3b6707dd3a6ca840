"""What softmax cross-entropy makes of each sample, read off a head of any size without its logits in memory.

The variance of the rows under the predicted probabilities, v = Σ_s p_s ‖w_s − c‖² with c = Σ_s p_s w_s, is a read-out
like that of attention: the features are queries, the rows keys, and (w_s, ‖w_s‖²) values. So the rows can be taken in
tile by tile, at a cost of two products of matrices, n·d·m each, and a memory of O(n·(m + t) + t·m).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flatjax.flatness.online_softmax import AxisNames, OnlineSoftmax, merged, total
from flatjax.flatness.tiles import Tile, check_tile_size, take_rows, tile
from flatjax.heads import LinearHead
from flatjax.sharding import num_devices, varying_like

LOGITS_AT_ONCE = 2**22
"""Of all samples in a tile, unless its rows were then too few for a product of matrices to be fast."""
FEWEST_ROWS = 512


class Readout(NamedTuple):
    """What depends on the logits of a sample alone."""

    losses: Float[Array, " n"]
    """ℓ = −log p_y."""
    traces: Float[Array, " n"]
    """tr G = 1 − ‖p‖²."""
    variances: Float[Array, " n"]
    """v = tr(Wᵀ G W)."""


def read_out(
    head: LinearHead,
    feats: Float[Array, "n m"],
    labels: Integer[Array, " n"],
    *,
    tile_size: int | None = None,
    axis_names: AxisNames = (),
) -> Readout:
    """Reads a head in tiles of `tile_size` rows; inside a `jax.shard_map`, a head split by rows along `axis_names`.

    On a mesh where the compiler splits the work the rows are first put into as many parts as there are devices, if they
    can be: each device then reads the parts it has, and only the sums over a part are ever sent.

    Raises:
        TypeError: `tile_size` is no integer.
        ValueError: `tile_size` is below 1.
    """
    check_tile_size(tile_size)
    num_parts = math.gcd(head.num_outputs, num_devices((head, feats)))
    size = head.num_outputs // num_parts
    if tile_size is None:
        tile_size = max(FEWEST_ROWS, LOGITS_AT_ONCE // len(feats) // 128 * 128)
    shape = list(head.matrix.shape)
    shape[head.rows_axis : head.rows_axis + 1] = num_parts, size
    plan = _Plan(head.rows_axis, min(tile_size, size), axis_names)
    return _read_parts(plan, head.matrix.reshape(shape), head.bias.reshape(num_parts, size), feats, labels)


class _Plan(NamedTuple):
    """How the parts of a head are read."""

    rows_axis: int
    tile_size: int
    axis_names: AxisNames


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _read_parts(
    plan: _Plan,
    matrix: Float[Array, "_ _ _"],
    bias: Float[Array, "k p"],
    feats: Float[Array, "n m"],
    labels: Integer[Array, " n"],
) -> Readout:
    sums, variances = merged(_sums(plan, matrix, bias, feats, labels), plan.axis_names)
    return Readout(sums.losses(), sums.traces(), variances)


# The derivative is given forward, linear in the tangents: transposed, it is the gradient, which takes the tiles one by
# one and makes their logits again; and made of nothing but operations of JAX, it has derivatives of both kinds itself.
@_read_parts.defjvp
def _read_parts_jvp(plan: _Plan, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Readout, Readout]:
    matrix, bias, feats, labels = primals
    with jax.default_matmul_precision("highest"):
        sums, variances = merged(_sums(plan, matrix, bias, feats, labels), plan.axis_names)
        centre = _centre(plan, matrix, feats)
        # Each part and each device gets its own φ̇, and each device its own ẇ and ḃ: transposed, what they add to a
        # gradient is summed once all tiles were read, not tile by tile.
        first_outputs = _first_outputs(plan, bias, labels)
        d_feats = jnp.broadcast_to(tangents[2][None], (len(first_outputs), *feats.shape))
        d_matrix, d_bias, d_feats = varying_like((*tangents[:2], d_feats), (matrix, bias, feats, labels))

        def part(
            first_output: Array, d_feats: Array, matrix: Array, bias: Array, d_matrix: Array, d_bias: Array
        ) -> Readout:
            head, d_head = (LinearHead(*arrays, plan.rows_axis) for arrays in ((matrix, bias), (d_matrix, d_bias)))

            @functools.partial(jax.checkpoint, prevent_cse=False)
            def of_tile(head: LinearHead, d_head: LinearHead, d_feats: Array, sums: OnlineSoftmax, i: Array) -> Readout:
                read = tile(head, centre, feats, first_output, plan.tile_size, i)
                d_rows, d_bias = take_rows(d_head, plan.tile_size, i, feats.dtype)
                return _tile_tangents(sums, variances, read, labels, feats, d_rows, d_bias, d_feats)

            def step(_: None, i: Array) -> tuple[None, Readout]:
                return None, of_tile(head, d_head, d_feats, sums, i)

            # Stacked, and not summed by the scan: a result that is not asked for then costs its transpose nothing.
            d_values = jax.lax.scan(step, None, _tile_indices(plan, head, labels))[1]
            d_values = Readout(*(jnp.sum(x, axis=0) for x in d_values))
            through_label = jnp.sum(_rows_of(head, labels, first_output, feats.dtype) * d_feats, axis=1)
            return d_values._replace(losses=d_values.losses - jnp.where(labels == sums.output, 0, through_label))

        axes = (0, 0, plan.rows_axis, 0, plan.rows_axis, 0)
        d_parts = _over_parts(part, axes, first_outputs, d_feats, matrix, bias, d_matrix, d_bias)
        d_values = Readout(*(total(x, plan.axis_names) for x in d_parts))
        # Σ_s (p_s − [s = y]) ⟨w_s, φ̇⟩ = ⟨c − w_y, φ̇⟩; where y is j, to all digits.
        offsets = sums.offsets()
        means = jnp.where((labels == sums.output)[:, None], offsets, sums.row + centre[None, :] + offsets)
        d_losses = d_values.losses + jnp.sum(means * tangents[2], axis=1)
        return Readout(sums.losses(), sums.traces(), variances), d_values._replace(losses=d_losses)


def _tile_tangents(
    sums: OnlineSoftmax,
    variances: Float[Array, " n"],
    read: Tile,
    labels: Integer[Array, " n"],
    feats: Float[Array, "n m"],
    d_rows: Float[Array, "t m"],
    d_bias: Float[Array, " t"],
    d_feats: Float[Array, "n m"],
) -> Readout:
    """What changes ẇ, ḃ and φ̇ make of ℓ, tr G and v, as far as it is through the rows of one tile.

    With ż the change of the logits, u_s = p_s (‖w_s − c‖² − v):

    * ℓ: Σ_s (p_s − [s = y]) ż_s, less what is through φ̇,
    * tr G: −2 Σ_s p_s (p_s − ‖p‖²) ż_s,
    * v: Σ_s u_s ż_s + 2 Σ_s p_s ⟨w_s − c, ẇ_s⟩.

    Near certainty each of the factors is small, and that of the row j is put together from sums over the other rows.
    """
    total_mass = 1 + sums.mass[:, None]
    is_j, is_y = read.is_output(sums.output), read.is_output(labels)
    p = jnp.exp(read.logits - sums.largest[:, None]) / total_mass
    others = jnp.where(is_j, 0, p)

    by_loss = jnp.where(is_j & is_y, -sums.mass[:, None] / total_mass, p - is_y.astype(p.dtype))

    purity = (1 + sums.squares[:, None]) / total_mass**2
    excess = jnp.where(is_j, (sums.mass - sums.squares)[:, None] / total_mass**2, p - purity)
    by_trace = -2 * p * excess

    offsets = sums.offsets()
    mean = sums.row + offsets
    distances = jnp.sum(read.rows**2, axis=1)[None, :] + jnp.sum(mean**2, axis=1)[:, None] - 2 * (mean @ read.rows.T)
    distances = jnp.where(is_j, jnp.sum(offsets**2, axis=1)[:, None], distances)
    by_variance = p * (distances - variances[:, None])

    d_logits = feats @ d_rows.T + d_bias[None, :]
    d_all_logits = d_logits + d_feats @ read.rows.T
    place, has_j = read.find(sums.output)
    along_others = others @ jnp.sum(read.rows * d_rows, axis=1) - jnp.sum(others * (mean @ d_rows.T), axis=1)
    along_j = jnp.where(has_j, jnp.sum(offsets * d_rows[place], axis=1) / total_mass[:, 0], 0)
    return Readout(
        losses=jnp.sum(by_loss * d_logits, axis=1),
        traces=jnp.sum(by_trace * d_all_logits, axis=1),
        variances=jnp.sum(by_variance * d_all_logits, axis=1) + 2 * (along_others - along_j),
    )


def _sums(
    plan: _Plan, matrix: Float[Array, "_ _ _"], bias: Float[Array, "k p"], feats: Float[Array, "n m"], labels: Array
) -> OnlineSoftmax:
    """Of every part, along a first axis."""
    centre = _centre(plan, matrix, feats)
    nothing = varying_like(OnlineSoftmax.of_no_rows(feats, labels), (matrix, bias, feats, labels))

    def part(first_output: Array, matrix: Array, bias: Array) -> OnlineSoftmax:
        head = LinearHead(matrix, bias, plan.rows_axis)

        def step(sums: OnlineSoftmax, i: Array) -> tuple[OnlineSoftmax, None]:
            return sums.with_tile(tile(head, centre, feats, first_output, plan.tile_size, i), labels), None

        return jax.lax.scan(step, nothing, _tile_indices(plan, head, labels))[0]

    return _over_parts(part, (0, plan.rows_axis, 0), _first_outputs(plan, bias, labels), matrix, bias)


def _centre(plan: _Plan, matrix: Float[Array, "_ _ _"], feats: Float[Array, "n m"]) -> Float[Array, " m"]:
    """The mean row, which nothing depends on but the rounding errors of what all rows share."""
    part_means = jnp.mean(jax.lax.stop_gradient(matrix), axis=plan.rows_axis + 1, dtype=feats.dtype)
    means = jnp.mean(part_means, axis=plan.rows_axis)
    return jax.lax.pmean(means, plan.axis_names) if plan.axis_names else means


def _rows_of(
    head: LinearHead, outputs: Integer[Array, " n"], first_output: Integer[Array, ""], dtype: jnp.dtype
) -> Float[Array, "n m"]:
    """The rows of the outputs that a part has, and 0 for others."""
    places = outputs - first_output
    inside = (places >= 0) & (places < head.num_outputs)
    rows = jnp.take(head.matrix, jnp.clip(places, 0, head.num_outputs - 1), axis=head.rows_axis).astype(dtype)
    return jnp.where(inside[:, None], rows.T if head.rows_axis else rows, 0)


def _over_parts(function: Callable[..., Any], axes: tuple[int, ...], *arrays: Array) -> Any:
    """Maps a function over the axes along which arrays are in parts."""
    if arrays[0].shape[axes[0]] > 1:
        return jax.vmap(function, in_axes=axes)(*arrays)
    # An axis of one entry costs a loop of XLA's a tenth of its time on a CPU.
    result = function(*(jnp.squeeze(array, axis) for array, axis in zip(arrays, axes, strict=True)))
    return jax.tree.map(lambda x: x[None], result)


def _first_outputs(plan: _Plan, bias: Float[Array, "k p"], labels: Integer[Array, " n"]) -> Integer[Array, " k"]:
    num_parts, size = bias.shape
    device = jax.lax.axis_index(plan.axis_names).astype(labels.dtype) if plan.axis_names else 0
    return (device * num_parts + jnp.arange(num_parts, dtype=labels.dtype)) * size


def _tile_indices(plan: _Plan, head: LinearHead, labels: Integer[Array, " n"]) -> Integer[Array, " _"]:
    return jnp.arange(-(-head.num_outputs // plan.tile_size), dtype=labels.dtype)
