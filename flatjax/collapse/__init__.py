"""Neural collapse, from the moments of the classes of any stream of features.

Keyword-only arguments are static, as for all metrics: in a `jax.jit` of your own, too, they are no traced values.
"""

from flatjax.collapse.layers import LayerMoments as LayerMoments
from flatjax.collapse.layers import init_layers as init_layers
from flatjax.collapse.layers import layer_reports as layer_reports
from flatjax.collapse.layers import update_layers as update_layers
from flatjax.collapse.mixing import MixupGeometry as MixupGeometry
from flatjax.collapse.mixing import mixup as mixup
from flatjax.collapse.mixing import mixup_geometry as mixup_geometry
from flatjax.collapse.moments import ClassMoments as ClassMoments
from flatjax.collapse.nc1_variability import cdnv as cdnv
from flatjax.collapse.nc1_variability import nc1 as nc1
from flatjax.collapse.nc1_variability import ncc as ncc
from flatjax.collapse.nc2_geometry import cosine_std as cosine_std
from flatjax.collapse.nc2_geometry import equiangularity as equiangularity
from flatjax.collapse.nc2_geometry import equinorm as equinorm
from flatjax.collapse.nc2_geometry import etf_error as etf_error
from flatjax.collapse.nc2_geometry import etf_floor as etf_floor
from flatjax.collapse.nc2_uniformity import Uniformity as Uniformity
from flatjax.collapse.nc2_uniformity import gnc2 as gnc2
from flatjax.collapse.nc3_duality import nc3 as nc3
from flatjax.collapse.nc3_duality import unc3 as unc3
from flatjax.collapse.nc4_nearest_mean import Decisions as Decisions
from flatjax.collapse.nc4_nearest_mean import nc4 as nc4
from flatjax.collapse.neural_collapse import NeuralCollapse as NeuralCollapse
from flatjax.collapse.neural_collapse import neural_collapse as neural_collapse
from flatjax.collapse.report import CollapseReport as CollapseReport
from flatjax.collapse.report import collapse_report as collapse_report
from flatjax.collapse.squared_error import SquaredErrorDecomposition as SquaredErrorDecomposition
from flatjax.collapse.squared_error import central_path as central_path
from flatjax.collapse.squared_error import least_squares_head as least_squares_head
from flatjax.collapse.squared_error import squared_error_decomposition as squared_error_decomposition
