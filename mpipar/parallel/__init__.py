"""How the work of one model is divided over ranks.

data       replicas of the model, each computing some of a step's microbatches
buckets    the flat memory in which gradients are accumulated and reduced
"""

from mpipar.parallel.data import DataParallel

__all__ = ["DataParallel"]
