"""Relative flatness of any layer of any network, and of all of them."""

from flatjax.layers.flatness import layer_relative_flatness as layer_relative_flatness
from flatjax.layers.gauss_newton import TiledLogits as TiledLogits
from flatjax.layers.gauss_newton import gauss_newton_flatness as gauss_newton_flatness
from flatjax.layers.gauss_newton import gauss_newton_profile as gauss_newton_profile
from flatjax.layers.kernels import Layer as Layer
from flatjax.layers.kernels import find_layers as find_layers
from flatjax.layers.profile import flatness_profile as flatness_profile
from flatjax.layers.record import FlatnessProfile as FlatnessProfile
from flatjax.layers.record import GaussNewtonProfile as GaussNewtonProfile
from flatjax.layers.sampled import sampled_flatness as sampled_flatness
