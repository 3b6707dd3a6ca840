"""What a published config.json says of a decoder; what the decoder does not do is refused by name."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flatjax.models.decoder_config import DecoderConfig, RotaryScaling

Json = Mapping[str, Any]


def read_config(config: Json) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
        ValueError: of another family, without a size, or with something that the decoder does not do.
    """
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(f"config.json has model_type {kind!r}, wanted one of {', '.join(map(repr, _FAMILIES))}")
    family = _FAMILIES[kind]
    missing = [key for key in family.sizes if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json of a {kind!r} lacks {', '.join(missing)}")
    refused = [f"{key} is {config[key]!r}" for key in _NEVER if config.get(key)]
    if config.get("architectures") not in (None, [family.architecture]):
        refused.append(f"architectures is {config['architectures']!r}, wanted {[family.architecture]!r}")
    for key, wanted in family.fixed.items():
        if config.get(key, wanted) != wanted:
            refused.append(f"{key} is {config[key]!r}, wanted {wanted!r}")
    layers = set(config.get("layer_types") or ()) - {"full_attention"}
    refused += [f"layer_types has {each!r}, wanted 'full_attention'" for each in sorted(layers)]
    activation = config.get(family.activation[0], family.activation[1])
    if activation not in _ACTIVATIONS:
        wanted = ", ".join(map(repr, _ACTIVATIONS))
        refused.append(f"{family.activation[0]} is {activation!r}, wanted one of {wanted}")
    rotary = family.rotary(config)
    refused += _unknown_rotary(rotary, family)
    if refused:
        raise ValueError(f"config.json of a {kind!r} asks for what the decoder does not do: {'; '.join(refused)}")
    tied = bool(config.get("tie_word_embeddings", kind == "gpt2"))
    options: dict[str, Any] = {"activation": _ACTIVATIONS[activation], "tied": tied, **_rotary_options(rotary)}
    return DecoderConfig(**options, **family.read(config))


class _Family(NamedTuple):
    architecture: str
    sizes: tuple[str, ...]
    """Keys that have to be there."""
    activation: tuple[str, str]
    """Key and default."""
    fixed: Json
    """Keys that change what is computed, and the one value that the decoder computes."""
    rotary: Callable[[Json], Json]
    """The parameters of rotary positions in today's form; none are learned positions."""
    has_rotary_share: bool
    read: Callable[[Json], dict[str, Any]]


def _gpt2(config: Json) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "width": config["n_embd"],
        "depth": config["n_layer"],
        "num_heads": config["n_head"],
        "inner_width": config.get("n_inner"),
        "context": config["n_positions"],
        "positions": "learned",
        "norm": "layer",
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "gated": False,
        "query_key_value_bias": True,
        "output_bias": True,
        "perceptron_bias": True,
    }


def _with_rotary_positions(config: Json) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "inner_width": config["intermediate_size"],
        "context": config["max_position_embeddings"],
    }


def _gpt_neox(config: Json) -> dict[str, Any]:
    has_bias = config.get("attention_bias", True)
    return _with_rotary_positions(config) | {
        "norm": "layer",
        "norm_epsilon": config.get("layer_norm_eps", 1e-5),
        "gated": False,
        "parallel": config.get("use_parallel_residual", True),
        "query_key_value_bias": has_bias,
        "output_bias": has_bias,
        "perceptron_bias": True,
    }


def _llama(config: Json) -> dict[str, Any]:
    has_bias = config.get("attention_bias", False)
    return _with_rotary_positions(config) | {
        "num_key_value_heads": config.get("num_key_value_heads"),
        "head_width": config.get("head_dim"),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "query_key_value_bias": has_bias,
        "output_bias": has_bias,
        "perceptron_bias": config.get("mlp_bias", False),
    }


def _qwen2(config: Json) -> dict[str, Any]:
    return _llama(config) | {"query_key_value_bias": True, "output_bias": False, "perceptron_bias": False}


def _qwen3(config: Json) -> dict[str, Any]:
    return _llama(config) | {
        "head_width": config.get("head_dim", 128),
        "query_key_norm": True,
        "perceptron_bias": False,
    }


def _rotary(config: Json) -> dict[str, Any]:
    """Older files have a part of the parameters beside the others, under other names."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    given.setdefault("rope_type", given.get("type", "default"))
    given.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if given["rope_type"] == "llama3":
        context = config.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = context or given.get(
            "original_max_position_embeddings", config["max_position_embeddings"]
        )
    return given


def _rotary_of_gpt_neox(config: Json) -> dict[str, Any]:
    renamed = {
        "rope_theta": config.get("rotary_emb_base", 10_000.0),
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
    }
    return _rotary({**config, **renamed})


def _unknown_rotary(rotary: Json, family: _Family) -> list[str]:
    if not rotary:
        return []
    refused = []
    if any(isinstance(value, Mapping) for value in rotary.values()):
        refused.append(f"rope_parameters is {dict(rotary)!r}, wanted the same for all layers")
    kind = rotary["rope_type"]
    if kind not in ("default", "llama3"):
        refused.append(f"rope_type is {kind!r}, wanted 'default' or 'llama3'")
    if kind == "llama3":
        lacks = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in rotary]
        refused += [f"rope_type is 'llama3' without {key}" for key in lacks]
    share = rotary["partial_rotary_factor"]
    if share != 1 and not family.has_rotary_share:
        refused.append(f"partial_rotary_factor is {share!r}, wanted 1")
    return refused


def _rotary_options(rotary: Json) -> dict[str, Any]:
    if not rotary:
        return {}
    scaling = None
    if rotary["rope_type"] == "llama3":
        scaling = RotaryScaling(
            factor=float(rotary["factor"]),
            low_frequency_factor=float(rotary["low_freq_factor"]),
            high_frequency_factor=float(rotary["high_freq_factor"]),
            context=rotary["original_max_position_embeddings"],
        )
    share, base = rotary["partial_rotary_factor"], rotary["rope_theta"]
    return {"rotary_share": float(share), "rotary_base": float(base), "rotary_scaling": scaling}


_NEVER = ("quantization_config", "auto_map", "is_encoder_decoder", "add_cross_attention")
"""Weights that are no numbers, and code of the checkpoint's own."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_GROUPED = (*_SIZES, "num_key_value_heads")
_SILU = ("hidden_act", "silu")
_WHOLE = {"use_sliding_window": False}

_FAMILIES = {
    "gpt2": _Family(
        architecture="GPT2LMHeadModel",
        sizes=("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
        activation=("activation_function", "gelu_new"),
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        rotary=lambda config: {},
        has_rotary_share=False,
        read=_gpt2,
    ),
    "gpt_neox": _Family("GPTNeoXForCausalLM", _SIZES, ("hidden_act", "gelu"), {}, _rotary_of_gpt_neox, True, _gpt_neox),
    "llama": _Family("LlamaForCausalLM", _SIZES, _SILU, {}, _rotary, False, _llama),
    "qwen2": _Family("Qwen2ForCausalLM", _GROUPED, _SILU, _WHOLE, _rotary, False, _qwen2),
    "qwen3": _Family("Qwen3ForCausalLM", _GROUPED, _SILU, _WHOLE, _rotary, False, _qwen3),
}
