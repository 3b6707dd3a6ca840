"""Measure the flatness and the neural collapse of networks in JAX."""

from flatjax.checks import check_inputs
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.neural_collapse import NeuralCollapse, neural_collapse
from flatjax.collapse.report import CollapseReport, collapse_report
from flatjax.flatness.cross_entropy import cross_entropy_and_flatness
from flatjax.flatness.logit_sharpness import logit_sharpness
from flatjax.flatness.relative import (
    max_relative_flatness,
    relative_flatness,
    row_block_traces,
    simplified_relative_flatness,
)
from flatjax.flatness.robustness import feature_robustness
from flatjax.layers.flatness import layer_relative_flatness
from flatjax.layers.kernels import Layer
from flatjax.layers.profile import flatness_profile
from flatjax.losses import cross_entropy
from flatjax.representations.geometry import representation_geometry
from flatjax.representations.jacobians import residual_jacobians
from flatjax.training.collapse_reg import collapse_reg
from flatjax.training.flat_reg import flat_reg

__version__ = "0.1.0"

__all__ = [
    "ClassMoments",
    "CollapseReport",
    "Layer",
    "NeuralCollapse",
    "check_inputs",
    "collapse_reg",
    "collapse_report",
    "cross_entropy",
    "cross_entropy_and_flatness",
    "feature_robustness",
    "flat_reg",
    "flatness_profile",
    "layer_relative_flatness",
    "logit_sharpness",
    "max_relative_flatness",
    "neural_collapse",
    "relative_flatness",
    "representation_geometry",
    "residual_jacobians",
    "row_block_traces",
    "simplified_relative_flatness",
]
