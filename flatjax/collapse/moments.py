"""Keep what neural collapse is measured on: counts, means and centred squares of the classes, from a stream of batches.

Two sets of samples of a class, of masses a and b and with means δ apart, have together the squares (Chan)

    S = S_a + S_b + ab/(a + b)·‖δ‖².

These are sums of what is not negative, so that nothing cancels: there is no E[x²] − E[x]². A mean in float32 is rounded
to ε times its size, which may exceed the spread around it. After 2²⁴ samples, 1 more would count as none. So means,
masses and squares are kept as `Double`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from flatjax.collapse.batch import Batch, read_batch
from flatjax.core.double_word import Double
from flatjax.core.integers import whole_number
from flatjax.core.metric import metric
from flatjax.core.sharding import axis_names


class ClassMoments(NamedTuple):
    """Statistics of labelled features, immutable: `init`, then `update` with each batch, or `merge` with another's.

    Each batch has features (..., m), labels (...,) in 0 … C − 1, and weights (...,), 1 by default. They may be arrays
    of JAX or NumPy, lists, or tensors that speak DLPack; these enter a `jax.jit` of your own by `jnp.from_dlpack`. A
    sample of weight 0, or of label −100, is padding, and the derivative in its weight is 0. A label out of range, a
    feature that is not finite or a negative weight makes all means and variances NaN, and so every metric.

    Notes:
        With N samples a batch of m features, an update costs O(N·m), and the classes that are not in the batch are not
        touched. At vocabulary scale donate the old moments, and the new ones take their place.

        Weights are summed to 48 bits in float32, and samples counted to 2³¹ − 1 a class, where the count stays. A
        distance to a mean below 1e-19 has no square in float32, and counts as none: scale such features. Without x64
        JAX cuts what enters a `jax.jit` of your own to 32 bits: a label 2³² then is class 0; elsewhere it is bad.

        Orbax saves moments like any tree. It restores them as moments only to a target: `ClassMoments.init` of the same
        arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments
        >>> update = jax.jit(ClassMoments.update, donate_argnums=0)
        >>> moments = ClassMoments.init(num_classes=3, num_features=2)
        >>> for feats, labels in [([[0.0, 1.0], [2.0, 1.0]], [0, 0]), ([[7.0, 1.0], [5.0, 5.0]], [0, 2])]:
        ...     moments = update(moments, jnp.array(feats, jnp.float32), jnp.array(labels))
        >>> print(moments.counts, moments.means[0], moments.variances)
        [3 0 1] [3. 1.] [8.666667 0.       0.      ]

    References:
        Chan, Golub, LeVeque: *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979.
    """

    counts: Int[Array, " C"]
    """The number of samples of each class whose weight is not 0."""
    mass_sums: Double
    """The sum Σω of each class (C,)."""
    centres: Double
    """The means μ_c (C, m); 0 for an empty class."""
    square_sums: Double
    """The centred squares Σ ω‖h − μ_c‖² of each class (C,)."""
    product_sums: Double | None
    """The centred products Σ_c Σ ω (h − μ_c)(h − μ_c)ᵀ (m, m), if asked for."""
    num_bad: Int[Array, ""]
    """The number of samples with a bad label, weight or feature. One of them makes every metric NaN.

    Where a report of a stream is all NaN, look here first, and find the sample with `flatjax.check_inputs` of each
    batch.
    """

    @classmethod
    def init(
        cls, num_classes: int, num_features: int, *, covariance: bool = False, dtype: DTypeLike = jnp.float32
    ) -> "ClassMoments":
        """Moments of no samples yet, to `update` with batches.

        Args:
            num_classes: C, at least 1.
            num_features: m, at least 1.
            covariance: whether to keep the pooled covariance within the classes (m, m) too, which NC1 needs. An update
                then costs O(N·m²).
            dtype: float32 or float64, to keep and to compute in.

        Returns:
            `ClassMoments` of C classes and m features, all of whose counts are 0.

        Raises:
            TypeError: another dtype, or one that JAX has not enabled.
            ValueError: fewer than 1 class or feature.

        Example:
            >>> from flatjax import ClassMoments
            >>> moments = ClassMoments.init(num_classes=3, num_features=2)
            >>> print(moments.counts, moments.means.shape)
            [0 0 0] (3, 2)
        """
        num_classes, num_features = whole_number(num_classes, "num_classes"), whole_number(num_features, "num_features")
        if num_classes < 1 or num_features < 1:
            raise ValueError(f"got {num_classes} classes of {num_features} features, wanted at least one of both")
        if jnp.dtype(dtype) not in (jnp.float32, jnp.float64) or jnp.zeros(0, dtype).dtype != dtype:
            raise TypeError(f"dtype is {jnp.dtype(dtype)}, wanted float32, or float64 with jax_enable_x64")
        return _empty(num_classes, num_features, covariance, jnp.dtype(dtype))

    @property
    def num_classes(self) -> int:
        return self.centres.high.shape[0]

    @property
    def num_features(self) -> int:
        return self.centres.high.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.centres.high.dtype

    @property
    def masses(self) -> Float[Array, " C"]:
        """The sum of weights Σω of each class (C,)."""
        return self._marked(self.mass_sums.value)

    @property
    def means(self) -> Float[Array, "C m"]:
        """The means μ_c (C, m), rounded; 0 for an empty class."""
        return self._marked(self.centres.high)

    @property
    def variances(self) -> Float[Array, " C"]:
        """The mean squared distance to the mean, V_c = Σ ω‖h − μ_c‖² / Σω (C,); 0 for an empty class."""
        return self._marked(self.square_sums.value / _positive(self.mass_sums.value))

    @property
    def covariance(self) -> Float[Array, "m m"]:
        """The covariance Σ_W (m, m) of all samples around the means of their classes.

        Raises:
            ValueError: it was not asked for.
        """
        if self.product_sums is None:
            raise ValueError("the moments have no covariance: ClassMoments.init(..., covariance=True) keeps it")
        return self._marked(self.product_sums.value / jnp.sum(self.mass_sums.value))

    def kept(self, min_count: int = 2) -> Bool[Array, " C"]:
        """Marks classes of so many samples or more.

        One sample is its own mean, and says nothing of the spread around it.
        """
        return self.counts >= min_count

    @metric(placed="as the first")
    def update(
        self,
        feats: Float[Any, "*n m"],
        labels: Integer[Any, "*n"],
        weights: Shaped[Any, "*n"] | None = None,
    ) -> "ClassMoments":
        """Adds one more batch, and returns the new moments.

        Args:
            feats: features (..., m), of a floating dtype no wider than the moments.
            labels: integer classes (...,) in 0 … C − 1; −100 is padding.
            weights: sample weights (...,), all 1 by default; 0 is padding.

        Returns:
            The `ClassMoments` of the samples so far and these.

        Raises:
            TypeError: `feats` are not floating, wider than the moments, or `labels` are no integers. Without x64 JAX
                rounds float64 features of NumPy to float32 before their dtype is seen, and they are taken.
            ValueError: the shapes do not fit each other or the moments.
        """
        return self.with_batch(self.read(feats, labels, weights))

    def read(self, feats: Any, labels: Any, weights: Any) -> Batch:
        """Checks a batch against the moments and flattens it; raises as `update`."""
        return read_batch(
            feats,
            labels,
            weights,
            num_classes=self.num_classes,
            num_features=self.num_features,
            dtype=self.dtype,
        )

    def with_batch(self, batch: Batch) -> "ClassMoments":
        return _updated(self, batch) if len(batch.feats) else self

    def residuals(self, batch: Batch) -> Float[Array, "n m"]:
        """The residuals h_i − μ_c(i), each to rounding of itself."""
        return batch.feats - self.centres.high[batch.classes] - self.centres.low[batch.classes]

    @metric(placed="as the first")
    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Merges the moments of two sets of samples; their order changes nothing beyond rounding.

        Raises:
            ValueError: the moments are of other classes or features, or one has no covariance.
        """
        if jax.tree.map(jnp.shape, self) != jax.tree.map(jnp.shape, other):
            raise ValueError(
                f"moments of {self.num_classes} classes and {self.num_features} features, covariance "
                f"{self.product_sums is not None}, cannot be merged with those of {other.num_classes} classes and "
                f"{other.num_features} features, covariance {other.product_sums is not None}"
            )
        return _merged(self, other)

    def across(self, axis_name: str | tuple[str, ...]) -> "ClassMoments":
        """Merges the moments of all devices along axes of a `jax.shard_map` or `jax.pmap`; all get the same result.

        If the moments are the same on each device already, whatever is in them would count once a device. So either
        each device keeps its own, and `across` comes once at the end; or only what is new goes across,
        `moments.merge(ClassMoments.init(C, m).update(feats, labels).across("data"))`. For `lax.scan` to carry a
        device's own, begin with `jax.lax.pcast(ClassMoments.init(C, m), "data", to="varying")`.

        Notes:
            It takes two `psum` of the size of the means.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from jax.sharding import PartitionSpec as P
            >>> from flatjax.collapse import ClassMoments
            >>> def step(moments, feats, labels):
            ...     new = ClassMoments.init(2, 3).update(feats, labels)
            ...     return moments.merge(new.across("data"))
            >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            >>> sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()))
            >>> moments, feats, labels = ClassMoments.init(2, 3), jnp.ones((4, 3), jnp.float32), jnp.array([0, 1, 0, 0])
            >>> for _ in range(2):
            ...     moments = sharded(moments, feats, labels)
            >>> print(moments.counts)
            [6 2]
        """
        names = axis_names(axis_name)
        masses = self.mass_sums.value[:, None]
        total = jax.lax.psum(masses, names)
        # Near the mean first, and then what that lacks: so what is rounded is of the size of the distances.
        near = jax.lax.psum(masses * self.centres.high, names) / _positive(total)
        near = jax.lax.stop_gradient(near)
        offsets = jnp.where(masses == 0, 0, self.centres.minus(Double(near, jnp.zeros_like(near))))
        offset = jax.lax.psum(masses * offsets, names) / _positive(total)
        shifts = jnp.where(masses == 0, 0, offsets - offset)
        moved = self._plus_shifts(masses[:, 0], shifts)
        return ClassMoments(
            counts=_sum_of_counts_over_devices(self.counts, names),
            mass_sums=self.mass_sums.sum_over_devices(names),
            centres=Double(near, jnp.zeros_like(near)).plus(offset),
            square_sums=moved.square_sums.sum_over_devices(names),
            product_sums=moved.product_sums and moved.product_sums.sum_over_devices(names),
            num_bad=_sum_of_counts_over_devices(self.num_bad, names),
        )

    def _marked(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(self.num_bad > 0, jnp.nan, values)

    def _plus_shifts(self, masses: Float[Array, " C"], shifts: Float[Array, "C m"]) -> "ClassMoments":
        """Adds the squares of masses that are moved off their means."""
        squares = self.square_sums.plus(masses * jnp.sum(shifts**2, axis=1))
        if self.product_sums is None:
            return self._replace(square_sums=squares)
        products = jnp.matmul(shifts.T, masses[:, None] * shifts, precision="highest")
        return self._replace(square_sums=squares, product_sums=self.product_sums.plus(products))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(num_classes: int, num_features: int, covariance: bool, dtype: jnp.dtype) -> ClassMoments:
    return ClassMoments(
        counts=jnp.zeros(num_classes, jnp.int32),
        mass_sums=Double.zeros((num_classes,), dtype),
        centres=Double.zeros((num_classes, num_features), dtype),
        square_sums=Double.zeros((num_classes,), dtype),
        product_sums=Double.zeros((num_features, num_features), dtype) if covariance else None,
        num_bad=jnp.zeros((), jnp.int32),
    )


def _updated(moments: ClassMoments, batch: Batch) -> ClassMoments:
    classes, of_batch = _of_batch(batch, moments)
    # Rows of the classes that are there alone. What is no class is a row of zeros, and goes nowhere.
    per_class = {name: getattr(moments, name) for name in _PER_CLASS}
    before = jax.tree.map(lambda x: x.at[classes].get(mode="fill", fill_value=0, indices_are_sorted=True), per_class)
    after = _merged(moments._replace(**before), of_batch)

    def put(x: Array, rows: Array) -> Array:
        return x.at[classes].set(rows, mode="drop", indices_are_sorted=True)

    return after._replace(
        **{name: jax.tree.map(put, x, getattr(after, name)) for name, x in per_class.items()},
    )


def _of_batch(batch: Batch, like: ClassMoments) -> tuple[Integer[Array, " k"], ClassMoments]:
    """The classes of a batch, C for none, and the moments of these, one row each."""
    feats, weights, num_classes = batch.feats, batch.weights, like.num_classes
    num_rows = min(len(feats), num_classes + 1)
    classes, firsts, rows = jnp.unique(
        batch.labels, size=num_rows, fill_value=num_classes, return_index=True, return_inverse=True
    )

    def per_row(values: Array) -> Array:
        return jax.ops.segment_sum(values, rows, num_rows)

    masses = per_row(weights)
    # From one of the samples first: what is rounded then is of the size of the spread.
    origins = jax.lax.stop_gradient(feats[firsts])
    offsets = feats - origins[rows]
    means = per_row(weights[:, None] * offsets) / _positive(masses)[:, None]
    residuals = offsets - means[rows]
    lacking = per_row(weights[:, None] * residuals) / _positive(masses)[:, None]
    moments = ClassMoments(
        counts=per_row((weights != 0).astype(jnp.int32)),
        mass_sums=Double(masses, jnp.zeros_like(masses)),
        centres=Double(origins, jnp.zeros_like(origins)).plus(means).plus(lacking),
        square_sums=Double(per_row(weights * jnp.sum(residuals**2, axis=1)), jnp.zeros_like(masses)),
        product_sums=None,
        num_bad=batch.num_bad,
    )
    if like.product_sums is not None:
        products = jnp.matmul(residuals.T, weights[:, None] * residuals, precision="highest")
        moments = moments._replace(product_sums=Double(products, jnp.zeros_like(products)))
    return classes, moments._plus_shifts(-masses, lacking)


_PER_CLASS = ("counts", "mass_sums", "centres", "square_sums")


def _merged(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    masses = a.mass_sums.plus_double(b.mass_sums)
    of_a, of_b = a.mass_sums.value, b.mass_sums.value
    share = of_b / _positive(masses.value)
    shifts = jnp.where(((of_a == 0) | (of_b == 0))[:, None], 0, b.centres.minus(a.centres))
    joint = ClassMoments(
        counts=_sum_of_counts(a.counts, b.counts),
        mass_sums=masses,
        centres=b.centres.where((of_a == 0)[:, None], a.centres.plus(share[:, None] * shifts)),
        square_sums=a.square_sums.plus_double(b.square_sums),
        product_sums=a.product_sums and b.product_sums and a.product_sums.plus_double(b.product_sums),
        num_bad=_sum_of_counts(a.num_bad, b.num_bad),
    )
    return joint._plus_shifts(of_a * share, shifts)


def _sum_of_counts(a: Int[Array, "..."], b: Int[Array, "..."]) -> Int[Array, "..."]:
    """The sum, or the largest number there is where the sum is too large for its dtype."""
    return jnp.where(a + b < a, jnp.iinfo(a.dtype).max, a + b)


def _sum_of_counts_over_devices(counts: Int[Array, "..."], names: tuple[str, ...]) -> Int[Array, "..."]:
    total, rounded = (jax.lax.psum(counts.astype(dtype), names) for dtype in (counts.dtype, jnp.float32))
    return jnp.where(rounded >= 2.0**31, jnp.iinfo(total.dtype).max, total)


def check_moments(moments: Any) -> None:
    """Raises a TypeError for what is no `ClassMoments`."""
    if not isinstance(moments, ClassMoments):
        is_array = isinstance(moments, jax.Array)
        got = f"an array of shape {moments.shape}" if is_array else f"a {type(moments).__name__}"
        raise TypeError(f"moments is {got}, wanted ClassMoments: ClassMoments.init(C, m).update(feats, labels)")


def _positive(masses: Float[Array, "..."]) -> Float[Array, "..."]:
    """Masses to divide by, 1 in the place of 0: where there is no mass, what is divided is 0 too."""
    return jnp.where(masses == 0, 1, masses)
