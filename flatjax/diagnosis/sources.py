"""A language model is read from a Hugging Face folder or hub name, or from a run of train_lm with its checkpoints."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from flatjax import loading
from flatjax.loading.files import read_object
from flatjax.loading.headers import Entry, sample
from flatjax.models import Decoder, DecoderConfig
from flatjax.models.decoder.model import decoder_structure
from flatjax.models.decoder.sharding import decoder_shardings
from flatjax.run.checkpoints import load_part
from flatjax.run.text import Document, read, standard_library

T = TypeVar("T")


class Source(NamedTuple):
    """A source is a checkpoint that is not yet read."""

    name: str
    step: int | None
    """Step of its training, where that is known."""
    config: Callable[[], DecoderConfig]
    digest: Callable[[], str]
    """Digest of a sample of its weights, which are known by it whatever they are called."""
    load: Callable[[DTypeLike, Mesh], Decoder]
    tokenizer: Callable[[], Tokenizer]


def find(places: Sequence[str], steps: Sequence[int] = ()) -> list[Source]:
    """Find all checkpoints of the places given, with those of a run by their steps.

    Raises:
        SystemExit: there is no checkpoint, or none of a step.
    """
    sources = [source for place in places for source in _at(place, steps)]
    if not sources:
        raise SystemExit("wanted a checkpoint: a folder as it is published, a hub name, or a run of train_lm.py")
    if len({source.name for source in sources}) < len(sources):
        raise SystemExit("a checkpoint is named twice")
    return sources


def _at(place: str, steps: Sequence[int]) -> list[Source]:
    path = Path(place)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        if not path.is_dir():
            raise SystemExit(f"there is no checkpoint {path}")
        return [_of_run(path.parent.parent, int(path.name))]
    if (path / "checkpoints").is_dir():
        found = sorted(int(each.name) for each in (path / "checkpoints").iterdir() if each.name.isdigit())
        if missing := sorted({*steps} - {*found}):
            raise SystemExit(f"--steps has {missing}, but {path} has checkpoints of {found}")
        return [_of_run(path, step) for step in found if not steps or step in steps]
    return [_published(place)]


def _published(place: str) -> Source:
    """Find a published model in a folder, or on a hub by its name or name@revision.

    Many revisions on a hub are the steps of one training.
    """
    name, _, revision = (place, "", "") if Path(place).exists() else place.partition("@")
    found = re.search(r"step[-_]?(\d+)", revision)

    @functools.cache
    def opened() -> loading.Checkpoint:
        return _or_exit(lambda: loading.open_checkpoint(name, revision=revision or None))

    def load(dtype: DTypeLike, mesh: Mesh) -> Decoder:
        return _or_exit(lambda: opened().load(dtype=dtype, mesh=mesh))

    def tokenizer() -> Tokenizer:
        return _or_exit(lambda: loading.load_tokenizer(name, revision=revision or None))

    step = int(found[1]) if found else None
    return Source(place, step, lambda: opened().config, lambda: opened().digest(), load, tokenizer)


def _or_exit(load: Callable[[], T]) -> T:
    """Exit with the error of loading, which says all there is to say."""
    try:
        return load()
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _of_run(run: Path, step: int) -> Source:
    name = f"{run}/checkpoints/{step}"

    def config() -> DecoderConfig:
        model = _or_exit(lambda: read_object(run / "config.json")).get("model")
        if not isinstance(model, dict):
            raise SystemExit(f"{run / 'config.json'} has no model: it is not of a run of train_lm.py")
        return DecoderConfig(**model)

    def digest() -> str:
        return hashlib.sha256(f"{config()} {digest_of_files(Path(name))}".encode()).hexdigest()

    def load(dtype: DTypeLike, mesh: Mesh) -> Decoder:
        return load_checkpoint(run, step, dtype=dtype, mesh=mesh)

    return Source(name, step, config, digest, load, lambda: _or_exit(lambda: loading.load_tokenizer(run)))


def load_checkpoint(run: Path, step: int, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Decoder:
    """Load the decoder that a run of train_lm left after a step, on the mesh, or on one device."""
    config = DecoderConfig(**json.loads((run / "config.json").read_text())["model"])
    graph, params = decoder_structure(config, jnp.dtype(dtype), jnp.float32)
    shapes = nnx.to_pure_dict(params)
    mesh = mesh or jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    shardings = decoder_shardings(shapes, mesh)
    part = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )
    return nnx.merge(graph, load_part(run / "checkpoints", step, {"params": part})["params"])


def digest_of_files(folder: Path) -> str:
    """Hash the files' names, their sizes and a sample of their bytes."""
    found = hashlib.sha256()
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        size = file.stat().st_size
        found.update(repr((file.relative_to(folder).as_posix(), size)).encode())
        found.update(sample(Entry(file, "U8", (size,), 0, size)))
    return found.hexdigest()


def documents_of_run(place: str, part: str) -> list[Document]:
    """Return a part of the text that a run was given, as it is now: held out by file or module, or trained on.

    Raises:
        SystemExit: there is no run, or its text is gone.
    """
    path = Path(place)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (run / "tokenizer.json").exists() or not (run / "checkpoints").is_dir():
        raise SystemExit(f"{place} is no run of train_lm.py, whose text would be known: wanted --text")
    config = json.loads((run / "config.json").read_text())
    documents = (
        read([Path(each) for each in config["text"]], config["pattern"]) if config["text"] else standard_library()
    )
    held_out = config["files"]
    if part == "train":
        return [each for each in documents if all(each.name not in names for names in held_out.values())]
    chosen = [each for each in documents if each.name in held_out[part]]
    if len(chosen) < len(held_out[part]):
        raise SystemExit(f"of the text of {run} are {len(held_out[part]) - len(chosen)} files gone: wanted --text")
    return chosen
