"""Read off a head of any size what softmax cross-entropy makes of each sample, without its logits in memory.

The variance of the rows under the predicted probabilities, v = Σ_s p_s ‖w_s − c‖² with c = Σ_s p_s w_s, is a read-out
like that of attention: the features are queries, the rows keys, and (w_s, ‖w_s‖²) values. So the rows can be taken in
tile by tile, at a cost of two products of matrices, n·d·m each, and a memory of O(n·(m + t) + t·m).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flatjax.core.sharding import varying_like
from flatjax.flatness.frame import Frame, frame_of, unit_of
from flatjax.flatness.inputs import check_tile_size
from flatjax.flatness.parts import AxisNames, SplitHead, map_parts, split, total
from flatjax.flatness.tiled.online_softmax import OnlineSoftmax, merged
from flatjax.flatness.tiled.tiles import Tile, rows_of, take_rows, tile, tile_indices
from flatjax.heads import LinearHead

LOGITS_AT_ONCE = 2**22
"""How many logits a device holds at once, unless a tile's rows were then too few for a fast product of matrices."""
FEWEST_ROWS = 512


class Readout(NamedTuple):
    """How far the loss of each sample has fallen and how it curves, in the logits."""

    losses: Float[Array, " n"]
    """The losses ℓ = −log p_y."""
    traces: Float[Array, " n"]
    """The traces tr G = 1 − ‖p‖²."""
    flatness: Float[Array, " n"]
    """Each sample's ‖φ‖² v, with v = tr(Wᵀ G W)."""


def read_out(
    head: LinearHead,
    feats: Float[Array, "n m"],
    labels: Integer[Array, " n"] | None = None,
    *,
    tile_size: int | None = None,
    axis_names: AxisNames = (),
) -> Readout:
    """Reads a head in tiles of `tile_size` rows; inside a `jax.shard_map`, a head split by rows along `axis_names`.

    The losses alone depend on the labels: without `labels` they are those of class 0.

    Raises:
        TypeError: `tile_size` is no integer.
        ValueError: `tile_size` is below 1.
    """
    check_tile_size(tile_size)
    unit = unit_of(head, axis_names)
    parts = split(head, axis_names, feats)
    frame = frame_of(parts, feats, unit)
    feats = feats * frame.unit
    if labels is None:
        labels = jnp.zeros_like(feats[:, 0], int)
    num_parts = len(parts.bias)
    if tile_size is None:
        tile_size = max(FEWEST_ROWS, num_parts * LOGITS_AT_ONCE // len(feats))
    rows_of_part = -(-int(tile_size) // num_parts)
    values = _read_out(min(rows_of_part, parts.num_rows), parts, frame, feats, labels)
    return Readout(values.losses, values.traces, jnp.sum(feats**2, axis=1) * values.variances)


class _Values(NamedTuple):
    """The values of a `Readout`, but for the squares of the features."""

    losses: Float[Array, " n"]
    traces: Float[Array, " n"]
    variances: Float[Array, " n"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _read_out(
    tile_size: int, head: SplitHead, frame: Frame, feats: Float[Array, "n m"], labels: Integer[Array, " n"]
) -> _Values:
    return _read_sums(tile_size, head, frame, feats, labels)[1]


# The derivative is given forward, linear in the tangents: transposed, it is the gradient, which takes the tiles one by
# one and makes their logits again; and made of nothing but operations of JAX, it has derivatives of both kinds itself.
@_read_out.defjvp
def _read_out_jvp(tile_size: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[_Values, _Values]:
    (head, frame, feats, labels), (d_head, _, d_feats, _) = primals, tangents
    with jax.default_matmul_precision("highest"):
        sums, values = _read_sums(tile_size, head, frame, feats, labels)
        first_outputs = head.first_outputs(labels.dtype)
        # Each part and each device gets its own φ̇, and each device its own ẇ and ḃ: transposed, what they add to a
        # gradient is summed once all tiles were read, not tile by tile.
        d_feats_of_parts = jnp.broadcast_to(d_feats[None], (len(first_outputs), *feats.shape))
        d_head, d_feats_of_parts = varying_like((d_head, d_feats_of_parts), primals)

        def of_part(head: LinearHead, d_head: LinearHead, first_output: Array, d_feats: Array) -> _Values:
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def of_tile(head: LinearHead, d_head: LinearHead, d_feats: Array, sums: OnlineSoftmax, i: Array) -> _Values:
                read = tile(head, frame, feats, first_output, tile_size, i)
                d_rows, d_bias = take_rows(d_head, tile_size, i, feats.dtype)
                d_rows = d_rows / frame.unit
                return _tile_tangents(sums, values.variances, read, labels, feats, d_rows, d_bias, d_feats)

            def step(_: None, i: Array) -> tuple[None, _Values]:
                return None, of_tile(head, d_head, d_feats, sums, i)

            # Stacked, and not summed by the scan: a result that is not asked for then costs its transpose nothing.
            d_values = jax.lax.scan(step, None, tile_indices(head, tile_size, labels.dtype))[1]
            d_values = _Values(*(jnp.sum(x, axis=0) for x in d_values))
            through_label = jnp.sum(rows_of(head, frame, labels - first_output) * d_feats, axis=1)
            return d_values._replace(losses=d_values.losses - jnp.where(labels == sums.output, 0, through_label))

        d_parts = map_parts(of_part, (head, d_head), first_outputs, d_feats_of_parts)
        d_values = _Values(*(total(x, head.axis_names) for x in d_parts))
        # Σ_s (p_s − [s = y]) ⟨w_s, φ̇⟩ = ⟨c − w_y, φ̇⟩; where y is j, to all digits.
        offsets = sums.offsets()
        means = jnp.where((labels == sums.output)[:, None], offsets, sums.row + offsets)
        return values, d_values._replace(losses=d_values.losses + jnp.sum(means * d_feats, axis=1))


def _tile_tangents(
    sums: OnlineSoftmax,
    variances: Float[Array, " n"],
    read: Tile,
    labels: Integer[Array, " n"],
    feats: Float[Array, "n m"],
    d_rows: Float[Array, "t m"],
    d_bias: Float[Array, " t"],
    d_feats: Float[Array, "n m"],
) -> _Values:
    """What changes ẇ, ḃ and φ̇ make of ℓ, tr G and v, as far as it is through the rows of one tile.

    With ż the change of the logits, u_s = p_s (‖w_s − c‖² − v):

    * ℓ: Σ_s (p_s − [s = y]) ż_s, less what is through φ̇,
    * tr G: −2 Σ_s p_s (p_s − ‖p‖²) ż_s,
    * v: Σ_s u_s ż_s + 2 Σ_s p_s ⟨w_s − c, ẇ_s⟩.

    Near certainty each of the factors is small, and that of the row j is put together from sums over the other rows.
    """
    total_mass = 1 + sums.mass[:, None]
    is_j, is_y = read.is_output(sums.output), read.is_output(labels)
    others = jnp.where(is_j, 0, jnp.exp(read.logits - sums.largest[:, None])) / total_mass
    p = jnp.where(is_j, 1 / total_mass, others)

    # p_j − 1 is −q/(1 + q): taken as a difference, it would have no digits once p_j rounds to 1.
    by_loss = jnp.where(is_j & is_y, -sums.mass[:, None] / total_mass, p - is_y.astype(p.dtype))

    # ‖p‖² = (1 + Σe²)/(1 + q)², and p_j − ‖p‖² = (q − Σe²)/(1 + q)², where the ones have already cancelled.
    purity = (1 + sums.squares[:, None]) / total_mass**2
    excess = jnp.where(is_j, (sums.mass - sums.squares)[:, None] / total_mass**2, p - purity)
    by_trace = -2 * p * excess

    # ‖w_s − c‖² by one product of matrices. That of j is small near certainty, and comes from c − w_j itself.
    offsets = sums.offsets()
    mean = sums.row + offsets
    distances = jnp.sum(read.rows**2, axis=1)[None, :] + jnp.sum(mean**2, axis=1)[:, None] - 2 * (mean @ read.rows.T)
    distances = jnp.where(is_j, jnp.sum(offsets**2, axis=1)[:, None], distances)
    by_variance = p * (distances - variances[:, None])

    # What the loss changes by through φ̇ is ⟨c − w_y, φ̇⟩, added once after all tiles: here ż is without it.

    d_logits = feats @ d_rows.T + d_bias[None, :]
    d_all_logits = d_logits + d_feats @ read.rows.T
    # Σ_s p_s ⟨w_s − c, ẇ_s⟩: for j the factor w_j − c is −`offsets`, which is known better than the difference.
    place, has_j = read.find(sums.output)

    along_others = others @ jnp.sum(read.rows * d_rows, axis=1) - jnp.sum(others * (mean @ d_rows.T), axis=1)
    along_j = jnp.where(has_j, jnp.sum(offsets * d_rows[place], axis=1) / total_mass[:, 0], 0)
    return _Values(
        losses=jnp.sum(by_loss * d_logits, axis=1),
        traces=jnp.sum(by_trace * d_all_logits, axis=1),
        variances=jnp.sum(by_variance * d_all_logits, axis=1) + 2 * (along_others - along_j),
    )


def _read_sums(
    tile_size: int, head: SplitHead, frame: Frame, feats: Float[Array, "n m"], labels: Integer[Array, " n"]
) -> tuple[OnlineSoftmax, _Values]:
    nothing = varying_like(OnlineSoftmax.of_no_rows(feats, labels), (head, frame, feats, labels))

    def of_part(head: LinearHead, first_output: Array) -> OnlineSoftmax:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(sums: OnlineSoftmax, i: Array) -> tuple[OnlineSoftmax, None]:
            return sums.with_tile(tile(head, frame, feats, first_output, tile_size, i), labels), None

        return jax.lax.scan(step, nothing, tile_indices(head, tile_size, labels.dtype))[0]

    sums, variances = merged(map_parts(of_part, (head,), head.first_outputs(labels.dtype)), head.axis_names)
    return sums, _Values(sums.losses(), sums.traces(), variances)
