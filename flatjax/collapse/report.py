"""All metrics of neural collapse that the moments of the classes hold, at once."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flatjax.collapse.class_means import AxisName, ClassMeans, class_means, classifier
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.nc1_variability import square_within_means, sum_of_cdnv
from flatjax.collapse.nc2_geometry import cosine_statistics, distance_to_etf, least_distance_to_etf, norm_variation
from flatjax.collapse.nc2_uniformity import log_distances
from flatjax.collapse.nc3_duality import duality_variation, self_duality
from flatjax.core import results
from flatjax.core.metric import metric
from flatjax.heads import HeadParams, LinearHead


class CollapseReport(NamedTuple):
    """The result of `collapse_report`: scalars, by the conventions of `NeuralCollapse`, over the classes kept.

    Attributes:
        nc1: as `nc1`; None if the moments have no covariance.
        nc2_equinorm_means: as `equinorm`.
        nc2_equinorm_classifier: the same of the classifier. It is None without `params`, as all values of the
            classifier and nc3 and unc3 are.
        nc2_equiangularity_means: as `equiangularity`.
        nc2_equiangularity_classifier: the same of the classifier.
        nc2_cosine_std_means: as `cosine_std`.
        nc2_cosine_std_classifier: the same of the classifier.
        nc2_etf_error: as `etf_error`, of the means.
        nc2_etf_error_classifier: the same of the classifier.
        nc2_etf_floor: as `etf_floor`.
        gnc2_mean_means, gnc2_variation_means: as `gnc2`.
        gnc2_mean_classifier, gnc2_variation_classifier: the same of the classifier.
        nc3: as `nc3`, squared.
        unc3: as `unc3`.
        cdnv: as `cdnv`.
        ncc: as `ncc`.
        num_classes_kept: C, classes with `min_count` samples or more.
        num_classes_empty: classes with none.
        num_classes_single: classes with one.
        num_directions: as in `NeuralCollapse`; None where NC1 is.
    """

    nc1: Float[Array, ""] | None
    nc2_equinorm_means: Float[Array, ""]
    nc2_equiangularity_means: Float[Array, ""]
    nc2_cosine_std_means: Float[Array, ""]
    nc2_etf_error: Float[Array, ""]
    nc2_etf_floor: Float[Array, ""]
    gnc2_mean_means: Float[Array, ""]
    gnc2_variation_means: Float[Array, ""]
    cdnv: Float[Array, ""]
    ncc: Float[Array, ""]
    num_classes_kept: Int[Array, ""]
    num_classes_empty: Int[Array, ""]
    num_classes_single: Int[Array, ""]
    nc2_equinorm_classifier: Float[Array, ""] | None = None
    nc2_equiangularity_classifier: Float[Array, ""] | None = None
    nc2_cosine_std_classifier: Float[Array, ""] | None = None
    nc2_etf_error_classifier: Float[Array, ""] | None = None
    gnc2_mean_classifier: Float[Array, ""] | None = None
    gnc2_variation_classifier: Float[Array, ""] | None = None
    nc3: Float[Array, ""] | None = None
    unc3: Float[Array, ""] | None = None
    num_directions: Int[Array, ""] | None = None

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def collapse_report(
    moments: ClassMoments,
    params: HeadParams | None = None,
    *,
    min_count: int = 2,
    tile_size: int | None = None,
    axis_name: AxisName = None,
) -> CollapseReport:
    """Reports every metric of the means, and with `params` of the classifier, by its default convention.

    NC4 needs samples, and is not among them: see `nc4`.

    Args:
        moments: the moments of C classes and m features; NC1 needs them with the covariance.
        params: the head of C outputs, as for `relative_flatness`.
        min_count: classes with fewer samples are left out; above 2 NC1 is None, as the covariance is of all samples.
        tile_size: as for `cdnv`.
        axis_name: as for `cdnv`.

    Returns:
        A `CollapseReport`.

    Raises:
        TypeError, ValueError: as `equinorm`.

    Notes:
        Three metrics of the means and two of the classifier go over all pairs. Each costs half a product of matrices
        (C, m)·(m, C).

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import ClassMoments, collapse_report
        >>> feats = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], jnp.float32)
        >>> moments = ClassMoments.init(2, 2).update(feats, jnp.array([0, 0, 1, 1]))
        >>> report = collapse_report(moments, {"kernel": jnp.array([[1.0, -1.0], [0.0, 0.0]])})
        >>> print(f"{report.cdnv:.4f} {report.nc3:.4f} {report.nc1}")
        0.0025 0.0000 None
    """
    classes = class_means(moments, min_count=min_count, axis_name=axis_name)
    heads = () if params is None else (classifier(params, moments),)
    metrics = of_means(classes, tile_size)
    metrics |= {
        f"gnc2_{name}_means": x for name, x in log_distances(classes.centred, classes, tile_size)._asdict().items()
    }
    for head in heads:
        metrics |= of_classifier(head, classes, tile_size)
        rows = classes.only_kept(head.weight)
        metrics["nc2_etf_error_classifier"] = distance_to_etf(rows, classes)
        metrics["unc3"] = duality_variation(rows, classes)
        of_rows = log_distances(rows, classes, tile_size)._asdict()
        metrics |= {f"gnc2_{name}_classifier": x for name, x in of_rows.items()}
    within, num_directions = None, None
    if moments.product_sums is not None and min_count <= 2:
        within, num_directions = square_within_means(moments, classes)
    return CollapseReport(
        nc1=None if within is None else classes.defined(within),
        num_directions=num_directions,
        **classes.defined(metrics, *heads),
        **class_counts(moments, classes),
    )


def of_means(classes: ClassMeans, tile_size: int | None = None) -> dict[str, Float[Array, ""]]:
    """The metrics that need only the means."""
    angle, cosine_std = cosine_statistics(classes.centred, classes, tile_size)
    ncc = sum_of_cdnv(classes, tile_size)
    return {
        "nc2_equinorm_means": norm_variation(classes.centred, classes),
        "nc2_equiangularity_means": angle,
        "nc2_cosine_std_means": cosine_std,
        "nc2_etf_error": distance_to_etf(classes.centred, classes),
        "nc2_etf_floor": least_distance_to_etf(classes),
        "cdnv": ncc / (classes.count * (classes.count - 1)),
        "ncc": ncc,
    }


def of_classifier(head: LinearHead, classes: ClassMeans, tile_size: int | None = None) -> dict[str, Float[Array, ""]]:
    """The metrics of the classifier, and of how it fits the means."""
    rows = classes.only_kept(head.weight)
    angle, cosine_std = cosine_statistics(rows, classes, tile_size)
    return {
        "nc2_equinorm_classifier": norm_variation(rows, classes),
        "nc2_equiangularity_classifier": angle,
        "nc2_cosine_std_classifier": cosine_std,
        "nc3": self_duality(rows, classes),
    }


def class_counts(moments: ClassMoments, classes: ClassMeans) -> dict[str, Int[Array, ""]]:
    """Counts how many classes are kept, and how many cannot be."""
    return {
        "num_classes_kept": classes.num_kept,
        "num_classes_empty": classes.total((moments.counts == 0).astype(jnp.int32)),
        "num_classes_single": classes.total((moments.counts == 1).astype(jnp.int32)),
    }
