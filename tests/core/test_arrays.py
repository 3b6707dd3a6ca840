"""What callers have for arrays is read as it is, or refused with words that help."""

import functools
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import flatjax
from flatjax.core.arrays import as_arrays

KERNEL = np.array([[2.0, 0.5, -2.0], [1.0, -1.0, 0.3]])
FEATS = np.array([[1.0, 0.2], [-1.0, 0.7]])
LABELS = np.array([0, 2])


def kappa(feats=FEATS, labels=LABELS, weights=None, kernel=KERNEL):
    return float(flatjax.relative_flatness({"kernel": kernel}, feats, labels, weights))


WANTED = helpers.dense_flatness(
    helpers.softmax_cross_entropy, helpers.Problem(KERNEL.T, np.zeros(3), FEATS, LABELS, np.ones(2))
).kappa


def test_lists_and_lists_of_arrays_are_arrays():
    for read in (np.ndarray.tolist, list, lambda x: tuple(map(jnp.asarray, x))):
        got = kappa(read(FEATS), read(LABELS), read(np.ones(2)), read(KERNEL))
        np.testing.assert_allclose(got, WANTED, rtol=1e-12)


def test_lists_of_traced_numbers_are_arrays():
    got = jax.jit(lambda w: flatjax.relative_flatness({"kernel": KERNEL}, FEATS, LABELS, [w, w]))(3.0)
    np.testing.assert_allclose(got, WANTED, rtol=1e-12)


def test_what_is_an_array_stays_the_same_object():
    moments = flatjax.ClassMoments.init(3, 2)
    for value in (jnp.ones(3), np.ones(3), moments, {"a": jnp.ones(2), "b": None}, 1.5, None):
        assert as_arrays("x", value) is value


LABEL_DTYPES = [(-(2**63), "int64"), (-(2**32) - 100, "int64"), (2**32, "int64"), (2**63, "uint64")]


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize(("label", "dtype"), LABEL_DTYPES)
def test_labels_of_64_bits_that_jax_would_wrap_around_stay_bad_without_x64(label, dtype, is_list):
    labels = np.array([0, label], dtype)
    labels = list(labels) if is_list else labels
    with jax.enable_x64(False):
        assert np.isnan(kappa(labels=labels))
        moments = flatjax.ClassMoments.init(3, 2).update(FEATS, labels)
        assert (moments.num_bad, moments.counts.tolist()) == (1, [1, 0, 0])
        with pytest.raises(checkify.JaxRuntimeError, match=r"labels\[1\] is"):
            flatjax.check_inputs({"kernel": KERNEL}, FEATS, labels)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_numbers_of_64_bits_are_what_they_are_without_x64(dtype):
    with jax.enable_x64(False):
        weights = np.array([2**40, 2**41], dtype)
        np.testing.assert_allclose(kappa(weights=weights), kappa(weights=[1.0, 2.0]), rtol=1e-6)
        np.testing.assert_allclose(kappa(labels=LABELS.astype(dtype)), WANTED, rtol=1e-6)


@pytest.mark.parametrize(
    "labels", [["cat", "dog"], np.array(["cat", "dog"]), np.array(["cat", "dog"], object), [b"cat", b"dog"], "cat"]
)
def test_text_for_labels_is_refused_with_how_to_number_it(labels):
    with helpers.raises(TypeError, r"labels .*cat.*np\.unique\(labels, return_inverse=True\)\[1\]|labels is a str"):
        kappa(labels=labels)
    with helpers.raises(TypeError, "labels"):
        flatjax.ClassMoments.init(2, 2).update(FEATS, labels)


def test_a_mapping_for_labels_is_refused():
    with helpers.raises(TypeError, "labels is a dict, wanted integers: number the classes"):
        kappa(labels={"a": jnp.asarray(LABELS)})


@pytest.mark.parametrize(
    ("error", "match", "value"),
    [
        (TypeError, "feats has dtype object, wanted numbers", np.array([[None, 1.0], [1.0, 2.0]])),
        (TypeError, "feats has dtype datetime64", np.zeros((2, 2), "datetime64[s]")),
        (TypeError, "feats is a set, wanted an array", {1.0}),
        (ValueError, "feats is a list of parts of several shapes", [[1.0, 2.0], [1.0]]),
    ],
)
def test_what_is_no_array_is_refused(error, match, value):
    with helpers.raises(error, match):
        kappa(value)


def test_floats_of_one_output_are_told_the_losses_they_are_for():
    with helpers.raises(TypeError, r"labels\[\.\.\., None\].*squared_error.*sigmoid_cross_entropy.*one output"):
        kappa(labels=np.array([0.3, -1.0]), kernel=KERNEL[:, :1])
    with helpers.raises(TypeError, r"wanted integer classes .*, or targets of shape \(\.\.\., 3\)"):
        kappa(labels=np.array([0.0, 1.0]))


class Tensor:
    """As a framework's: it speaks DLPack, but only once it is detached."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device
        self.is_detached = False

    def detach(self):
        other = Tensor(self.array, self.device)
        other.is_detached = True
        return other

    def __dlpack__(self, **options):
        assert self.is_detached
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def test_tensors_of_the_cpu_are_read_and_copied():
    got = kappa(*map(Tensor, (FEATS, LABELS, np.ones(2), KERNEL)))
    np.testing.assert_allclose(got, WANTED, rtol=1e-12)
    array = np.ones(3)
    read = as_arrays("x", Tensor(array))
    array[:] = 2
    np.testing.assert_array_equal(read, np.ones(3))


def test_a_tensor_out_of_reach_is_refused_with_what_to_do():
    with helpers.raises(TypeError, r"feats is a Tensor on \(2, 0\).*wanted a dense one on the CPU: feats\.detach\(\)"):
        kappa(Tensor(FEATS, device=(2, 0)))


def test_tensors_of_pytorch_are_read_in_every_dtype():
    torch = pytest.importorskip("torch")
    kernel = torch.tensor(KERNEL, requires_grad=True)
    got = kappa(torch.tensor(FEATS), torch.tensor(LABELS), torch.ones(2), kernel.T.contiguous().T)
    np.testing.assert_allclose(got, WANTED, rtol=1e-12)
    half = torch.tensor(FEATS, dtype=torch.bfloat16, requires_grad=True)
    read = as_arrays("feats", half)
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read.astype("float32"), half.detach().float().numpy())
    with torch.no_grad():
        half += 1
    assert not np.array_equal(read.astype("float32"), half.detach().float().numpy())
    for unread in (torch.tensor(FEATS).to_sparse(), torch.empty(2, 2, device="meta")):
        with helpers.raises(TypeError, "feats is a Tensor on (cpu|meta) that JAX cannot read"):
            kappa(unread)
    with jax.enable_x64(False):
        assert np.isnan(kappa(labels=torch.tensor([0, 2**32])))


def test_static_options_are_plain_values():
    static = functools.partial(flatjax.relative_flatness, {"kernel": KERNEL}, FEATS, LABELS)
    np.testing.assert_allclose(static(tile_size=np.int64(2)), WANTED, rtol=1e-12)
    for tile_size in (jnp.array(2), np.array(2)):
        with helpers.raises(TypeError, r"tile_size is an array of shape \(\), wanted a plain one.*static"):
            static(tile_size=tile_size)
    with helpers.raises(TypeError, r"tile_size is a traced value.*static_argnames='tile_size'"):
        jax.jit(lambda size: static(tile_size=size))(2)
    with helpers.raises(TypeError, r"loss is a Loss without a hash.*give a function that calls it"):
        static(loss=Loss())
    json.dumps(static(loss=helpers.softmax_cross_entropy).item())


class Loss:
    """A callable that is told apart by its contents, of which there is no hash."""

    __hash__ = None

    def __call__(self, logits, label):
        return helpers.softmax_cross_entropy(logits, label)
