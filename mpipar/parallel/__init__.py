"""How the work of one model is divided over ranks.

data       replicas of the model, each computing some of a step's microbatches
buckets    the flat memory in which gradients are accumulated and reduced
exact      gradients summed without rounding
"""

from mpipar.parallel.data import DataParallel
from mpipar.parallel.exact import Grids

__all__ = ["DataParallel", "Grids"]
