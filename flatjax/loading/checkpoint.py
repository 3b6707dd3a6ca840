"""A published checkpoint as a decoder, and its tokenizer."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flatjax.core.optional import optional
from flatjax.core.trees import leaf_path
from flatjax.loading.families import depth_key, family_of, read_config
from flatjax.loading.files import existing, listed, read_object
from flatjax.loading.folder import find_folder
from flatjax.loading.names import Published, is_no_parameter, number_of_layers, published, short_name
from flatjax.loading.shapes import decoder_shapes
from flatjax.loading.tensors import Tensors, stored
from flatjax.models.decoder.config import DecoderConfig
from flatjax.models.decoder.model import Decoder, decoder_structure
from flatjax.models.decoder.sharding import decoder_shardings


def load_decoder(
    path_or_hub_name: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> Decoder:
    """Loads a GPT-2, GPT-NeoX (Pythia), Llama, Qwen-2 or Qwen-3 in the format that they are published in.

    Positions are rotated, or looked up, from 0. Whatever the checkpoint has that the decoder does not do is an error.
    Tensors that are missing, too many, of another shape, or not finite in `dtype` are errors too. Only the masks and
    frequencies that older checkpoints hold are passed over. The one matrix of a tied model may have the embedding's
    name, the head's, or both.

    Args:
        path_or_hub_name: a folder with config.json and model.safetensors, or its parts and
            model.safetensors.index.json; or, where there is a network, a name, for example "EleutherAI/pythia-70m".
        dtype: the dtype of the parameters, which the decoder also computes in.
        mesh: devices with an axis "model" that the parameters are split along: see `flatjax.models.decoder_shardings`.
        revision: the revision of a checkpoint on a hub, for example "step1000".

    Returns:
        The `Decoder` with the weights of the checkpoint.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ImportError: the extra `llm` is not installed.
        ValueError: a checkpoint of another kind, or one that is not whole, with all that is wrong.

    Notes:
        The weights stay on the disk: each tensor by itself is read, cast, and put where it belongs. What is wrong with
        a config.json, an index or the headers of the tensors is found before anything is built or read. A null in
        config.json stands for the default; a size is a whole number, 2 and not 2.0. If a folder has a single file and
        parts that an index names, the one that is there whole is read. If both are, and differ, the newer one is.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.loading import load_decoder
        >>> model = load_decoder("tests/loading/golden/llama")
        >>> model.config.num_key_value_heads, model(jnp.array([[3, 1, 4, 1, 5]])).shape
        (2, (1, 5, 61))
    """
    return open_checkpoint(path_or_hub_name, revision=revision).load(dtype=dtype, mesh=mesh)


def open_checkpoint(path_or_hub_name: str | Path, *, revision: str | None = None) -> "Checkpoint":
    """Opens a checkpoint, and checks that what it says of itself fits together; its weights are not read yet.

    Args:
        path_or_hub_name: as for `load_decoder`.
        revision: as for `load_decoder`.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `load_decoder`.

    Example:
        >>> from flatjax.loading import open_checkpoint
        >>> checkpoint = open_checkpoint("tests/loading/golden/gpt2")
        >>> checkpoint.config.positions, checkpoint.config.context
        ('learned', 20)
        >>> checkpoint.digest() == open_checkpoint("tests/loading/golden/gpt2").digest()
        True
    """
    folder = find_folder(path_or_hub_name, revision)
    file = existing(folder / "config.json")
    config_json = read_object(file)
    family, config = family_of(config_json, str(file)), read_config(config_json, str(file))
    found = [_fitted(tensors, family, config) for tensors in stored(folder)]
    whole = [checkpoint for checkpoint, problems in found if not problems]
    if not whole:
        wrong = [
            f"the tensors in {checkpoint.tensors} are not those of its config.json: {listed(each)}"
            for checkpoint, each in found
        ]
        raise ValueError("; and ".join(wrong))
    return _newest(whole)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are those of its config.json, by their names and shapes."""

    config: DecoderConfig
    tensors: Tensors
    names: Mapping[str, str]
    """The names of the tensors, by what they are called in every checkpoint of the family."""
    wanted: Mapping[str, Published]

    def digest(self) -> str:
        """The digest that its network is known by, wherever it lies, and in whichever files.

        It is made of the configuration, and of the names, dtypes, shapes and a sample of the bytes of all tensors. A
        tensor of up to a megabyte is sampled whole.
        """
        of_tensors = self.tensors.digest(self.names)
        return hashlib.sha256(f"{self.config} {of_tensors}".encode()).hexdigest()

    def load(self, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> Decoder:
        """Loads the decoder itself; see `load_decoder`.

        Raises:
            TypeError: no dtype has the name that is given.
            ValueError: weights that are not finite, or not in this dtype.
        """
        try:
            config, dtype = self.config, jax.dtypes.canonicalize_dtype(dtype)
        except TypeError as error:
            raise TypeError(f"dtype is {dtype!r}, wanted a floating one, as 'bfloat16' or jnp.float32") from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype is {dtype}, wanted a floating one")
        graphdef, params = decoder_structure(config, dtype, dtype)
        placed = [] if mesh is None else jax.tree_util.tree_leaves_with_path(decoder_shardings(params, mesh))
        shardings = {leaf_path(keys): sharding for keys, sharding in placed}
        leaves: dict[str, jax.Array] = {}
        problems: list[str] = []
        for short, name in self.names.items():
            parameters, wrong = _parameters(self.tensors, name, self.wanted[short], dtype, shardings)
            leaves |= parameters
            problems += wrong
        self.tensors.close()
        if problems:
            raise ValueError(f"weights in {self.tensors} are no finite numbers of {dtype}: {listed(problems)}")
        return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(lambda keys, _: leaves[leaf_path(keys)], params))


def load_tokenizer(path_or_hub_name: str | Path, *, revision: str | None = None) -> Any:
    """Loads the `tokenizers.Tokenizer` of a checkpoint, which neither cuts texts off nor pads them.

    Raises:
        FileNotFoundError: there is no such folder, or no tokenizer.json in it.
        ImportError: the extra `llm` is not installed.
        ValueError: tokenizer.json is malformed.

    Example:
        >>> from flatjax.loading import load_tokenizer
        >>> tokenizer = load_tokenizer("tests/loading/golden/llama")
        >>> tokenizer.decode(tokenizer.encode("a flat head").ids)
        'a flat head'
    """
    file = existing(find_folder(path_or_hub_name, revision) / "tokenizer.json")
    tokenizers = optional("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # of no kind of its own
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _fitted(tensors: Tensors, family: str, config: DecoderConfig) -> tuple[Checkpoint, list[str]]:
    """Fits a config.json and tensors together: the checkpoint, and all that is wrong with it."""
    names: dict[str, str] = {}
    problems = []
    for name in sorted(tensors):
        short = short_name(family, name)
        if is_no_parameter(short):
            continue
        if short in names:
            problems.append(f"{name} is there again as {names[short]}")
        names[short] = name
    depth = number_of_layers(names)
    if config.depth > depth:
        problems.append(f"{depth_key(family)} is {config.depth}, but there are tensors of {depth} layers")
    # No more names are made up than there are.
    shallow = dataclasses.replace(config, depth=min(config.depth, depth))
    wanted = published(family, decoder_shapes(shallow), config.num_heads)
    if config.tied:
        problems += _untied(tensors, names, wanted)
    problems += [f"{short} is missing" for short in wanted if short not in names]
    problems += [f"{name} is not known" for short, name in names.items() if short not in wanted]
    for short, name in names.items():
        if short in wanted:
            problems += _misshapen(tensors, name, wanted[short])
    return Checkpoint(config, tensors, names, wanted), problems


def _untied(tensors: Tensors, names: dict[str, str], wanted: Mapping[str, Published]) -> list[str]:
    """Calls the one matrix of a tied model by the embedding's name, and says so if there are two."""
    (embedding,) = (short for short, each in wanted.items() if each.paths == ("token_embedding/embedding",))
    head = names.pop("lm_head.weight", None)
    if head is None or names.setdefault(embedding, head) == head:
        return []
    pair = head, names[embedding]
    if problems := _misshapen(tensors, head, wanted[embedding]):
        return problems
    if any(_misshapen(tensors, name, wanted[embedding]) for name in pair) or tensors.are_equal(*pair):
        return []
    return [f"{head} is not {names[embedding]}, though tie_word_embeddings is true"]


def _misshapen(tensors: Tensors, name: str, wanted: Published) -> list[str]:
    problems, entry = [], tensors.entries[name]
    if entry.shape != wanted.shape:
        problems.append(f"{name} has shape {entry.shape}, wanted {wanted.shape}")
    if entry.dtype not in ("F64", "F32", "F16", "BF16"):
        problems.append(f"{name} has dtype {entry.dtype}, wanted F64, F32, F16 or BF16")
    return problems


def _newest(checkpoints: list[Checkpoint]) -> Checkpoint:
    """Picks the only checkpoint; or, if two differ, the one that was written later.

    Raises:
        ValueError: it cannot be told.
    """
    first, last = checkpoints[0], checkpoints[-1]
    if first is last or first.digest() == last.digest():
        return first
    for newer, older in ((first, last), (last, first)):
        if newer.tensors.is_newer_than(older.tensors):
            return newer
    raise ValueError(
        f"{first.tensors} and {last.tensors} hold different weights, and neither is clearly newer: remove the one that "
        "is not wanted"
    )


def _parameters(
    tensors: Tensors,
    name: str,
    published: Published,
    dtype: np.dtype,
    shardings: Mapping[str, jax.sharding.Sharding],
) -> tuple[dict[str, jax.Array], list[str]]:
    """Reads the parameters in one tensor, by path, cast and on their devices.

    And says what is wrong with its numbers.
    """
    whole = tensors[name]
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [part.astype(dtype, copy=False) for part in published.parts(whole)]
    problems = [] if all(np.isfinite(part).all() for part in parts) else [_unsound(name, whole, dtype)]
    placed = {path: _placed(part, shardings.get(path)) for path, part in zip(published.paths, parts, strict=True)}
    return placed, problems


def _unsound(name: str, whole: np.ndarray, dtype: np.dtype) -> str:
    """Says what is wrong with the numbers of a tensor."""
    if number := np.count_nonzero(~np.isfinite(whole)):
        return f"{name} holds {number} of {whole.size} that are NaN or infinite"
    return f"{name} goes up to {float(np.abs(whole).max()):.4g}, which {dtype} cannot hold"


def _placed(part: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts a parameter on the devices, before the next is read."""
    placed = (
        jnp.asarray(part)
        if sharding is None
        else jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])
    )
    return placed.block_until_ready()
