"""Every field of the record is its formula, whatever the shapes, the weights, the dtypes and the layout of the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flatjax import NeuralCollapse, neural_collapse

from .cases import (
    COUNTS,
    FEW_CLASSES,
    FILLED,
    FLOATING,
    MANY_CLASSES,
    METRICS,
    ONE_FEATURE,
    SHAPES,
    TWO_CLASSES,
    Case,
    assert_close,
    collapsed_case,
    expected,
    measure,
    random_case,
    simplex,
)

# Entries are of order 1. A mean is rounded to ε, what is computed of it to ε times its condition, here up to 100, and
# what is 0 to ε. Measured: 3e-14 and 9e-7.
TOLERANCES = {"float64": {"rtol": 2e-13, "atol": 1e-14}, "float32": {"rtol": 8e-6, "atol": 4e-7}}


OF_BOTH_DTYPES = {
    **SHAPES,
    # Of the same two shapes.
    "unbalanced classes": ((2, 17, 2, 3), 9),
    "empty and single classes": ((9, 0, 8, 1, 11, 1), 4),
}
# In float32 these are measured where means are close, far off, or those of a simplex.
OF_FLOAT64 = {"one class more than features": FILLED, "two classes": TWO_CLASSES, "one feature": ONE_FEATURE}


@pytest.mark.parametrize(
    ("counts", "num_features", "dtype"),
    [
        *(
            pytest.param(*shape, dtype, id=f"{name}-{dtype}")
            for name, shape in OF_BOTH_DTYPES.items()
            for dtype in TOLERANCES
        ),
        *(pytest.param(*shape, "float64", id=f"{name}-float64") for name, shape in OF_FLOAT64.items()),
    ],
)
@pytest.mark.parametrize("share_of_zeros", [0, 0.2], ids=["all samples weigh", "some do not"])
def test_every_field_is_its_formula(counts, num_features, share_of_zeros, dtype):
    case = random_case(counts, num_features).astype(dtype)
    case.weights[np.random.default_rng(1).random(sum(counts)) < share_of_zeros] = 0
    assert_close(measure(case), expected(case), **TOLERANCES[dtype])


def test_metrics_of_two_classes_on_a_line_are_what_one_computes_by_hand():
    # μ = ±1, V = s² = Σ_W, Σ_B = 1: NC1 is s²/2, and each of the two ordered pairs (s² + s²)/(2·2²).
    s = 0.25
    by_hand = {
        "nc1": s**2 / 2,
        "cdnv": s**2 / 4,
        "ncc": s**2 / 2,
        "nc2_equinorm_means": 0,
        "nc2_equinorm_classifier": np.sqrt(2) / 2,  # norms 3 and 1
        "nc2_equiangularity_means": 0,
        "nc2_equiangularity_classifier": 0,
        "nc3": (3 / np.sqrt(10) - np.sqrt(0.5)) ** 2 + (1 / np.sqrt(10) - np.sqrt(0.5)) ** 2,
        "nc4": 0,
    }
    # The line is in a space of three dimensions, and each sample is there six times.
    feats, labels = np.tile([1 + s, 1 - s, -1 + s, -1 - s], 6)[:, None] * np.eye(1, 3), np.tile([0, 0, 1, 1], 6)
    kernel = np.array([[3.0, -1.0], [0, 0], [0, 0]])
    actual = measure(Case(kernel, np.zeros(2), feats, labels, np.ones(24)))
    assert_close(actual, by_hand, rtol=1e-14, atol=1e-15, names=by_hand)


def test_without_a_bias_it_is_zero_and_without_weights_they_are_equal():
    case = random_case(*FEW_CLASSES)._replace(bias=np.zeros(4), weights=np.full(24, 3.0)).astype("float32")
    actual = neural_collapse({"embedding": case.kernel.T, "bias": None}, case.feats, case.labels)
    assert_close(actual, measure(case), **TOLERANCES["float32"])


def test_leading_shapes_are_flattened():
    case = random_case(*FEW_CLASSES)
    shaped = case._replace(
        feats=case.feats.reshape(2, 3, 4, 9),
        labels=case.labels.reshape(2, 3, 4).astype("uint32"),
        weights=case.weights.reshape(2, 3, 4),
    )
    assert_close(measure(shaped), measure(case), **TOLERANCES["float64"])


def test_one_sample_without_a_leading_shape_is_a_single_class():
    case = random_case((1, 0), 3)
    actual = measure(case._replace(feats=case.feats[0], labels=case.labels[0], weights=case.weights[0]))
    assert [int(getattr(actual, name)) for name in COUNTS] == [0, 1, 1]


def test_bfloat16_counts_as_the_float32_values_it_is():
    narrow = random_case(*FEW_CLASSES).astype("bfloat16")
    assert_close(measure(narrow), measure(narrow.astype("float32")), **TOLERANCES["float32"])


@pytest.mark.parametrize("wide", [*FLOATING, None])
def test_metrics_are_float64_where_anything_is(wide):
    case = random_case(*FEW_CLASSES)
    mixed = case.astype("float32")
    if wide:
        mixed = mixed._replace(**{wide: getattr(case, wide)})
    metrics = jax.eval_shape(lambda case: [getattr(measure(case), name) for name in METRICS], mixed)
    assert {x.dtype for x in metrics} == {jnp.dtype("float64" if wide else "float32")}


@pytest.mark.parametrize("layout", ["embedding", "nnx.State of a Linear", "nnx.State of an Embed"])
def test_the_layout_of_the_head_changes_nothing(layout):
    case, weights = random_case(*FEW_CLASSES).astype("float32"), {}
    if layout == "nnx.State of an Embed":  # which has no bias
        case = case._replace(bias=0 * case.bias, weights=np.ones(24, "float32"))
        module = nnx.Embed(4, 9, rngs=nnx.Rngs(0))
        module.embedding[...] = case.kernel.T
        params = nnx.state(module)
    else:
        weights = {"weights": case.weights}
        params = {"embedding": case.kernel.T, "bias": case.bias}
    if layout == "nnx.State of a Linear":
        module = nnx.Linear(9, 4, rngs=nnx.Rngs(0))
        module.kernel[...], module.bias[...] = case.kernel, case.bias
        params = nnx.state(module)
    actual = neural_collapse(params, case.feats, case.labels, **weights)
    # A transposed matrix may be summed in another order.
    assert_close(actual, measure(case), **TOLERANCES["float32"])


@pytest.mark.parametrize(("dtype", "num_classes"), [("int8", 128), ("uint8", 256)])
def test_any_integer_dtype_holds_labels_also_where_it_does_not_hold_their_number(dtype, num_classes):
    counts = np.zeros(num_classes, int)
    counts[[0, 1, num_classes - 1]] = 10
    case = random_case(counts, 4)
    assert_close(measure(case._replace(labels=case.labels.astype(dtype))), expected(case), **TOLERANCES["float64"])


def test_nc4_is_decided_with_the_bias():
    case = collapsed_case(simplex(4, 9), (6, 6, 6, 6))
    assert measure(case).nc4 == 0
    # A bias beyond every logit: the network always says 2, which is right for a quarter of the samples.
    assert float(measure(case._replace(bias=np.array([0, 0, 1e3, 0]))).nc4) == pytest.approx(3 / 4, rel=1e-14)


def test_nc4_compares_with_the_nearest_mean_and_not_with_the_label():
    case = collapsed_case(simplex(4, 9), (6, 6, 6, 6))
    # One of six samples of class 0 lies at the mean of class 1: network and nearest mean agree on that.
    case.feats[0] = simplex(4, 9)[1]
    assert measure(case).nc4 == 0


def test_a_head_of_zeros_lacks_the_metrics_of_the_classifier_alone():
    case = random_case(*FEW_CLASSES)
    actual = measure(case._replace(kernel=0 * case.kernel))
    of_classifier = {name for name in METRICS if name.endswith("classifier")} | {"nc3"}
    assert {name for name in METRICS if np.isnan(getattr(actual, name))} == of_classifier


def test_the_record_is_a_frozen_pytree_of_its_fields():
    actual = measure(random_case(*MANY_CLASSES))
    assert len(jax.tree.leaves(actual)) == len((*METRICS, *COUNTS, "num_directions"))
    doubled = jax.tree.map(lambda x: 2 * x, actual)
    assert isinstance(doubled, NeuralCollapse)
    assert doubled.cdnv == 2 * actual.cdnv
    with pytest.raises(AttributeError):
        actual.nc1 = 0
