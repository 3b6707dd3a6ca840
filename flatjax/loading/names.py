"""Find where a decoder's parameters lie in a published checkpoint."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Published(NamedTuple):
    """A tensor of a checkpoint, and the parameters that are read from it."""

    shape: Shape
    paths: tuple[str, ...]
    parts: Callable[[np.ndarray], Sequence[np.ndarray]]
    """Cuts out the parameters, in the order of `paths`."""


def published(family: str, shapes: Mapping[str, Shape], num_heads: int) -> dict[str, Published]:
    """Lists by their names all tensors that a decoder with parameters of these shapes, by path, needs."""
    tensors = {}
    for module, layers in _modules(family, shapes):
        for ours, theirs in (("kernel", "weight"), ("scale", "weight"), ("embedding", "weight"), ("bias", "bias")):
            paths = tuple(f"{layer}/{ours}" for layer in layers)
            if paths[0] in shapes:
                layout = _layout(family, module, ours, num_heads)
                tensors[f"{module}.{theirs}"] = Published(layout.shape([shapes[p] for p in paths]), paths, layout.parts)
    return tensors


def short_name(family: str, name: str) -> str:
    """A tensor's name without what some checkpoints put before it; the head's name is the same in all."""
    return name.removeprefix(_PREFIXES[family]).replace("embed_out.", "lm_head.")


def number_of_layers(short_names: Iterable[str]) -> int:
    """Counts the blocks that there are tensors of."""
    return len({found[1] for name in short_names if (found := _OF_LAYER.match(name))})


def is_no_parameter(name: str) -> bool:
    """Whether a short name is one of the masks and frequencies that older checkpoints hold.

    The decoder works them out.
    """
    return _BUFFERS.fullmatch(name) is not None


class _Layout(NamedTuple):
    """How parameters lie in one tensor: its shape by theirs, and how they are cut out."""

    shape: Callable[[Sequence[Shape]], Shape]
    parts: Callable[[np.ndarray], Sequence[np.ndarray]]


def _layout(family: str, module: str, leaf: str, num_heads: int) -> _Layout:
    if module.endswith("c_attn"):
        return _Layout(lambda shapes: (*shapes[0][:-1], 3 * shapes[0][-1]), lambda whole: np.split(whole, 3, axis=-1))
    if module.endswith("query_key_value"):
        return _Layout(lambda shapes: (3 * shapes[0][-1], *shapes[0][:-1]), lambda whole: _by_head(whole, num_heads))
    if leaf == "kernel" and (family != "gpt2" or module == "lm_head"):
        return _Layout(lambda shapes: shapes[0][::-1], lambda whole: [whole.T])
    return _Layout(lambda shapes: shapes[0], lambda whole: [whole])


def _by_head(whole: np.ndarray, num_heads: int) -> list[np.ndarray]:
    """Cuts out queries, keys and values: each head has its own rows of all three."""
    heads = whole.reshape(num_heads, 3, -1, *whole.shape[1:])
    return [heads[:, i].reshape(-1, *whole.shape[1:]).T for i in range(3)]


def _modules(family: str, shapes: Mapping[str, Shape]) -> list[tuple[str, tuple[str, ...]]]:
    """Pairs the modules of a family with our layers, in all blocks."""
    depth = len({path.split("/")[1] for path in shapes if path.startswith("blocks/")})
    found = []
    for module, layers in _MODULES[family].items():
        for i in range(depth if "*" in module else 1):
            found.append((module.replace("*", str(i)), tuple(layer.replace("*", str(i)) for layer in layers)))
    return found


_ATTENTION = "blocks/*/attention"
_QKV = (f"{_ATTENTION}/query", f"{_ATTENTION}/key", f"{_ATTENTION}/value")
_LLAMA: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("token_embedding",),
    "layers.*.input_layernorm": ("blocks/*/attention_norm",),
    "layers.*.self_attn.q_proj": (f"{_ATTENTION}/query",),
    "layers.*.self_attn.k_proj": (f"{_ATTENTION}/key",),
    "layers.*.self_attn.v_proj": (f"{_ATTENTION}/value",),
    "layers.*.self_attn.o_proj": (f"{_ATTENTION}/output",),
    "layers.*.self_attn.q_norm": (f"{_ATTENTION}/query_norm",),
    "layers.*.self_attn.k_norm": (f"{_ATTENTION}/key_norm",),
    "layers.*.post_attention_layernorm": ("blocks/*/perceptron_norm",),
    "layers.*.mlp.gate_proj": ("blocks/*/perceptron/gate",),
    "layers.*.mlp.up_proj": ("blocks/*/perceptron/up",),
    "layers.*.mlp.down_proj": ("blocks/*/perceptron/down",),
    "norm": ("norm",),
    "lm_head": ("head",),
}
_MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "wte": ("token_embedding",),
        "wpe": ("position_embedding",),
        "h.*.ln_1": ("blocks/*/attention_norm",),
        "h.*.attn.c_attn": _QKV,
        "h.*.attn.c_proj": (f"{_ATTENTION}/output",),
        "h.*.ln_2": ("blocks/*/perceptron_norm",),
        "h.*.mlp.c_fc": ("blocks/*/perceptron/up",),
        "h.*.mlp.c_proj": ("blocks/*/perceptron/down",),
        "ln_f": ("norm",),
        "lm_head": ("head",),
    },
    "gpt_neox": {
        "embed_in": ("token_embedding",),
        "layers.*.input_layernorm": ("blocks/*/attention_norm",),
        "layers.*.attention.query_key_value": _QKV,
        "layers.*.attention.dense": (f"{_ATTENTION}/output",),
        "layers.*.post_attention_layernorm": ("blocks/*/perceptron_norm",),
        "layers.*.mlp.dense_h_to_4h": ("blocks/*/perceptron/up",),
        "layers.*.mlp.dense_4h_to_h": ("blocks/*/perceptron/down",),
        "final_layer_norm": ("norm",),
        "lm_head": ("head",),
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "llama": "model.", "qwen2": "model.", "qwen3": "model."}
_BUFFERS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)"
    r"|layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    r"|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
_OF_LAYER = re.compile(r"(?:h|layers)\.(\d+)\.")
