"""Training with flatness, and what it is compared with: SAM, ASAM, SAF, MESA, a confidence penalty, label smoothing."""

from flatjax.training.collapse_reg import CollapseRegState as CollapseRegState
from flatjax.training.collapse_reg import collapse_reg as collapse_reg
from flatjax.training.flat_reg import FlatRegState as FlatRegState
from flatjax.training.flat_reg import flat_reg as flat_reg
from flatjax.training.logit_penalties import confidence_penalty as confidence_penalty
from flatjax.training.logit_penalties import label_smoothing as label_smoothing
from flatjax.training.sharpness_aware import sharpness_aware as sharpness_aware
from flatjax.training.trajectory_loss import LogitMemory as LogitMemory
from flatjax.training.trajectory_loss import trajectory_loss as trajectory_loss
