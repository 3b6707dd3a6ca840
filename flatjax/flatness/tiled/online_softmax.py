"""Softmax sums over the rows of a head, taken in tile by tile, in a form that keeps its digits at any confidence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from flatjax.flatness.parts import AxisNames, total, total_max
from flatjax.flatness.tiled.tiles import Tile


class OnlineSoftmax(NamedTuple):
    """What the rows read so far leave behind: the row j of the largest logit, and sums over all others, s ≠ j.

    The sums are in units of exp(z_j), e_s = exp(z_s − z_j). As a sample becomes certain they all fall to 0, and nothing
    is left that could cancel. With q = Σ e_s the loss is log(1 + q), if j is the label, and p_j is 1/(1 + q).
    """

    largest: Float[Array, "*k n"]
    """The largest logit so far, z_j."""
    output: Integer[Array, "*k n"]
    """The output j that it is of; −1 before any row is read."""
    row: Float[Array, "*k n m"]
    """The row w_j of the largest logit."""
    mass: Float[Array, "*k n"]
    """The sum q = Σ e_s over all others."""
    squares: Float[Array, "*k n"]
    """The sum Σ e_s² over all others."""
    norms: Float[Array, "*k n"]
    """The sum Σ e_s ‖w_s‖² over all others."""
    rows: Float[Array, "*k n m"]
    """The sum Σ e_s w_s over all others."""
    label_logit: Float[Array, "*k n"]
    """The label's logit z_y, or 0 until the label's row is read."""

    @classmethod
    def of_no_rows(cls, feats: Float[Array, "n m"], labels: Integer[Array, " n"]) -> "OnlineSoftmax":
        zeros, no_rows = jnp.zeros_like(feats[:, 0]), jnp.zeros_like(feats)
        lowest = jnp.full_like(zeros, jnp.finfo(feats.dtype).min)
        return cls(lowest, jnp.full_like(labels, -1), no_rows, zeros, zeros, zeros, no_rows, zeros)

    def with_tile(self, tile: Tile, labels: Integer[Array, " n"]) -> "OnlineSoftmax":
        """Takes in the rows of a tile."""
        place = _first_largest(tile.logits, labels.dtype)
        challenger = _at(tile.logits, place)
        beaten = challenger > self.largest
        largest = jnp.where(beaten, challenger, self.largest)
        is_reference = tile.places[None, :] == jnp.where(beaten, place, -1)[:, None]
        e = jnp.where(is_reference, 0, jnp.exp(tile.logits - largest[:, None]))
        before = self.relative_to(largest, ~beaten)
        label_place, has_label = tile.find(labels)
        return OnlineSoftmax(
            largest=largest,
            output=jnp.where(beaten, tile.output + place, self.output),
            row=jnp.where(beaten[:, None], tile.rows[place], self.row),
            mass=before.mass + jnp.sum(e, axis=1),
            squares=before.squares + jnp.sum(e**2, axis=1),
            norms=before.norms + e @ jnp.sum(tile.rows**2, axis=1),
            rows=before.rows + e @ tile.rows,
            label_logit=self.label_logit + jnp.where(has_label, _at(tile.logits, label_place), 0),
        )

    def losses(self) -> Float[Array, " n"]:
        """The losses log(1 + q) + z_j − z_y."""
        return jnp.log1p(self.mass) + (self.largest - self.label_logit)

    def traces(self) -> Float[Array, " n"]:
        """The traces tr G = 1 − ‖p‖²."""
        return (2 * self.mass + self.mass**2 - self.squares) / (1 + self.mass) ** 2

    def variances(self) -> Float[Array, " n"]:
        """v = Σ p_s ‖w_s − c‖² = [Σ e_s ‖w_s − w_j‖² − ‖Σ e_s (w_s − w_j)‖² / (1 + q)] / (1 + q)."""
        scale = self._scale()
        mass, norms, rows = self.mass / scale, self.norms / scale, self.rows / scale[:, None]
        about_j = norms + mass * jnp.sum(self.row**2, axis=1) - 2 * jnp.sum(rows * self.row, axis=1)
        square = jnp.sum((rows - mass[:, None] * self.row) ** 2, axis=1)
        return scale * (about_j - scale * square / (1 + self.mass)) / (1 + self.mass)

    def offsets(self) -> Float[Array, "n m"]:
        """c − w_j = Σ e_s (w_s − w_j) / (1 + q)."""
        return (self.rows - self.mass[:, None] * self.row) / (1 + self.mass[:, None])

    def _scale(self) -> Float[Array, " n"]:
        """A constant in whose units the sums are as large as rows, and no product of theirs underflows."""
        return jax.lax.stop_gradient(jnp.where(self.mass == 0, 1, self.mass))

    def relative_to(self, largest: Float[Array, "*#k n"], stays: Bool[Array, "*k n"]) -> "OnlineSoftmax":
        """The sums in units of another largest logit; a row j that does not stay the reference goes back into them."""
        unit = jnp.exp(self.largest - largest)
        returned = jnp.where(stays | (self.output < 0), 0, unit)
        return self._replace(
            mass=unit * self.mass + returned,
            squares=unit**2 * self.squares + returned**2,
            norms=unit * self.norms + returned * jnp.sum(self.row**2, axis=-1),
            rows=unit[..., None] * self.rows + returned[..., None] * self.row,
        )


def merged(parts: OnlineSoftmax, axis_names: AxisNames) -> tuple[OnlineSoftmax, Float[Array, " n"]]:
    """The sums over all parts, and the variances v.

    Each v is worked out where w_j was read: if it is all that is asked for, and no derivative of it, w_j is not sent.
    """
    largest = total_max(jax.lax.stop_gradient(parts.largest), axis_names)
    # Of several largest logits the first is j.
    contenders = jnp.where(parts.largest == largest[None], parts.output, jnp.iinfo(parts.output.dtype).max)
    holds_j = parts.output == -total_max(-contenders, axis_names)[None]
    largest = total(jnp.where(holds_j, parts.largest, 0), axis_names)
    output = total(jnp.where(holds_j, parts.output, 0), axis_names)
    relative = parts.relative_to(largest[None], holds_j)
    sums = OnlineSoftmax(
        largest=largest,
        output=output,
        row=total(jnp.where(holds_j[..., None], parts.row, 0), axis_names),
        mass=jnp.where(output < 0, jnp.nan, total(relative.mass, axis_names)),  # every logit is −∞
        squares=total(relative.squares, axis_names),
        norms=total(relative.norms, axis_names),
        rows=total(relative.rows, axis_names),
        label_logit=total(parts.label_logit, axis_names),
    )
    variances = jax.vmap(lambda row: sums._replace(row=row).variances())(parts.row)
    return sums, total(jnp.where(holds_j, variances, 0), axis_names)


def _first_largest(logits: Float[Array, "n t"], dtype: jnp.dtype) -> Integer[Array, " n"]:
    """The place that argmax gives, from reductions of floats: XLA vectorises these on a CPU, and argmax not.

    Places are floats here: in float32 they are exact up to 2²⁴ rows a tile.
    """
    logits = jax.lax.stop_gradient(logits)
    places = jnp.arange(logits.shape[1], dtype=logits.dtype)
    is_largest = logits == jnp.max(logits, axis=1)[:, None]
    return jnp.min(jnp.where(is_largest, places[None, :], places[-1]), axis=1).astype(dtype)


def _at(logits: Float[Array, "n t"], places: Integer[Array, " n"]) -> Float[Array, " n"]:
    return jnp.take_along_axis(logits, places[:, None], axis=1)[:, 0]
