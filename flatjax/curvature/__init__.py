"""Curvature of any network: products, estimates and spectra."""

from flatjax.curvature.counts import num_samples as num_samples
from flatjax.curvature.density import SpectralDensity as SpectralDensity
from flatjax.curvature.density import spectral_density as spectral_density
from flatjax.curvature.estimate import Estimate as Estimate
from flatjax.curvature.lanczos import extreme_eigenpairs as extreme_eigenpairs
from flatjax.curvature.products import GaussNewton as GaussNewton
from flatjax.curvature.products import Hessian as Hessian
from flatjax.curvature.products import product as product
from flatjax.curvature.streams import Streamed as Streamed
from flatjax.curvature.traces import diagonal as diagonal
from flatjax.curvature.traces import trace as trace
