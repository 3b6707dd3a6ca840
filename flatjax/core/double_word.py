"""Numbers of twice the digits: each is the sum of two, the second being what the first was rounded by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from flatjax.core.sharding import axis_names


class Double(NamedTuple):
    """A number `high + low`, never added up: it has 48 bits in float32."""

    high: Float[Array, "..."]
    low: Float[Array, "..."]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: DTypeLike) -> "Double":
        # Two buffers, as one cannot be donated twice.
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def value(self) -> Float[Array, "..."]:
        """The number, rounded to one of its dtype."""
        return self.high + self.low

    def plus(self, x: Float[Array, "..."]) -> "Double":
        """The sum with x: what the sum of the high parts is rounded by is known without rounding (Knuth)."""
        high, lost = _two_sum(self.high, x)
        return Double(*_two_sum(high, self.low + lost))

    def plus_double(self, other: "Double") -> "Double":
        return self.plus(other.high).plus(other.low)

    def minus(self, other: "Double") -> Float[Array, "..."]:
        """The difference as one number, to rounding of itself however large the two are."""
        return (self.high - other.high) + (self.low - other.low)

    def where(self, condition: Bool[Array, "..."], other: "Double") -> "Double":
        """Takes this number where `condition` is true, and the other one elsewhere."""
        return Double(jnp.where(condition, self.high, other.high), jnp.where(condition, self.low, other.low))

    def sum_over_devices(self, axis_name: str | tuple[str, ...]) -> "Double":
        """The sum along axes of a `jax.shard_map`: it keeps all digits if they are of 2, 4, 8, ... devices."""
        names = axis_names(axis_name)
        # As exact as their number is a power of 2, the devices add what they differ by from their mean.
        num_devices = jax.lax.axis_size(names)
        mean = jax.lax.psum(self.high, names) / num_devices
        rest = jax.lax.psum((self.high - mean) + self.low, names)
        return Double(mean * num_devices, jnp.zeros_like(rest)).plus(rest)


def _two_sum(x: Float[Array, "..."], y: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)
