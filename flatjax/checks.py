"""Name the sample that is to blame for a NaN."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import checkify

from flatjax.core.metric import metric
from flatjax.flatness.inputs import Loss, read_samples
from flatjax.heads import HeadParams
from flatjax.samples import Features, Labels, Weights


@metric(compiled=False)
def check_inputs(
    params: HeadParams,
    feats: Features,
    labels: Labels,
    weights: Weights | None = None,
    *,
    loss: Loss = "softmax_cross_entropy",
) -> None:
    """Raises an error that names the first sample whose values make a metric of the same arguments NaN.

    The metrics themselves do not raise, as compiled code cannot. Inside `jit` this function cannot either, unless
    `jax.experimental.checkify.checkify` takes its error out.

    Args:
        params: the head, as for `relative_flatness`, and so are the other arguments.
        feats: features (..., m).
        labels: integer classes (...,), or targets (..., d).
        weights: sample weights (...,); what a sample of weight 0 holds is not checked.
        loss: a name, or any callable. Nothing is known of a callable's labels, and so they are not checked.

    Raises:
        checkify.JaxRuntimeError: a feature, a weight or the head is not finite, a label is out of range, a weight is
            negative, or all are 0. A bias of −∞ leaves its output out. It is named where no output is left, or where
            the loss is "squared_error", which has no such outputs.
        TypeError, ValueError: as `relative_flatness`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.experimental import checkify
        >>> from flatjax import check_inputs
        >>> arguments = {"kernel": jnp.ones((1, 3))}, jnp.array([[1.0], [2.0]]), jnp.array([0, 7])
        >>> error, _ = checkify.checkify(jax.jit(check_inputs))(*arguments)
        >>> print(error.get())
        labels[1] is 7; wanted 0 <= label < 3, or -100 or weight 0 (`check` failed)
    """
    head, samples = read_samples(params, feats, labels, loss, weights)
    checkify.check(jnp.all(jnp.isfinite(head.matrix)), "the weight of the head holds a NaN or an infinity")
    is_left_out = jnp.full_like(head.bias, False, bool) if loss == "squared_error" else head.bias == -jnp.inf
    good_bias = jnp.isfinite(head.bias) | is_left_out
    checkify.check(jnp.all(good_bias), "the bias of the head holds a NaN or an infinity")
    if loss == "softmax_cross_entropy":
        checkify.check(~jnp.all(is_left_out), "all biases of the head are -inf, which leaves no output")
    checkify.check(jnp.any(samples.counts), "all weights are 0, or all labels ignored")
    for bad, message, details in samples.flaws:
        first = bad.argmax()
        named: dict[str, Any] = {name: values[first] for name, values in details.items()}
        checkify.check(~bad.any(), message, i=first, **named)
