"""Neural collapse, from the moments of the classes of any stream of features."""

from flatjax.collapse.decisions import Decisions as Decisions
from flatjax.collapse.decisions import nc4 as nc4
from flatjax.collapse.duality import nc3 as nc3
from flatjax.collapse.duality import unc3 as unc3
from flatjax.collapse.geometry import cosine_std as cosine_std
from flatjax.collapse.geometry import equiangularity as equiangularity
from flatjax.collapse.geometry import equinorm as equinorm
from flatjax.collapse.geometry import etf_error as etf_error
from flatjax.collapse.geometry import etf_floor as etf_floor
from flatjax.collapse.moments import ClassMoments as ClassMoments
from flatjax.collapse.report import CollapseReport as CollapseReport
from flatjax.collapse.report import collapse_report as collapse_report
from flatjax.collapse.uniformity import Uniformity as Uniformity
from flatjax.collapse.uniformity import gnc2 as gnc2
from flatjax.collapse.variability import cdnv as cdnv
from flatjax.collapse.variability import nc1 as nc1
from flatjax.collapse.variability import ncc as ncc
