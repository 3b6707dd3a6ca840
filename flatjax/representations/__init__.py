"""Geometry of features and of the residual stream that carries them."""

from flatjax.representations.alignment import LineFit as LineFit
from flatjax.representations.alignment import ResidualAlignment as ResidualAlignment
from flatjax.representations.alignment import inverse_norm_growth as inverse_norm_growth
from flatjax.representations.alignment import numerical_ranks as numerical_ranks
from flatjax.representations.alignment import residual_alignment as residual_alignment
from flatjax.representations.coupling import block_coupling as block_coupling
from flatjax.representations.coupling import block_couplings as block_couplings
from flatjax.representations.geometry import geometry_of_covariance as geometry_of_covariance
from flatjax.representations.geometry import representation_geometry as representation_geometry
from flatjax.representations.jacobians import SingularTriplets as SingularTriplets
from flatjax.representations.jacobians import residual_jacobians as residual_jacobians
from flatjax.representations.projections import Projections as Projections
from flatjax.representations.projections import projections as projections
from flatjax.representations.projections import residual_projections as residual_projections
from flatjax.representations.spectrum import RepresentationGeometry as RepresentationGeometry
from flatjax.representations.streaming import FeatureSpectrum as FeatureSpectrum
from flatjax.representations.trajectory import growth_variation as growth_variation
from flatjax.representations.trajectory import line_shape_score as line_shape_score
from flatjax.representations.trajectory import spacing_variation as spacing_variation
