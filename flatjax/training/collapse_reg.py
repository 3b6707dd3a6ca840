"""Regularise by neural collapse in any optimizer chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flatjax.collapse.neural_collapse import neural_collapse
from flatjax.training.injection import Strength, check_strength, injection, of_penalty
from flatjax.training.wrappers import with_static_arguments


class CollapseRegState(NamedTuple):
    """The state of `collapse_reg`; in that of a chain, `optax.tree.get(opt_state, "collapse")` finds its value."""

    count: Int[Array, ""]
    """The number of updates so far, which the strength may be a schedule of."""
    collapse: Float[Array, ""]
    """The penalty at the last update, in float32, without λ. It is NaN before the first."""


@with_static_arguments
def collapse_reg(
    strength: Strength,
    penalty: Callable[[Any, Any], Any] | None = None,
    *,
    features: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    num_classes: int | None = None,
    metric: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    count: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the exact gradient of λ times neural collapse to the updates: λ > 0 collapses the classes, λ < 0 spreads.

        NCC = Σ_{c≠c'} (V_c + V_c') / (2‖μ_c − μ_c'‖²),    CDNV = NCC / (C(C − 1))

    over the C classes that have two samples or more in the batch, with μ_c the mean and V_c the mean squared distance
    to it. Call `tx.update(grads, state, params, batch=batch)`. The gradient reaches what makes the features; a head has
    no part in it. Where it stands in a chain, and what it works in, is as for `flat_reg`.

    The same as a term of the loss shares the backward pass: `loss + strength * neural_collapse(head, feats, labels,
    num_classes=C).ncc`.

    Where two means meet, NCC is NaN, as its sum is infinite, and its gradient is not finite. λ < 0 drives there: bound
    the features then, and put `optax.apply_if_finite` around what follows in the chain.

    Args:
        strength: λ, a finite number or a schedule, 0 as for `flat_reg`. NCC is C(C − 1) times CDNV: a λ does not carry
            over.
        penalty: `(params, batch) -> scalar`, differentiable, a measure of collapse of your own; instead of `features`.
        features: `(params, batch) -> (feats (..., m), labels (...,))`.
        num_classes: C of the labels, with `features`.
        metric: "ncc", the default, or "cdnv", with `features`.
        axis_name: as for `flat_reg`; each device then measures its own samples, whose means are fewer than all.
        count: as for `flat_reg`, a function of the batch.

    Returns:
        A transformation whose state is a `CollapseRegState`. Several in a chain are told apart as for `flat_reg`.

    Raises:
        TypeError: as `flat_reg`.
        ValueError: parameters that are hidden, neither or both of `penalty` and `features`, no
            `num_classes`, an unknown metric, or one besides a penalty, or a strength that is no finite number.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flatjax import collapse_reg
        >>> def features(params, batch):
        ...     x, y = batch
        ...     return jnp.tanh(x @ params["kernel"]), y
        >>> x = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)
        >>> params, batch = {"kernel": jnp.eye(3, 4, dtype=jnp.float32)}, (x, jnp.arange(8) % 2)
        >>> tx = optax.chain(collapse_reg(0.1, features=features, num_classes=2), optax.sgd(1.0))
        >>> state, history = tx.init(params), []
        >>> for _ in range(3):
        ...     updates, state = tx.update({"kernel": jnp.zeros((3, 4), jnp.float32)}, state, params, batch=batch)
        ...     params = optax.apply_updates(params, updates)
        ...     history.append(float(optax.tree.get(state, "collapse")))
        >>> history[2] < history[1] < history[0]
        True

    References:
        Galanti, György, Hutter: *On the Role of Neural Collapse in Transfer Learning*, 2022 (CDNV).
        Han, Kamp: *Flattening the Path to Generalization in LLMs*, a talk (NCC, the sum, as a penalty).
    """
    check_strength("collapse_reg", strength)
    if (penalty is None) == (features is None):
        raise ValueError(
            "collapse_reg has neither or both of penalty and features, wanted one of them: features with "
            "num_classes, or a penalty of your own"
        )
    if penalty is not None and (metric is not None or num_classes is not None):
        raise ValueError("collapse_reg has a metric or num_classes besides a penalty, wanted them with features alone")
    if metric not in (None, "ncc", "cdnv"):
        raise ValueError(f"metric is {metric!r}, wanted 'ncc' or 'cdnv'")
    if features is not None and num_classes is None:
        raise ValueError("collapse_reg has features but no num_classes, wanted the number of classes of the labels")

    def of_features(params: Any, batch: Any) -> Float[Array, ""]:
        assert features is not None
        assert num_classes is not None
        feats, labels = features(params, batch)
        head = {"kernel": jnp.eye(jnp.shape(feats)[-1], num_classes, dtype=feats.dtype)}  # has no part in either
        return getattr(neural_collapse(head, feats, labels, num_classes=num_classes), metric or "ncc")

    gradient = of_penalty(of_features if penalty is None else penalty, "collapse_reg", axis_name, count)
    return injection("collapse_reg", strength, gradient, ("batch",), CollapseRegState)
