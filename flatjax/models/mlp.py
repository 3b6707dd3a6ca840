"""A multilayer perceptron with a linear head."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu}


class MLP(nnx.Module):
    """Dense layers with an activation after each but the last, the head.

        φ = a(W_l ⋯ a(W_1 x + b_1) ⋯ + b_l),    z = W φ + b

    Samples do not interact and there is no state beside the parameters. With ReLU the second derivative is that of the
    piece of the function on which the parameters lie.

    Args:
        widths: those of the input, of each hidden layer, and of the output; at least two. If there are two, the
            features are the input.
        activation: "relu", "tanh", or "gelu" in its tanh form.

    Raises:
        ValueError: fewer than two widths, or an unknown activation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = MLP((4, 8, 3), activation="tanh", rngs=nnx.Rngs(0))
        >>> x, y = jnp.ones((5, 4), jnp.float32), jnp.zeros((5, 3), jnp.float32)
        >>> model(x).shape, model.features(x).shape
        ((5, 3), (5, 8))
        >>> graphdef, params = nnx.split(model)
        >>> def loss(params, x, y):
        ...     return 0.5 * jnp.mean(jnp.sum((nnx.merge(graphdef, params)(x) - y) ** 2, axis=1))
        >>> _, product = jax.jvp(lambda params: jax.grad(loss)(params, x, y), (params,), (params,))
        >>> product["head"]["kernel"].shape
        (8, 3)
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        activation: Literal["relu", "tanh", "gelu"] = "relu",
        rngs: nnx.Rngs,
    ):
        if len(widths) < 2:
            raise ValueError(f"widths is {tuple(widths)}, wanted that of the input, of hidden layers and of the output")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(map(repr, _ACTIVATIONS))}")
        *hidden, num_outputs = widths
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(hidden)])
        self.activation = _ACTIVATIONS[activation]
        self.head = nnx.Linear(hidden[-1], num_outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "*n k"]) -> Float[Array, "*n d"]:
        return self.head(self.features(x))

    def features(self, x: Float[Array, "*n k"]) -> Float[Array, "*n m"]:
        """The features that enter the head."""
        for layer in self.layers:
            x = self.activation(layer(x))
        return x
