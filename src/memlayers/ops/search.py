"""search: from queries to the K best slots of a product of two codebooks: key products, then `select`.

One operation, so that half scores [2, H, T, N] are held for a block of tokens at a time and never saved, and so that
backward can go from the K slots straight to the gradients of query and keys: only K of the N * N sums have one.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, K neighbours.
"""

from types import ModuleType

import torch
from torch import Tensor

from memlayers.ops import cpu
from memlayers.ops.select import halves, select_pairs


@torch.library.custom_op("memlayers::search", mutates_args=())
def search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(scores [T, H, K] descending, differentiable, at least float32; slots [T, H, K] int64)."""
    return search_reference(query_THQ, weight_2HNC, topk)


@torch.library.custom_op("memlayers::search_backward", mutates_args=())
def search_backward(
    grad_THK: Tensor, slots_THK: Tensor, query_THQ: Tensor, weight_2HNC: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and keys, in their dtypes."""
    return search_backward_reference(grad_THK, slots_THK, query_THQ, weight_2HNC)


def half_scores(query_THQ: Tensor, weight_2HNC: Tensor) -> Tensor:
    """[2, H, T, N], the scores of both halves against their codebooks."""
    query_2HTC = query_THQ.unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
    return query_2HTC @ weight_2HNC.transpose(-1, -2)


def search_reference(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The same in operations of PyTorch and `select`."""
    first_HTN, second_HTN = half_scores(query_THQ, weight_2HNC)
    scores_HTK, slots_HTK = select_pairs(first_HTN, second_HTN, topk)
    return scores_HTK.transpose(0, 1).contiguous(), slots_HTK.transpose(0, 1).contiguous()


def search_backward_reference(
    grad_THK: Tensor, slots_THK: Tensor, query_THQ: Tensor, weight_2HNC: Tensor
) -> tuple[Tensor, Tensor]:
    """Scattered to half scores, then the gradients of two dense products."""
    num_tokens, heads, _ = grad_THK.shape
    num_subkeys = weight_2HNC.shape[2]
    grad_2THN = grad_THK.new_zeros(2, num_tokens, heads, num_subkeys)
    for grad_THN, subkey_THK in zip(grad_2THN, halves(slots_THK, num_subkeys), strict=True):
        grad_THN.scatter_add_(-1, subkey_THK, grad_THK)
    grad_2HTN = grad_2THN.transpose(1, 2).to(weight_2HNC.dtype)
    query_2HTC = query_THQ.unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
    grad_query_2HTC = grad_2HTN @ weight_2HNC
    grad_weight_2HNC = grad_2HTN.transpose(-1, -2) @ query_2HTC
    grad_query_THQ = grad_query_2HTC.permute(2, 1, 0, 3).reshape(query_THQ.shape)
    return grad_query_THQ.to(query_THQ.dtype), grad_weight_2HNC.contiguous()


@search.register_kernel("cpu")
def _(query_THQ, weight_2HNC, topk):
    query_THQ, weight_2HNC = _in_fast_dtype(query_THQ), _in_fast_dtype(weight_2HNC)
    kernels = _kernels(query_THQ, weight_2HNC)
    if kernels is None:
        return search_reference(query_THQ, weight_2HNC, topk)
    return kernels.search(query_THQ, weight_2HNC, topk)


@search_backward.register_kernel("cpu")
def _(grad_THK, slots_THK, query_THQ, weight_2HNC):
    query, weight = query_THQ.float(), weight_2HNC.float()  # no dense product, so nothing is gained by 16 bits
    kernels = None if query_THQ.dtype == torch.float64 else _kernels(query, weight)
    if kernels is None:
        return search_backward_reference(grad_THK, slots_THK, query_THQ, weight_2HNC)
    grads = kernels.search_backward(grad_THK.contiguous(), slots_THK, query.contiguous(), weight.contiguous())
    return grads[0].to(query_THQ.dtype), grads[1].to(weight_2HNC.dtype)


def _in_fast_dtype(values: Tensor) -> Tensor:
    """16-bit products are a hundred times slower than float32 where the processor has none."""
    if values.dtype == torch.bfloat16:
        is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        is_fast = values.dtype != torch.float16 or torch.cpu._is_amx_fp16_supported()
    return values if is_fast else values.float()


def _kernels(query_THQ: Tensor, weight_2HNC: Tensor) -> ModuleType | None:
    return cpu.kernels("search") if query_THQ.dtype == weight_2HNC.dtype == torch.float32 else None


@search.register_fake
def _(query_THQ, weight_2HNC, topk):
    shape = (*query_THQ.shape[:2], topk)
    dtype = torch.float64 if query_THQ.dtype == torch.float64 else torch.float32
    return query_THQ.new_empty(shape, dtype=dtype), query_THQ.new_empty(shape, dtype=torch.int64)


@search_backward.register_fake
def _(grad_THK, slots_THK, query_THQ, weight_2HNC):
    return (
        torch.empty_like(query_THQ, memory_format=torch.contiguous_format),
        torch.empty_like(weight_2HNC, memory_format=torch.contiguous_format),
    )


def _save(ctx, inputs, output):
    query_THQ, weight_2HNC, _ = inputs
    ctx.save_for_backward(query_THQ, weight_2HNC, output[1])


def _backward(ctx, grad_THK, _):
    query_THQ, weight_2HNC, slots_THK = ctx.saved_tensors
    return *search_backward(grad_THK, slots_THK, query_THQ, weight_2HNC), None


search.register_autograd(_backward, setup_context=_save)
