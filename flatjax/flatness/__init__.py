"""Relative flatness of a linear head and its variants; see `flatjax.flatness.relative`."""

from flatjax.flatness.cross_entropy import cross_entropy_and_flatness as cross_entropy_and_flatness
from flatjax.flatness.inputs import Loss as Loss
from flatjax.flatness.logit_sharpness import LogitSharpness as LogitSharpness
from flatjax.flatness.logit_sharpness import head_logit_sharpness as head_logit_sharpness
from flatjax.flatness.logit_sharpness import logit_sharpness as logit_sharpness
from flatjax.flatness.relative import max_relative_flatness as max_relative_flatness
from flatjax.flatness.relative import relative_flatness as relative_flatness
from flatjax.flatness.relative import row_block_traces as row_block_traces
from flatjax.flatness.relative import simplified_relative_flatness as simplified_relative_flatness
from flatjax.flatness.robustness import feature_robustness as feature_robustness
