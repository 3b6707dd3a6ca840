"""The metrics of neural collapse of one set of features and one classifier, at one moment."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from flatjax.collapse.class_means import class_means
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.nc1_variability import mean_square_in_means
from flatjax.collapse.nc4_nearest_mean import disagreements
from flatjax.collapse.report import class_counts, of_classifier, of_means
from flatjax.core import results
from flatjax.core.integers import whole_number
from flatjax.core.metric import metric
from flatjax.heads import HeadParams, LinearHead, linear_head
from flatjax.samples import (
    Classes,
    Features,
    Samples,
    Weights,
    check_one_class_a_sample,
    flatten_samples,
    mark_class_labels,
)


class NeuralCollapse(NamedTuple):
    """The result of `neural_collapse`: every metric falls to 0 (NC2's ETF error to its floor) as a network collapses.

    The values are scalars, or under `vmap` one for each of the batch. C is the number of classes kept.

    Attributes:
        nc1: tr(Σ_W Σ_B⁺)/C.
        nc2_equinorm_means: std/mean of ‖μ_c − μ_G‖, with C − 1 in the denominator of the variance.
        nc2_equinorm_classifier: the same of ‖w_c‖.
        nc2_equiangularity_means: mean over c ≠ c' of |cos(μ_c − μ_G, μ_c' − μ_G) + 1/(C − 1)|.
        nc2_equiangularity_classifier: the same of cos(w_c, w_c').
        nc2_cosine_std_means: standard deviation over c ≠ c' of cos(μ_c − μ_G, μ_c' − μ_G), with the number of pairs in
            the denominator of the variance.
        nc2_cosine_std_classifier: the same of cos(w_c, w_c').
        nc2_etf_error: ‖M̄ᵀM̄/‖M̄ᵀM̄‖_F − (I − 11ᵀ/C)/√(C − 1)‖_F with M̄ = [μ_c − μ_G].
        nc2_etf_floor: what the ETF error cannot fall below with m features: √(2 − 2√(m/(C − 1))) where m < C − 1,
            else 0.
        nc3: ‖W/‖W‖_F − M̄ᵀ/‖M̄‖_F‖_F², squared.
        nc4: share of samples where the network (bias included) and the nearest class mean disagree.
        cdnv: class-distance normalized variance, the mean over c ≠ c' of (V_c + V_c')/(2‖μ_c − μ_c'‖²).
        ncc: the same, summed over the ordered pairs c ≠ c', so C(C − 1) times as large.
        num_classes_kept: C, classes with two samples or more.
        num_classes_empty: classes with none.
        num_classes_single: classes with one, masked like the empty ones: a single sample has no spread.
        num_directions: rank of Σ_B, the number of directions in which the class means are told apart. It is C − 1 or m,
            whichever is less, unless means lie in fewer dimensions or rounding hides that they do not. NC1 is over
            these directions.
    """

    nc1: Float[Array, ""]
    nc2_equinorm_means: Float[Array, ""]
    nc2_equinorm_classifier: Float[Array, ""]
    nc2_equiangularity_means: Float[Array, ""]
    nc2_equiangularity_classifier: Float[Array, ""]
    nc2_cosine_std_means: Float[Array, ""]
    nc2_cosine_std_classifier: Float[Array, ""]
    nc2_etf_error: Float[Array, ""]
    nc2_etf_floor: Float[Array, ""]
    nc3: Float[Array, ""]
    nc4: Float[Array, ""]
    cdnv: Float[Array, ""]
    ncc: Float[Array, ""]
    num_classes_kept: Int[Array, ""]
    num_classes_empty: Int[Array, ""]
    num_classes_single: Int[Array, ""]
    num_directions: Int[Array, ""]

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def neural_collapse(
    params: HeadParams,
    feats: Features,
    labels: Classes,
    weights: Weights | None = None,
    *,
    num_classes: int | None = None,
) -> NeuralCollapse:
    """Measures neural collapse of features and of the head that classifies them: NC1 to NC4, CDNV and NCC.

    The formulas and conventions, which differ between codes, stand with the attributes of `NeuralCollapse`. There h are
    the features, μ_c is the mean of class c, V_c the mean squared distance to it, and μ_G the unweighted mean of the
    class means. Σ_W is the covariance within the classes (over all samples), Σ_B = M̄M̄ᵀ/C that of the class means, and
    w_c are the rows of the head. For more samples than are in memory, or for a vocabulary, take `ClassMoments` batch by
    batch, and a `collapse_report`.

    Args:
        params: the head of C outputs, as for `relative_flatness`.
        feats: features (..., m).
        labels: integer classes (...,) in 0 … C − 1.
        weights: sample weights (...,), all 1 by default; 0 masks a sample, and the derivative in that weight is 0.
        num_classes: C, at least 2, static. It is the number of outputs of the head, and need not be given.

    Returns:
        A `NeuralCollapse`: scalars without a unit. Classes without two samples are left out of all of them, and
        counted. Where a metric has no value it is NaN or infinite: with fewer than two classes left, where two class
        means are one (CDNV, NCC), or all of them (every metric of means but the floor), and where rounding of class
        means that are far off hides how others differ (NC1). All are NaN where a feature, a logit or the head is not
        finite, a label out of range, or a weight negative: `flatjax.check_inputs` says where.

    Raises:
        TypeError: `params` is no mapping, or `labels` are not integers.
        ValueError: fewer than 2 classes, another number than the head has outputs, or shapes that do not fit.

    Notes:
        Means come first and centred squares second: in float32 a V_c of 1e-12 of the squared distances keeps six
        digits. The memory is O((n + C)·(m + 512)).

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import neural_collapse
        >>> feats = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
        >>> head = {"kernel": jnp.array([[1.0, -1.0], [0.0, 0.0]])}
        >>> collapse = neural_collapse(head, feats, jnp.array([0, 0, 1, 1]))
        >>> print(f"{collapse.nc1:.4f} {collapse.nc3:.4f} {collapse.nc4:.4f} {collapse.cdnv:.4f} {collapse.ncc:.4f}")
        0.0000 0.0000 0.0000 0.0025 0.0050

    References:
        Papyan, Han, Donoho: *Prevalence of Neural Collapse during the Terminal Phase of Deep Learning Training*, 2020.
        Galanti, György, Hutter: *On the Role of Neural Collapse in Transfer Learning*, 2022 (CDNV).
        Han, Kamp: *Flattening the Path to Generalization in LLMs*, a talk (NCC, the sum; not to be taken for the
        accuracy of the nearest class centre, which goes by the same letters).
    """
    head, samples = _classified_samples(params, feats, labels, weights, num_classes)
    num_classes = head.num_outputs
    empty = ClassMoments.init(num_classes, head.num_features, dtype=samples.feats.dtype)
    batch = empty.read(samples.feats, samples.labels, samples.weights)
    moments = empty.with_batch(batch)
    classes = class_means(moments)
    weights = jnp.where(classes.kept[batch.classes], batch.weights, 0)
    residuals = jnp.where((weights != 0)[:, None], moments.residuals(batch) / classes.unit, 0)
    disagrees = disagreements(head, batch.feats, residuals, batch.classes, classes)
    shares = weights / jnp.sum(weights)
    within, num_directions = mean_square_in_means(residuals, shares, classes)
    metrics = {
        "nc1": within,
        "nc4": jnp.sum(jnp.where(weights == 0, 0, shares * disagrees)),
        **of_means(classes),
        **of_classifier(head, classes),
    }
    return NeuralCollapse(
        **classes.defined(metrics, head),
        **class_counts(moments, classes),
        num_directions=num_directions,
    )


def _classified_samples(
    params: HeadParams, feats: ArrayLike, labels: ArrayLike, weights: ArrayLike | None, num_classes: int | None
) -> tuple[LinearHead, Samples]:
    head = linear_head(params)
    samples = flatten_samples(head, feats, labels, weights)
    num_classes = head.num_outputs if num_classes is None else whole_number(num_classes, "num_classes")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; there is nothing between fewer than 2 classes")
    if num_classes != head.num_outputs:
        raise ValueError(f"num_classes is {num_classes}, but the head has {head.num_outputs} outputs, one a class")
    check_one_class_a_sample(samples, labels)
    return head.astype(samples.feats.dtype), mark_class_labels(samples, num_classes)
