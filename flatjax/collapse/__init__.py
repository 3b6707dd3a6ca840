"""Neural collapse, from the moments of the classes of any stream of features."""

from flatjax.collapse.moments import ClassMoments as ClassMoments
