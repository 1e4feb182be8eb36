"""Optimizers for value tables, and one for a whole model with memories."""

from memlayers.optim.memory_adamw import MemoryAdamW
from memlayers.optim.row_adagrad import RowAdagrad
from memlayers.optim.row_adam import RowAdam
from memlayers.optim.row_sgd import RowSGD

__all__ = ["MemoryAdamW", "RowAdagrad", "RowAdam", "RowSGD"]
