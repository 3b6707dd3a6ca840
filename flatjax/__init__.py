"""Measure and steer the relative flatness and the neural collapse of networks in JAX.

Start with these ten; `help(flatjax.relative_flatness)`, and so on, has their formulas, shapes and examples:

* `relative_flatness`: κ of a linear head, exact, for any loss of the logits. Larger is sharper.
* `cross_entropy_and_flatness`: the loss and κ in one pass, to train with, for heads of any size.
* `layer_relative_flatness`: κ of any layer of any network, exact or with its standard error.
* `flatness_profile`: κ of all layers, on a whole data set.
* `neural_collapse`: NC1 to NC4, CDNV and NCC of a set of features and the head on it. 0 is collapsed.
* `collapse_report`: the same of a stream of batches, by the moments that `ClassMoments` gathers.
* `flat_reg` and `collapse_reg`: the gradient of κ, or of a measure of collapse, in any optax chain.
* `representation_geometry`: how many directions the features fill.
* `check_inputs`: an error that names the sample whose values make a measure NaN.

The folders, in reading order:

* `flatjax.flatness`: κ of a linear head and its variants. `flatness/relative.py` has the definition.
* `flatjax.collapse`: each measure of neural collapse by itself, with its conventions as arguments.
* `flatjax.layers`: κ of any layer, for which the program of the loss is read. `layers/gauss_newton` measures and
  trains with all layers for about one gradient, by `gauss_newton_profile` and `gauss_newton_flatness`.
* `flatjax.curvature`: products, traces and spectra of the Hessian and the Gauss-Newton matrix of any loss.
* `flatjax.representations`: the geometry of features and of the residual stream.
* `flatjax.training`: regularisers by flatness and collapse, and what they are compared with (SAM, SAF, MESA).
* `flatjax.models`: a perceptron, ResNet-18, ViT, a transformer, and a decoder of five families, in Flax NNX.
* `flatjax.loading`: published checkpoints of language models, read into that decoder.
* `flatjax.diagnosis`: what a language model's checkpoint is like, measured and put on one page.
* `flatjax.run`: the folder, the records, the options and the progress of a run, for experiments and the diagnosis.

Beside them lie `heads`, `samples`, `losses` and `checks` (what goes in), and below all `core`, the ground floor; both
are private: what they have for callers is imported from `flatjax`.
"""

import importlib
from types import ModuleType

from flatjax.checks import check_inputs as check_inputs
from flatjax.collapse.moments import ClassMoments as ClassMoments
from flatjax.collapse.neural_collapse import NeuralCollapse as NeuralCollapse
from flatjax.collapse.neural_collapse import neural_collapse as neural_collapse
from flatjax.collapse.report import CollapseReport as CollapseReport
from flatjax.collapse.report import collapse_report as collapse_report
from flatjax.flatness.cross_entropy import cross_entropy_and_flatness as cross_entropy_and_flatness
from flatjax.flatness.logit_sharpness import logit_sharpness as logit_sharpness
from flatjax.flatness.relative import max_relative_flatness as max_relative_flatness
from flatjax.flatness.relative import relative_flatness as relative_flatness
from flatjax.flatness.relative import row_block_traces as row_block_traces
from flatjax.flatness.relative import simplified_relative_flatness as simplified_relative_flatness
from flatjax.flatness.robustness import feature_robustness as feature_robustness
from flatjax.layers.flatness import layer_relative_flatness as layer_relative_flatness
from flatjax.layers.gauss_newton import TiledLogits as TiledLogits
from flatjax.layers.gauss_newton import gauss_newton_flatness as gauss_newton_flatness
from flatjax.layers.gauss_newton import gauss_newton_profile as gauss_newton_profile
from flatjax.layers.kernels import Layer as Layer
from flatjax.layers.profile import flatness_profile as flatness_profile
from flatjax.layers.sampled import sampled_flatness as sampled_flatness
from flatjax.losses import cross_entropy as cross_entropy
from flatjax.representations.geometry import representation_geometry as representation_geometry
from flatjax.representations.jacobians import residual_jacobians as residual_jacobians
from flatjax.training.collapse_reg import collapse_reg as collapse_reg
from flatjax.training.flat_reg import flat_reg as flat_reg

__version__ = "0.1.0"

_LATER = {"loading", "models"}
_PRIVATE = {"checks", "core", "heads", "losses", "samples", "importlib", "ModuleType"}


def __getattr__(name: str) -> ModuleType:
    """The folders that need Flax, which is imported only once one of them is asked for."""
    if name in _LATER:
        return importlib.import_module(f"flatjax.{name}")
    raise AttributeError(f"module 'flatjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public: the functions and records above, and the folders."""
    public = {name for name in globals() if name not in _PRIVATE}
    return sorted({name for name in public if not name.startswith("_") or name.startswith("__")} | _LATER)
