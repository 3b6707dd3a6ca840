"""Read what a published config.json says of a decoder; what the decoder does not do is refused by name."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flatjax.loading.files import listed, shown
from flatjax.loading.values import Values
from flatjax.models.decoder.config import DecoderConfig, RotaryScaling

Json = Mapping[str, Any]


def read_config(config: Json, file: str = "config.json") -> DecoderConfig:
    """Reads the decoder that a config.json describes; a null stands for the default.

    Args:
        config: the object, as `json.load` reads it.
        file: the file that errors name.

    Raises:
        ValueError: it is of another family, without a size, with a value of another kind than its key has, or with
            something that the decoder does not do.
    """
    kind = family_of(config, file)
    family, values = _FAMILIES[kind], Values(config)
    missing = [key for key in family.sizes.values() if key not in values.given]
    if missing:
        raise ValueError(f"{file} of a {kind!r} lacks {', '.join(missing)}")
    options: dict[str, Any] = {name: values.size(key) for name, key in family.sizes.items()}
    options |= {"tied": values.flag("tie_word_embeddings", kind == "gpt2")} | family.read(values)
    key, default = family.activation
    activation = values.given.get(key, default)
    refused = _refused(values.given, family)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        refused.append(f"{key} is {shown(activation)}, wanted one of {', '.join(map(repr, _ACTIVATIONS))}")
    if family.rotary is not None:
        rotary, refused_rotary = _rotary(values, family.rotary, options["context"])
        options, refused = options | rotary, refused + refused_rotary
    if refused:
        raise ValueError(f"{file} of a {kind!r} asks for what the decoder does not do: {listed(refused)}")
    if problems := values.problems or _unfitting(options, family):
        raise ValueError(f"{file} of a {kind!r} is malformed: {listed(problems)}")
    return DecoderConfig(**options | {"activation": _ACTIVATIONS[activation]})


def family_of(config: Json, file: str = "config.json") -> str:
    """Reads which family a config.json is of.

    Raises:
        ValueError: there is none, or no decoder of it.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"{file} has model_type {shown(kind)}, wanted one of {', '.join(map(repr, _FAMILIES))}")
    return kind


def depth_key(kind: str) -> str:
    """The key that a family's config.json has for the number of blocks."""
    return _FAMILIES[kind].sizes["depth"]


class _Rotary(NamedTuple):
    """Keys that older files have beside the others, and the default of the second."""

    base: str
    share: str
    default_share: float
    may_be_shared: bool
    """Whether a part of a head's width may stay as it is."""


class _Family(NamedTuple):
    architecture: str
    sizes: Mapping[str, str]
    """Keys that have to be there, by what a `DecoderConfig` calls them."""
    activation: tuple[str, str]
    """The key of the activation, and its default."""
    fixed: Json
    """Keys that change what is computed, and the one value that the decoder computes."""
    rotary: _Rotary | None
    """The keys of rotary positions; None for learned positions."""
    read: Callable[[Values], dict[str, Any]]
    """Reads everything else from a config.json."""


def _gpt2(values: Values) -> dict[str, Any]:
    return {
        "inner_width": values.size("n_inner"),
        "positions": "learned",
        "norm": "layer",
        "norm_epsilon": values.number("layer_norm_epsilon", 1e-5),
        "gated": False,
        "query_key_value_bias": True,
        "output_bias": True,
        "perceptron_bias": True,
    }


def _gpt_neox(values: Values) -> dict[str, Any]:
    has_bias = values.flag("attention_bias", True)
    return {
        "norm": "layer",
        "norm_epsilon": values.number("layer_norm_eps", 1e-5),
        "gated": False,
        "parallel": values.flag("use_parallel_residual", True),
        "query_key_value_bias": has_bias,
        "output_bias": has_bias,
        "perceptron_bias": True,
    }


def _llama(values: Values) -> dict[str, Any]:
    has_bias = values.flag("attention_bias", False)
    return {
        "num_key_value_heads": values.size("num_key_value_heads"),
        "head_width": values.size("head_dim"),
        "norm_epsilon": values.number("rms_norm_eps", 1e-6),
        "query_key_value_bias": has_bias,
        "output_bias": has_bias,
        "perceptron_bias": values.flag("mlp_bias", False),
    }


def _qwen2(values: Values) -> dict[str, Any]:
    return _llama(values) | {"query_key_value_bias": True, "output_bias": False, "perceptron_bias": False}


def _qwen3(values: Values) -> dict[str, Any]:
    return _llama(values) | {
        "head_width": values.size("head_dim", 128),
        "query_key_norm": True,
        "perceptron_bias": False,
    }


def _refused(given: Json, family: _Family) -> list[str]:
    """Lists what changes the computation to something that the decoder does not compute."""
    refused = [f"{key} is {shown(given[key])}" for key in _NEVER if given.get(key)]
    for key, wanted in {"architectures": [family.architecture], **family.fixed}.items():
        if given.get(key, wanted) != wanted:
            refused.append(f"{key} is {shown(given[key])}, wanted {wanted!r}")
    layers = given.get("layer_types", [])
    if not isinstance(layers, list):
        return [*refused, f"layer_types is {shown(layers)}, wanted a list"]
    others = sorted({shown(each) for each in layers if each != "full_attention"})
    return refused + [f"layer_types has {each}, wanted 'full_attention'" for each in others]


def _rotary(values: Values, keys: _Rotary, context: int) -> tuple[dict[str, Any], list[str]]:
    """Reads the options of rotary positions, and lists what of them is refused."""
    name = "rope_scaling" if values.given.get("rope_scaling") else "rope_parameters"
    inner = values.inner(name)
    base = inner.number("rope_theta", values.number(keys.base, 10_000.0))
    share = inner.number("partial_rotary_factor", values.number(keys.share, keys.default_share))
    kind = inner.given.get("rope_type", inner.given.get("type", "default"))
    refused, scaling = [], None
    if any(isinstance(value, Mapping) for value in inner.given.values()):
        refused.append(f"{name} is {shown(inner.given)}, wanted the same for all layers")
    if share != 1 and not keys.may_be_shared:
        refused.append(f"partial_rotary_factor is {share!r}, wanted 1")
    if kind == "llama3":
        lacks = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in inner.given]
        refused += [f"rope_type is 'llama3' without {key}" for key in lacks]
        context = inner.size("original_max_position_embeddings", context)
        scaling = RotaryScaling(
            factor=inner.number("factor"),
            low_frequency_factor=inner.number("low_freq_factor"),
            high_frequency_factor=inner.number("high_freq_factor"),
            context=values.size("original_max_position_embeddings", context),
        )
    elif kind != "default":
        refused.append(f"rope_type is {shown(kind)}, wanted 'default' or 'llama3'")
    return {"rotary_share": share, "rotary_base": base, "rotary_scaling": scaling}, refused


def _unfitting(options: Json, family: _Family) -> list[str]:
    """Lists sizes that do not go together."""
    sizes, width, heads = family.sizes, options["width"], options["num_heads"]
    problems = []
    head_width, groups = options.get("head_width"), options.get("num_key_value_heads") or heads
    if head_width is None and width % heads:
        problems.append(f"{sizes['width']} is {width}, wanted a multiple of {sizes['num_heads']}, {heads}")
    if heads % groups:
        problems.append(f"{sizes['num_heads']} is {heads}, wanted a multiple of num_key_value_heads, {groups}")
    if family.rotary is None:
        return problems
    share, rotated = options["rotary_share"], int(options["rotary_share"] * (head_width or width // heads))
    if not problems and (share > 1 or rotated < 2 or rotated % 2):
        problems.append(
            f"{family.rotary.share} is {share} of heads of width {head_width or width // heads}, wanted at most 1, and "
            "an even width"
        )
    scaling = options["rotary_scaling"]
    if scaling is not None and scaling.low_frequency_factor >= scaling.high_frequency_factor:
        problems.append(
            f"low_freq_factor is {scaling.low_frequency_factor}, wanted less than high_freq_factor, "
            f"{scaling.high_frequency_factor}"
        )
    return problems


_NEVER = ("quantization_config", "auto_map", "is_encoder_decoder", "add_cross_attention")
"""Keys of weights that are no numbers, and of code of the checkpoint's own."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "inner_width": "intermediate_size",
    "context": "max_position_embeddings",
}
_SIZES_OF_GPT2 = {
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "depth": "n_layer",
    "num_heads": "n_head",
    "context": "n_positions",
}
_SILU = ("hidden_act", "silu")
_WHOLE = {"use_sliding_window": False}
_ROTARY = _Rotary("rope_theta", "partial_rotary_factor", 1.0, may_be_shared=False)
_ROTARY_OF_GPT_NEOX = _Rotary("rotary_emb_base", "rotary_pct", 0.25, may_be_shared=True)

_FAMILIES = {
    "gpt2": _Family(
        architecture="GPT2LMHeadModel",
        sizes=_SIZES_OF_GPT2,
        activation=("activation_function", "gelu_new"),
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        rotary=None,
        read=_gpt2,
    ),
    "gpt_neox": _Family("GPTNeoXForCausalLM", _SIZES, ("hidden_act", "gelu"), {}, _ROTARY_OF_GPT_NEOX, _gpt_neox),
    "llama": _Family("LlamaForCausalLM", _SIZES, _SILU, {}, _ROTARY, _llama),
    "qwen2": _Family("Qwen2ForCausalLM", _SIZES, _SILU, _WHOLE, _ROTARY, _qwen2),
    "qwen3": _Family("Qwen3ForCausalLM", _SIZES, _SILU, _WHOLE, _ROTARY, _qwen3),
}
