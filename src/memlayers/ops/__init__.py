"""The operations of a memory: search, select, read and its gradients, record, row sum and step, infer."""

from memlayers.ops.precision import wide_dtype, widened, without_autocast

__all__ = ["wide_dtype", "widened", "without_autocast"]
