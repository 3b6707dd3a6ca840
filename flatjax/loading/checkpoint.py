"""A published checkpoint as a decoder, and its tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flatjax.curvature.leaves import leaf_path, leaves_by_path
from flatjax.loading.families import read_config
from flatjax.loading.names import Published, is_no_parameter, published, short_name
from flatjax.loading.optional import optional
from flatjax.loading.tensors import Tensors
from flatjax.models.decoder import Decoder
from flatjax.models.decoder_sharding import decoder_shardings


def load_decoder(
    path_or_hub_name: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> Decoder:
    """A GPT-2, GPT-NeoX (Pythia), Llama, Qwen-2 or Qwen-3 in the format that they are published in.

    The weights stay on the disk: each tensor by itself is read, cast, and put where it belongs. Positions are rotated,
    or looked up, from 0. Whatever the checkpoint has that the decoder does not do is an error, as are tensors that are
    missing, too many, or of another shape; only the masks and frequencies that older checkpoints hold are passed over,
    and the head of a tied model if it is its embedding.

    Args:
        path_or_hub_name: a folder with config.json and model.safetensors, or its parts and
            model.safetensors.index.json; or, where there is a network, a name as "EleutherAI/pythia-70m".
        dtype: of the parameters, and that the decoder computes in.
        mesh: of devices, with an axis "model" that the parameters are split along: see
            `flatjax.models.decoder_shardings`.
        revision: of a checkpoint on a hub, as "step1000".

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ImportError: the extra `llm` is not installed.
        ValueError: a checkpoint of another kind, or one that is not whole, with all that is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.loading import load_decoder
        >>> model = load_decoder("tests/loading/golden/llama")
        >>> model.config.num_key_value_heads, model(jnp.array([[3, 1, 4, 1, 5]])).shape
        (2, (1, 5, 61))
    """
    folder = _folder(path_or_hub_name, revision)
    config_json = json.loads(_file(folder, "config.json").read_text())
    config = read_config(config_json)
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_by_path(params).items()}
    wanted = published(config_json["model_type"], shapes, config.num_heads)
    tensors = Tensors(folder)
    names = _names(tensors, config_json["model_type"], wanted, tied=config.tied, folder=folder)
    shardings = {} if mesh is None else leaves_by_path(decoder_shardings(params, mesh))
    leaves = {}
    for short, name in names.items():
        leaves |= _parameters(wanted[short], tensors[name][:], dtype, shardings)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(lambda keys, _: leaves[leaf_path(keys)], params))


def load_tokenizer(path_or_hub_name: str | Path, *, revision: str | None = None) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint, which neither cuts texts off nor pads them.

    Raises:
        FileNotFoundError: there is no such folder, or no tokenizer.json in it.
        ImportError: the extra `llm` is not installed.

    Example:
        >>> from flatjax.loading import load_tokenizer
        >>> tokenizer = load_tokenizer("tests/loading/golden/llama")
        >>> tokenizer.decode(tokenizer.encode("a flat head").ids)
        'a flat head'
    """
    path = str(_file(_folder(path_or_hub_name, revision), "tokenizer.json"))
    tokenizer = optional("tokenizers").Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _folder(path_or_hub_name: str | Path, revision: str | None) -> Path:
    folder = Path(path_or_hub_name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {folder} is a folder, which holds one: leave it out")
        return folder
    name = str(path_or_hub_name)
    if isinstance(path_or_hub_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}")
    files = [
        "config.json",
        "model.safetensors",
        "model-*.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # of the hub's own, or of the connection's
        raise FileNotFoundError(f"{name} is no folder here, and the hub gives none of this name: {error}") from error


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}")
    return folder / name


def _names(
    tensors: Tensors, family: str, wanted: Mapping[str, Published], *, tied: bool, folder: Path
) -> dict[str, str]:
    """The checkpoint's names of all tensors that are wanted; or an error that lists what is wrong with it."""
    names: dict[str, str] = {}
    problems = []
    for name in sorted(tensors):
        short = short_name(family, name)
        if is_no_parameter(short):
            continue
        if short in names:
            problems.append(f"{name} is there again as {names[short]}")
        names[short] = name
    if tied and "lm_head.weight" in names:
        (embedding,) = (short for short, each in wanted.items() if each.paths == ("token_embedding/embedding",))
        head = names.pop("lm_head.weight")
        if embedding in names and not tensors.are_equal(head, names[embedding]):
            problems.append(f"{head} is not {names[embedding]}, though tie_word_embeddings is true")
    problems += [f"{short} is missing" for short in wanted if short not in names]
    problems += [f"{name} is not known" for short, name in names.items() if short not in wanted]
    for short, name in names.items():
        if short in wanted:
            shape, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
            if shape != wanted[short].shape:
                problems.append(f"{name} has shape {shape}, wanted {wanted[short].shape}")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                problems.append(f"{name} has dtype {dtype}, wanted F64, F32, F16 or BF16")
    if problems:
        raise ValueError(f"the tensors in {folder} are not those of its config.json: {'; '.join(problems)}")
    return names


def _parameters(
    published: Published, whole: np.ndarray, dtype: DTypeLike, shardings: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    """Those of one tensor, by path, cast and on their devices."""
    parts = [part.astype(dtype, copy=False) for part in published.parts(whole)]
    return {path: _placed(part, shardings.get(path)) for path, part in zip(published.paths, parts, strict=True)}


def _placed(part: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """On the devices, before the next is read."""
    placed = (
        jnp.asarray(part)
        if sharding is None
        else jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])
    )
    return placed.block_until_ready()
