"""read: the weighted sum of table rows, its gradients, and dot, its dual.

All three are the parts of one form, sum over (t, k) of weight[t, k] * <row of slot[t, k], output[t]>:
    read      given rows and weights:  y[t]       = sum_k weight[t, k] * table[slot[t, k]]
    dot       given rows and outputs:  d[t, k]    = <table[slot[t, k]], output[t]>
    sum_rows  given weights and outputs: g[s]     = sum over (t, k) with slot[t, k] = s of weight[t, k] * output[t]
so the gradients of each are the two others.

Sums are accumulated in float32 (float64 for float64), and so is what is returned. The gathered rows [T, K, V] are
never materialised as a whole. Letters: T tokens, K rows a token, S slots, V width, M = T * K.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops.precision import wide_dtype, without_autocast
from memlayers.ops.registry import operation
from memlayers.ops.row_gradient import record_, renew_handle
from memlayers.ops.row_sum import dense_sum, parts_of
from memlayers.torch_private import dot_in_bags

# Elements of gathered rows held at once where rows must be gathered at all: 16 MB in float32.
_CHUNK_ELEMENTS = 2**22


def read_reference(table_SV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """y [T, V]."""
    dtype = wide_dtype(table_SV.dtype)
    if slots_TK.numel() == 0:
        return table_SV.new_zeros(slots_TK.shape[0], table_SV.shape[1], dtype=dtype)
    if table_SV.dtype == dtype:
        return F.embedding_bag(slots_TK, table_SV, per_sample_weights=weights_TK.to(dtype), mode="sum")
    y_TV = table_SV.new_empty(slots_TK.shape[0], table_SV.shape[1], dtype=dtype)
    for tokens in _chunks(slots_TK, table_SV):
        rows_CKV = F.embedding(slots_TK[tokens], table_SV).to(dtype)
        torch.sum(rows_CKV * weights_TK[tokens, :, None].to(dtype), dim=1, out=y_TV[tokens])
    return y_TV


def dot_reference(table_SV: Tensor, slots_TK: Tensor, outputs_TV: Tensor) -> Tensor:
    """d [T, K]."""
    dtype = wide_dtype(table_SV.dtype)
    outputs_TV = outputs_TV.to(dtype).contiguous()
    num_tokens, topk = slots_TK.shape
    if slots_TK.numel() == 0:
        return outputs_TV.new_empty(num_tokens, topk)
    kernel = dot_in_bags()
    if kernel is not None and table_SV.dtype == dtype and table_SV.is_contiguous():
        bag_T = torch.arange(num_tokens, device=slots_TK.device)
        slots_M = slots_TK.flatten().contiguous()
        return kernel(outputs_TV, table_SV, slots_M, bag_T * topk, bag_T.repeat_interleave(topk), 0).view(
            num_tokens, topk
        )
    d_TK = outputs_TV.new_empty(num_tokens, topk)
    with without_autocast(table_SV):
        for tokens in _chunks(slots_TK, table_SV):
            rows_CKV = F.embedding(slots_TK[tokens], table_SV).to(dtype)
            d_TK[tokens] = (rows_CKV @ outputs_TV[tokens, :, None]).squeeze(-1)
    return d_TK


def sum_rows_reference(slots_TK: Tensor, weights_TK: Tensor, outputs_TV: Tensor, num_slots: int) -> Tensor:
    """g [S, V], zero where no entry names the slot."""
    return dense_sum(parts_of([slots_TK], [weights_TK], [outputs_TV]), num_slots).grad_PV


def _chunks(slots_TK: Tensor, table_SV: Tensor) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, slots_TK.shape[1] * table_SV.shape[1]))
    return [slice(start, start + size) for start in range(0, slots_TK.shape[0], size)]


def _empty_outputs(table_SV, slots_TK, weights_TK, *_):
    return table_SV.new_empty(slots_TK.shape[0], table_SV.shape[1], dtype=wide_dtype(table_SV.dtype))


def _empty_weights(table_SV, slots_TK, outputs_TV, *_):
    return table_SV.new_empty(slots_TK.shape, dtype=wide_dtype(table_SV.dtype))


def _empty_rows(slots_TK, weights_TK, outputs_TV, num_slots):
    return outputs_TV.new_empty(num_slots, outputs_TV.shape[1], dtype=wide_dtype(outputs_TV.dtype))


def _flops(table_SV, slots_TK, *_, **__):
    return 2 * math.prod(slots_TK) * table_SV[1]


def _flops_sum(slots_TK, weights_TK, outputs_TV, *_, **__):
    return 2 * math.prod(slots_TK) * outputs_TV[1]


def _save_read(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.has_mark = len(inputs) > 3 and inputs[3] is not None
    # Not saved as a tensor: another layer's backward may have written to it since, and that is not an error.
    ctx.log = inputs[4] if len(inputs) > 4 else None


def _read_backward(ctx, grad_TV):
    table_SV, slots_TK, weights_TK = ctx.saved_tensors
    grad_SV = grad_TK = None
    if ctx.needs_input_grad[0]:
        grad_SV = sum_rows(slots_TK, weights_TK, grad_TV, table_SV.shape[0]).to(table_SV.dtype)
    if ctx.needs_input_grad[2]:
        grad_TK = dot(table_SV, slots_TK, grad_TV).to(weights_TK.dtype)
    return grad_SV, None, grad_TK, table_SV.new_zeros(1) if ctx.has_mark else None


def _pack(table_SV, slots_TK, given, mark_1=None, log=None):
    if log is not None:
        renew_handle(log)
    return table_SV, slots_TK, given


def _read_row_mode_backward(ctx, grad_TV):
    table_SV, slots_TK, weights_TK = ctx.saved_tensors
    grad_TK = dot(table_SV, slots_TK, grad_TV).to(weights_TK.dtype) if ctx.needs_input_grad[2] else None
    record_(ctx.log, slots_TK, weights_TK, grad_TV)
    return None, None, grad_TK, table_SV.new_zeros(1), None


def _dot_backward(ctx, grad_TK):
    table_SV, slots_TK, outputs_TV = ctx.saved_tensors
    grad_SV = grad_TV = None
    if ctx.needs_input_grad[0]:
        grad_SV = sum_rows(slots_TK, grad_TK, outputs_TV, table_SV.shape[0]).to(table_SV.dtype)
    if ctx.needs_input_grad[2]:
        grad_TV = read(table_SV, slots_TK, grad_TK).to(outputs_TV.dtype)
    return grad_SV, None, grad_TV, table_SV.new_zeros(1) if ctx.has_mark else None


def _dot_row_mode_backward(ctx, grad_TK):
    table_SV, slots_TK, outputs_TV = ctx.saved_tensors
    grad_TV = read(table_SV, slots_TK, grad_TK).to(outputs_TV.dtype) if ctx.needs_input_grad[2] else None
    record_(ctx.log, slots_TK, grad_TK, outputs_TV)  # as of a read with these weights, whose gradient is the output
    return None, None, grad_TV, table_SV.new_zeros(1), None


def _save_sum(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _sum_backward(ctx, grad_SV):
    slots_TK, weights_TK, outputs_TV = ctx.saved_tensors
    grad_TK = grad_TV = None
    if ctx.needs_input_grad[1]:
        grad_TK = dot(grad_SV, slots_TK, outputs_TV).to(weights_TK.dtype)
    if ctx.needs_input_grad[2]:
        grad_TV = read(grad_SV, slots_TK, weights_TK).to(outputs_TV.dtype)
    return None, grad_TK, grad_TV, None


# Backward gives the table an ordinary dense gradient; that of `mark_1`, its companion parameter, is zero.
read = operation(
    "read",
    read_reference,
    _empty_outputs,
    backward=_read_backward,
    save=_save_read,
    pack=_pack,
    flops=_flops,
)
# Backward records a row gradient in `log`, the handle of the table's `RowGradient` (`memlayers.ops.row_gradient`), and
# leaves the table's gradient None; a hook puts what was recorded into the gradient of `mark_1`.
read_row_mode = operation(
    "read_row_mode",
    read_reference,
    _empty_outputs,
    backward=_read_row_mode_backward,
    save=_save_read,
    pack=_pack,
    flops=_flops,
)
dot = operation(
    "dot",
    dot_reference,
    _empty_weights,
    backward=_dot_backward,
    save=_save_read,
    pack=_pack,
    flops=_flops,
)
# To `dot` as `read_row_mode` is to `read`.
dot_row_mode = operation(
    "dot_row_mode",
    dot_reference,
    _empty_weights,
    backward=_dot_row_mode_backward,
    save=_save_read,
    pack=_pack,
    flops=_flops,
)
sum_rows = operation(
    "sum_rows", sum_rows_reference, _empty_rows, backward=_sum_backward, save=_save_sum, flops=_flops_sum
)
