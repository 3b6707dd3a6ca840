"""Gauss-Newton relative flatness: every layer for one gradient."""

from flatjax.layers.gauss_newton.penalty import gauss_newton_flatness as gauss_newton_flatness
from flatjax.layers.gauss_newton.profile import gauss_newton_profile as gauss_newton_profile
from flatjax.layers.gauss_newton.tiled_logits import TiledLogits as TiledLogits
