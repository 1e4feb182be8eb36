"""search: from queries to the K best slots of a product of two codebooks: key products, then `select`.

One operation, so that half scores [2, H, T, N] are never saved (and, by the kernels of a CPU, held for a block of
tokens at a time), and so that backward can go from the K slots straight to the gradients of query and keys: only K of
the N * N sums have one.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, K neighbours.
"""

from types import ModuleType

import torch
from torch import Tensor

from memlayers.ops import cpu, gpu
from memlayers.ops.precision import wide_dtype, without_autocast
from memlayers.ops.select import halves, select_pairs
from memlayers.torch_private import multiplies_fast


@torch.library.custom_op("memlayers::search", mutates_args=())
def search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(scores [T, H, K] descending, differentiable, at least float32; slots [T, H, K] int64)."""
    return search_reference(query_THQ, weight_2HNC, topk)


@torch.library.custom_op("memlayers::search_backward", mutates_args=())
def search_backward(
    grad_THK: Tensor,
    slots_THK: Tensor,
    query_THQ: Tensor,
    weight_2HNC: Tensor,
    of_query: bool = True,
    of_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and keys, in their dtypes; one that is not wanted is empty."""
    grads = search_backward_reference(grad_THK, slots_THK, query_THQ, weight_2HNC)
    return _wanted(*grads, of_query, of_weight)


def _wanted(grad_query_THQ: Tensor, grad_weight_2HNC: Tensor, of_query: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    query = grad_query_THQ if of_query else grad_query_THQ.new_empty(0)
    return query, grad_weight_2HNC if of_weight else grad_weight_2HNC.new_empty(0)


def half_scores(query_THQ: Tensor, weight_2HNC: Tensor) -> Tensor:
    """[2, H, T, N], the scores of both halves against their codebooks."""
    query_2HTC = query_THQ.unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
    with without_autocast(query_THQ):
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
    zeros_THN = grad_THK.new_zeros(num_tokens, heads, num_subkeys)
    grads_THN = [zeros_THN.scatter_add(-1, subkey_THK, grad_THK) for subkey_THK in halves(slots_THK, num_subkeys)]
    grad_2HTN = torch.stack(grads_THN).transpose(1, 2).to(weight_2HNC.dtype)
    query_2HTC = query_THQ.unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
    with without_autocast(query_THQ):
        grad_query_2HTC = grad_2HTN @ weight_2HNC
        grad_weight_2HNC = grad_2HTN.transpose(-1, -2) @ query_2HTC
    grad_query_THQ = grad_query_2HTC.permute(2, 1, 0, 3).reshape(query_THQ.shape)
    return grad_query_THQ.to(query_THQ.dtype).contiguous(), grad_weight_2HNC.contiguous()


@search.register_kernel("cpu")
def _(query_THQ, weight_2HNC, topk):
    query_THQ, weight_2HNC = _in_fast_dtype(query_THQ), _in_fast_dtype(weight_2HNC)
    kernels = _kernels(query_THQ, weight_2HNC)
    if kernels is None:
        return search_reference(query_THQ, weight_2HNC, topk)
    return kernels.search(query_THQ, weight_2HNC, topk)


@search_backward.register_kernel("cpu")
def _(grad_THK, slots_THK, query_THQ, weight_2HNC, of_query=True, of_weight=True):
    query, weight = query_THQ.float(), weight_2HNC.float()  # no dense product, so nothing is gained by 16 bits
    kernels = None if query_THQ.dtype == torch.float64 else _kernels(query, weight)
    if kernels is None:
        grads = search_backward_reference(grad_THK, slots_THK, query_THQ, weight_2HNC)
        return _wanted(*grads, of_query, of_weight)
    grads = kernels.search_backward(
        grad_THK.float().contiguous(),
        slots_THK.contiguous(),
        query.contiguous(),
        weight.contiguous(),
        of_query,
        of_weight,
    )
    return grads[0].to(query_THQ.dtype), grads[1].to(weight_2HNC.dtype)


@search.register_kernel("cuda")
def search_on_gpu(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """By the kernels where they know the dtypes and K."""
    kernels = gpu.kernels("search")
    if kernels is None or not kernels.takes(query_THQ, weight_2HNC, topk):
        return search_reference(query_THQ, weight_2HNC, topk)
    return kernels.search(query_THQ, weight_2HNC, topk)


@search_backward.register_kernel("cuda")
def search_backward_on_gpu(
    grad_THK: Tensor,
    slots_THK: Tensor,
    query_THQ: Tensor,
    weight_2HNC: Tensor,
    of_query: bool = True,
    of_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """By the kernels where they know the dtypes and K."""
    kernels = gpu.kernels("search")
    if kernels is None or not kernels.takes(query_THQ, weight_2HNC, grad_THK.shape[-1]):
        grads = search_backward_reference(grad_THK, slots_THK, query_THQ, weight_2HNC)
        return _wanted(*grads, of_query, of_weight)
    return kernels.search_backward(grad_THK, slots_THK, query_THQ, weight_2HNC, of_query, of_weight)


def _in_fast_dtype(values: Tensor) -> Tensor:
    """16-bit products are a hundred times slower than float32 where the processor has none."""
    is_slow = values.dtype in (torch.bfloat16, torch.float16) and not multiplies_fast(values.dtype)
    return values.float() if is_slow else values


def _kernels(query_THQ: Tensor, weight_2HNC: Tensor) -> ModuleType | None:
    return cpu.kernels("search") if query_THQ.dtype == weight_2HNC.dtype == torch.float32 else None


@search.register_fake
def _(query_THQ, weight_2HNC, topk):
    shape = (*query_THQ.shape[:2], topk)
    dtype = wide_dtype(query_THQ.dtype)
    return query_THQ.new_empty(shape, dtype=dtype), query_THQ.new_empty(shape, dtype=torch.int64)


@search_backward.register_fake
def _(grad_THK, slots_THK, query_THQ, weight_2HNC, of_query=True, of_weight=True):
    contiguous = torch.contiguous_format
    query, weight = (torch.empty_like(like, memory_format=contiguous) for like in (query_THQ, weight_2HNC))
    return _wanted(query, weight, of_query, of_weight)


def _save(ctx, inputs, output):
    query_THQ, weight_2HNC, _ = inputs
    ctx.save_for_backward(query_THQ, weight_2HNC, output[1])


def _backward(ctx, grad_THK, _):
    query_THQ, weight_2HNC, slots_THK = ctx.saved_tensors
    of_query, of_weight = ctx.needs_input_grad[:2]
    query, weight = search_backward(grad_THK, slots_THK, query_THQ, weight_2HNC, of_query, of_weight)
    return query if of_query else None, weight if of_weight else None, None


def _second_backward(ctx, second_query, second_weight):
    grad_THK, slots_THK, query_THQ, weight_2HNC = ctx.saved_tensors
    of_query, of_weight = ctx.wanted
    with torch.enable_grad():
        inputs = [given.detach().requires_grad_() for given in (grad_THK, query_THQ, weight_2HNC)]
        query, weight = search_backward_reference(inputs[0], slots_THK, *inputs[1:])
        total = sum(
            (grad * second).sum()
            for grad, second, is_wanted in ((query, second_query, of_query), (weight, second_weight, of_weight))
            if is_wanted
        )
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return grads[0], None, grads[1], grads[2], None, None


def _save_for_second(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.wanted = inputs[4:]


search.register_autograd(_backward, setup_context=_save)
search_backward.register_autograd(_second_backward, setup_context=_save_for_second)
