"""Load images of ten classes: scikit-learn's digits, or MNIST, Fashion-MNIST and CIFAR-10 from files as published.

MNIST, Fashion-MNIST   train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…; each plain or with .gz
CIFAR-10               data_batch_1 … 5 and test_batch (Python), or data_batch_1.bin … and test_batch.bin (binary),
                       in the folder given or in its cifar-10-batches-py or cifar-10-batches-bin
"""

import gzip
import math
import pickle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

Name = Literal["digits", "mnist", "fashion-mnist", "cifar10"]

NUM_CLASSES = 10


class Images(NamedTuple):
    """Images are pixels (n, height, width, channels) from 0 to 255, with labels (n,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def some(self, number: int | None, seed: int) -> "Images":
        """Choose this many at random, or all, in random order."""
        chosen = np.random.default_rng(seed).permutation(len(self.labels))[:number]
        return Images(self.pixels[chosen], self.labels[chosen])


def load(name: Name, folder: Path | None, seed: int) -> tuple[Images, Images]:
    """Load the training and test images as published; of the digits, a random fifth by the seed is for testing."""
    if name == "digits":
        return _digits(seed)
    if folder is None:
        raise SystemExit(f"{name} is read from files: give their folder by --data-dir. They are at {_SOURCES[name]}")
    if not folder.is_dir():
        raise SystemExit(f"--data-dir is {folder}, which is no folder; wanted the files of {_SOURCES[name]}")
    if name == "cifar10":
        return _cifar(folder)
    return _mnist(folder, "train", _SOURCES[name]), _mnist(folder, "t10k", _SOURCES[name])


_SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist, in data/fashion",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
}


def _digits(seed: int) -> tuple[Images, Images]:
    features, labels = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(features) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = Images(pixels, np.asarray(labels, np.int32)).some(None, seed)
    num_test = len(images.labels) // 5
    return Images(*(part[num_test:] for part in images)), Images(*(part[:num_test] for part in images))


def _mnist(folder: Path, part: str, source: str) -> Images:
    pixels = _read_idx(_either(folder, f"{part}-images-idx3-ubyte", source), num_axes=3)
    labels = _read_idx(_either(folder, f"{part}-labels-idx1-ubyte", source), num_axes=1)
    if len(pixels) != len(labels):
        raise SystemExit(
            f"{folder} has {len(pixels)} {part} images and {len(labels)} labels, wanted one label an image"
        )
    return Images(pixels[..., None], labels.astype(np.int32))


def _either(folder: Path, name: str, source: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise SystemExit(f"{folder} has neither {name} nor {name}.gz; they are at {source}")


def _read_idx(file: Path, num_axes: int) -> np.ndarray:
    """Read an IDX file.

    It has two zero bytes, 8 for bytes, the number of axes, the sizes in four bytes each (highest first), and the bytes.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise SystemExit(f"{file} is not a whole gzip file ({error}): get it again") from error
    if content[:4] != bytes([0, 0, 8, num_axes]):
        raise SystemExit(f"{file} begins with {content[:4].hex()}, wanted 000008{num_axes:02x}: an idx file of bytes")
    start = 4 + 4 * num_axes
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if len(content) != start + math.prod(shape):
        raise SystemExit(
            f"{file} has {len(content)} bytes, wanted {start + math.prod(shape)} for {shape}: get it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


_TRAINED_ON = [f"data_batch_{i}" for i in range(1, 6)]


def _cifar(folder: Path) -> tuple[Images, Images]:
    """Read CIFAR-10 in whichever of the two formats has its first file in one of the folders."""
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for suffix in ("", ".bin"):
            if (place / f"data_batch_1{suffix}").is_file():
                parts = [[place / f"{name}{suffix}" for name in names] for names in (_TRAINED_ON, ["test_batch"])]
                train, test = (_joined([_read_cifar(file) for file in files]) for files in parts)
                return train, test
    raise SystemExit(
        f"{folder} has neither data_batch_1 (CIFAR-10 for Python) nor data_batch_1.bin (binary), nor do its folders "
        f"cifar-10-batches-py and cifar-10-batches-bin; they are at {_SOURCES['cifar10']}"
    )


def _joined(parts: list[Images]) -> Images:
    return Images(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _read_cifar(file: Path) -> Images:
    """Read images of 3072 bytes: red, then green, then blue, row by row; in binary files after a byte for the label."""
    if not file.is_file():
        raise SystemExit(f"{file} is missing; it is at {_SOURCES['cifar10']}")
    if file.suffix == ".bin":
        content = np.frombuffer(file.read_bytes(), np.uint8)
        if not content.size or content.size % 3073:
            raise SystemExit(f"{file} has {content.size} bytes, wanted 3073 an image: get it again")
        labels, pixels = content.reshape(-1, 3073)[:, 0], content.reshape(-1, 3073)[:, 1:]
    else:
        try:
            with file.open("rb") as opened:
                content = _ArraysOnly(opened, encoding="bytes").load()
            labels, pixels = np.asarray(content[b"labels"]), np.asarray(content[b"data"], np.uint8).reshape(-1, 3072)
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"{file} is no batch of CIFAR-10 for Python ({error!r}): get it again") from error
    return Images(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int32))


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that loads only arrays, as any pickle may run a program.

    The pickles of CIFAR-10 name only arrays, in the NumPy of their time or of now.
    """

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.ndarray(0).__reduce__()[0]
        match module, name:
            case ("numpy", "ndarray" | "dtype"):
                return getattr(np, name)
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return reconstruct
        raise pickle.UnpicklingError(f"it names {module}.{name}, wanted arrays alone")
