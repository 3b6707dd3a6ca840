"""Measure the flatness and the neural collapse of networks in JAX."""

from flatjax.checks import check_inputs as check_inputs
from flatjax.collapse.moments import ClassMoments as ClassMoments
from flatjax.collapse.report import CollapseReport as CollapseReport
from flatjax.collapse.report import collapse_report as collapse_report
from flatjax.collapse.snapshot import NeuralCollapse as NeuralCollapse
from flatjax.collapse.snapshot import neural_collapse as neural_collapse
from flatjax.flatness.cross_entropy import cross_entropy_and_flatness as cross_entropy_and_flatness
from flatjax.flatness.logit_sharpness import logit_sharpness as logit_sharpness
from flatjax.flatness.relative import max_relative_flatness as max_relative_flatness
from flatjax.flatness.relative import relative_flatness as relative_flatness
from flatjax.flatness.relative import row_block_traces as row_block_traces
from flatjax.flatness.relative import simplified_relative_flatness as simplified_relative_flatness
from flatjax.flatness.robustness import feature_robustness as feature_robustness
from flatjax.layers.flatness import layer_relative_flatness as layer_relative_flatness
from flatjax.layers.kernels import Layer as Layer
from flatjax.layers.profile import flatness_profile as flatness_profile
from flatjax.losses import cross_entropy as cross_entropy
from flatjax.representations.geometry import representation_geometry as representation_geometry
from flatjax.representations.jacobians import residual_jacobians as residual_jacobians
from flatjax.training.collapse_reg import collapse_reg as collapse_reg
from flatjax.training.flat_reg import flat_reg as flat_reg
