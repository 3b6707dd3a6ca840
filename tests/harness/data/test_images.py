"""Small files in the published formats are read as what they were made of."""

import gzip
import os
import pickle
import struct
from typing import ClassVar

import numpy as np
import pytest

from harness.data import images

RNG = np.random.default_rng(0)


def write_idx(file, array):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_mnist(folder, suffix):
    """Images that are neither square nor the same upside down; what was written, by part."""
    written = {}
    for part, number in (("train", 5), ("t10k", 3)):
        pixels = RNG.integers(0, 256, (number, 6, 4)).astype(np.uint8)
        labels = RNG.integers(0, 10, number).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
        written[part] = pixels[..., None], labels
    return written


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, and NumPy's module by its name of that time."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes

    def save_global(self, value, name=None):
        if value is np.ndarray(0).__reduce__()[0]:
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        else:
            super().save_global(value, name)

    dispatch[type(lambda: 0)] = save_global
    dispatch[type(len)] = save_global


CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar(folder, suffix):
    """Two images a file; what was written, all files in a row."""
    folder.mkdir(exist_ok=True)
    pixels = RNG.integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    labels = RNG.integers(0, 10, 12)
    for i, name in enumerate(CIFAR_FILES):
        rows = pixels[2 * i : 2 * i + 2].transpose(0, 3, 1, 2).reshape(2, 3072)
        given = labels[2 * i : 2 * i + 2]
        if suffix:
            content = np.concatenate([given.astype(np.uint8)[:, None], rows], axis=1).tobytes()
            (folder / f"{name}{suffix}").write_bytes(content)
        else:
            with (folder / name).open("wb") as file:
                Python2Pickler(file, protocol=2).dump({b"data": rows, b"labels": given.tolist()})
    return pixels, labels


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_plain_or_compressed_give_their_images_and_labels(tmp_path, name, suffix):
    written = write_mnist(tmp_path, suffix)
    for got, part in zip(images.load(name, tmp_path, seed=0), ("train", "t10k"), strict=True):
        np.testing.assert_array_equal(got.pixels, written[part][0])
        np.testing.assert_array_equal(got.labels, written[part][1])
        assert got.labels.dtype == np.int32


@pytest.mark.parametrize("suffix", ["", ".bin"])
@pytest.mark.parametrize("inner", [None, "cifar-10-batches"])
def test_both_formats_of_cifar_give_their_images_and_labels_from_the_folder_or_the_one_in_it(tmp_path, suffix, inner):
    inner = inner and f"{inner}-{'bin' if suffix else 'py'}"
    pixels, labels = write_cifar(tmp_path / inner if inner else tmp_path, suffix)
    train, test = images.load("cifar10", tmp_path, seed=0)
    np.testing.assert_array_equal(np.concatenate([train.pixels, test.pixels]), pixels)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels)
    assert len(train.labels) == 10


def test_a_generated_batch_has_the_opcodes_of_python_2(tmp_path):
    write_cifar(tmp_path, "")
    content = (tmp_path / "data_batch_1").read_bytes()
    assert b"cnumpy.core.multiarray\n_reconstruct" in content
    assert b"_codecs" not in content


def test_a_pickle_that_names_a_program_is_refused_and_not_run(tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    write_cifar(tmp_path, "")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Program(), b"labels": [0]}))
    with pytest.raises(SystemExit, match="wanted arrays alone"):
        images.load("cifar10", tmp_path, seed=0)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mnist", "train-images-idx3-ubyte.gz; they are at https://ossci"),
        ("fashion-mnist", "train-images-idx3-ubyte.gz; they are at https://github.com/zalandoresearch"),
        ("cifar10", "neither data_batch_1 .* nor data_batch_1.bin .* https://www.cs.toronto.edu"),
    ],
)
def test_a_file_that_is_missing_is_named_with_its_source(tmp_path, name, wanted):
    with pytest.raises(SystemExit, match=wanted):
        images.load(name, tmp_path, seed=0)
    with pytest.raises(SystemExit, match="which is no folder"):
        images.load(name, tmp_path / "none", seed=0)
    with pytest.raises(SystemExit, match="--data-dir"):
        images.load(name, None, seed=0)


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_a_batch_of_cifar_that_is_missing_is_named(tmp_path, suffix):
    write_cifar(tmp_path, suffix)
    (tmp_path / f"data_batch_3{suffix}").unlink()
    with pytest.raises(SystemExit, match=f"data_batch_3{suffix} is missing"):
        images.load("cifar10", tmp_path, seed=0)


@pytest.mark.parametrize(
    ("file", "change", "wanted"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1], "has 135 bytes, wanted 136"),
        ("train-images-idx3-ubyte", lambda content: b"\x1f\x8b" + content, "begins with 1f8b0000, wanted 00000803"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:7] + b"\x02" + content[8:-1], "3 t10k images and 2 labels"),
        ("train-labels-idx1-ubyte.gz", lambda content: content[:-4], "not a whole gzip file"),
    ],
)
def test_a_damaged_idx_file_is_an_error(tmp_path, file, change, wanted):
    write_mnist(tmp_path, ".gz" if file.endswith(".gz") else "")
    (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
    with pytest.raises(SystemExit, match=wanted):
        images.load("mnist", tmp_path, seed=0)


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_a_damaged_batch_of_cifar_is_an_error(tmp_path, suffix):
    write_cifar(tmp_path, suffix)
    file = tmp_path / f"data_batch_2{suffix}"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r"data_batch_2.* get it again"):
        images.load("cifar10", tmp_path, seed=0)


def test_the_digits_are_split_by_the_seed_alone_into_parts_that_are_all_of_them():
    train, test = images.load("digits", None, seed=3)
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    together = np.concatenate([train.pixels, test.pixels]).reshape(1797, -1)
    again, _ = images.load("digits", None, seed=3)
    np.testing.assert_array_equal(train.pixels, again.pixels)
    other = images.load("digits", None, seed=4)
    assert np.any(train.labels != other[0].labels)
    others = np.concatenate([part.pixels for part in other]).reshape(1797, -1)
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(others, axis=0))
    assert together.max() == 255


def test_some_images_keep_their_labels():
    given = images.Images(np.arange(50, dtype=np.uint8)[:, None, None, None], np.arange(50))
    chosen = given.some(20, seed=0)
    np.testing.assert_array_equal(chosen.pixels.ravel(), chosen.labels)
    assert len(set(chosen.labels.tolist())) == 20
