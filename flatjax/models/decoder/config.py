"""The configurations of decoders, by which they are GPT-2, GPT-NeoX, Llama, Qwen-2 or Qwen-3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Llama-3's stretching of rotary positions to a context longer than the one trained on at first.

    Turns slower than `low_frequency_factor` a context are slowed by `factor`. Those faster than `high_frequency_factor`
    are kept. What lies between goes over from one to the other.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    context: int
    """The context that was trained on at first."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The kind of a `Decoder`; the defaults are a small Llama's.

    `dataclasses.asdict` gives what JSON can hold, and `DecoderConfig(**values)` reads it again.

    Raises:
        ValueError: sizes that do not divide, or an unknown kind.

    Example:
        >>> import dataclasses, json
        >>> config = DecoderConfig(vocab_size=11, width=8, depth=2, num_heads=4, num_key_value_heads=2)
        >>> DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
        True
    """

    vocab_size: int
    width: int
    """The width of the residual stream."""
    depth: int
    num_heads: int
    num_key_value_heads: int | None = None
    """The number of heads of keys and values, each shared by `num_heads / num_key_value_heads` queries.

    By default `num_heads`.
    """
    head_width: int | None = None
    """The width of a head; by default `width / num_heads`."""
    inner_width: int | None = None
    """The width of the perceptrons; by default `4 width`."""
    context: int = 1024
    """The number of positions, if they are learned."""
    positions: Literal["learned", "rotary"] = "rotary"
    rotary_share: float = 1.0
    """The share of a head's width that is rotated."""
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | Mapping[str, Any] | None = None
    """The stretching of rotary positions; a mapping, as JSON has it, is read too."""
    norm: Literal["layer", "rms"] = "rms"
    norm_epsilon: float = 1e-6
    activation: Literal["gelu", "gelu_tanh", "silu"] = "silu"
    gated: bool = True
    parallel: bool = False
    """Whether attention and perceptron of a block read the same stream."""
    query_key_value_bias: bool = False
    output_bias: bool = False
    perceptron_bias: bool = False
    query_key_norm: bool = False
    tied: bool = True
    """Whether the head is the token embedding."""

    def __post_init__(self):
        if isinstance(self.rotary_scaling, Mapping):
            object.__setattr__(self, "rotary_scaling", RotaryScaling(**self.rotary_scaling))
        if self.head_width is None:
            _check_divides("num_heads", self.num_heads, "width", self.width)
        _check_divides("num_key_value_heads", self.num_key_value_heads or 1, "num_heads", self.num_heads)
        _check_one_of("positions", self.positions, "learned", "rotary")
        _check_one_of("norm", self.norm, "layer", "rms")
        _check_one_of("activation", self.activation, "gelu", "gelu_tanh", "silu")
        if self.positions == "rotary" and (not 0 < self.rotary_share <= 1 or self.rotary_width % 2):
            raise ValueError(
                f"rotary_share is {self.rotary_share} of heads of width {self.width_of_a_head}, wanted it above 0, at "
                "most 1, and of an even width"
            )

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def width_of_a_head(self) -> int:
        return self.head_width or self.width // self.num_heads

    @property
    def width_within(self) -> int:
        """The width of the perceptrons."""
        return self.inner_width or 4 * self.width

    @property
    def rotary_width(self) -> int:
        """How much of a head is rotated."""
        return int(self.rotary_share * self.width_of_a_head)


def _check_divides(name: str, divisor: int, of_name: str, number: int) -> None:
    if divisor < 1 or number % divisor:
        raise ValueError(f"{name} is {divisor}, wanted a divisor of {of_name}, {number}")


def _check_one_of(name: str, value: Any, *wanted: str) -> None:
    if value not in wanted:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(map(repr, wanted))}")
