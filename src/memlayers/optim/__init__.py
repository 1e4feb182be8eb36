"""Optimizers for value tables, and one for a whole model with memories."""

from memlayers.optim.memory_adamw import MemoryAdamW
from memlayers.optim.row_adam import RowAdam

__all__ = ["MemoryAdamW", "RowAdam"]
