"""Neural collapse, from the moments of the classes of any stream of features.

Keyword-only arguments are static, as for all metrics: in a `jax.jit` of your own, too, they are no traced values.
"""

from flatjax.collapse.decisions import Decisions, nc4
from flatjax.collapse.duality import nc3, unc3
from flatjax.collapse.geometry import cosine_std, equiangularity, equinorm, etf_error, etf_floor
from flatjax.collapse.layers import init_layers, layer_reports, update_layers
from flatjax.collapse.mixing import MixupGeometry, mixup, mixup_geometry
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.report import CollapseReport, collapse_report
from flatjax.collapse.squared_error import (
    SquaredErrorDecomposition,
    central_path,
    least_squares_head,
    squared_error_decomposition,
)
from flatjax.collapse.uniformity import Uniformity, gnc2
from flatjax.collapse.variability import cdnv, nc1, ncc

__all__ = [
    "ClassMoments",
    "CollapseReport",
    "Decisions",
    "MixupGeometry",
    "SquaredErrorDecomposition",
    "Uniformity",
    "cdnv",
    "central_path",
    "collapse_report",
    "cosine_std",
    "equiangularity",
    "equinorm",
    "etf_error",
    "etf_floor",
    "gnc2",
    "init_layers",
    "layer_reports",
    "least_squares_head",
    "mixup",
    "mixup_geometry",
    "nc1",
    "nc3",
    "nc4",
    "ncc",
    "squared_error_decomposition",
    "unc3",
    "update_layers",
]
