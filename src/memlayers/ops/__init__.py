"""The operations of a memory, in the order in which a token, and then its gradient, meets them.

- registry: every operation, its schema, and what computes it where
- search, select: from queries to the best slots
- read: from slots and weights to the output, and back
- row_gradient: what backward leaves for a row optimizer, and how long it lives
- row_gradient_tensor: the same as a tensor at `.grad`, which follows what a loop does to it
- row_sum, row_step: its rows summed by slot; the optimizer's step on those rows
- infer: a whole layer in one operation, where no gradient is wanted
- exported: all of these by PyTorch's own operators, for derivatives of any kind and `torch.export`
- precision, rounding: dtypes, stochastic rounding
- cpu/, gpu/: kernels, in Numba and in Triton
"""

from memlayers.ops.precision import wide_dtype, widened, without_autocast

__all__ = ["wide_dtype", "widened", "without_autocast"]
