"""search: from queries to the K best slots of a product of two codebooks: key products, then `select`.

One operation, so that half scores [2, H, T, N] are never saved (and, by the kernels of a CPU, held for a block of
tokens at a time), and so that backward can go from the K slots straight to the gradients of query and keys: only K of
the N * N sums have one.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, K neighbours.
"""

import math

import torch
from torch import Tensor

from memlayers.ops.precision import wide_dtype, widened, without_autocast
from memlayers.ops.registry import operation
from memlayers.ops.select import halves, select_pairs

# Half scores, or gradients of them, that kernels hold at once, and the rows of a block at the least: on a CPU 8 MB,
# which stay in cache between product and selection; on a GPU 128 MB, where fewer rows would leave it waiting.
CPU_BLOCK, GPU_BLOCK = (2**21, 1), (2**25, 4096)


def token_blocks(num_tokens: int, weight_2HNC: Tensor, half_scores: int, fewest_rows: int) -> list[slice]:
    """The tokens, cut into blocks of so many half scores."""
    _, heads, num_subkeys, _ = weight_2HNC.shape
    tokens = max(half_scores // (2 * heads * num_subkeys), -(-fewest_rows // heads))
    return [slice(start, min(start + tokens, num_tokens)) for start in range(0, num_tokens, tokens)]


def half_scores(query_THQ: Tensor, weight_2HNC: Tensor) -> Tensor:
    """[2, H, T, N], the scores of both halves against their codebooks."""
    # Not unflatten, which PyTorch cannot batch: second derivatives of a batch of outputs.
    query_2HTC = query_THQ.reshape(*query_THQ.shape[:-1], 2, query_THQ.shape[-1] // 2).permute(2, 1, 0, 3)
    with without_autocast(query_THQ):
        return query_2HTC @ weight_2HNC.transpose(-1, -2)


def search_reference(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(scores [T, H, K] descending, differentiable, at least float32; slots [T, H, K] int64)."""
    first_HTN, second_HTN = half_scores(for_scores(query_THQ), for_scores(weight_2HNC))
    scores_HTK, slots_HTK = select_pairs(first_HTN, second_HTN, topk)
    return scores_HTK.transpose(0, 1).contiguous(), slots_HTK.transpose(0, 1).contiguous()


def search_backward_reference(
    grad_THK: Tensor,
    slots_THK: Tensor,
    query_THQ: Tensor,
    weight_2HNC: Tensor,
    of_query: bool = True,
    of_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and keys, in their dtypes; one that is not wanted is empty.

    They are scattered to half scores; then they are the gradients of two dense products.
    """
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
    grad_query_THQ = grad_query_THQ.to(query_THQ.dtype).contiguous()
    return _wanted(grad_query_THQ, grad_weight_2HNC.contiguous(), of_query, of_weight)


def _wanted(grad_query_THQ: Tensor, grad_weight_2HNC: Tensor, of_query: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    query = grad_query_THQ if of_query else grad_query_THQ.new_empty(0)
    return query, grad_weight_2HNC if of_weight else grad_weight_2HNC.new_empty(0)


def for_scores(values: Tensor) -> Tensor:
    """On a CPU in at least float32: it rounds products of 16 bits to 16 bits, and then scores are equal that are not.

    Where it has no instructions for them, they would take a hundred times as long as well.
    """
    return widened(values) if values.device.type == "cpu" else values


def _empty_hits(query_THQ, weight_2HNC, topk):
    shape = (*query_THQ.shape[:2], topk)
    dtype = wide_dtype(query_THQ.dtype)
    return query_THQ.new_empty(shape, dtype=dtype), query_THQ.new_empty(shape, dtype=torch.int64)


def _empty_gradients(grad_THK, slots_THK, query_THQ, weight_2HNC, of_query=True, of_weight=True):
    contiguous = torch.contiguous_format
    query, weight = (torch.empty_like(like, memory_format=contiguous) for like in (query_THQ, weight_2HNC))
    return _wanted(query, weight, of_query, of_weight)


def _save(ctx, inputs, output):
    query_THQ, weight_2HNC, _ = inputs
    ctx.save_for_backward(query_THQ, weight_2HNC, output[1])


def _flops(query_THQ, weight_2HNC, topk, **_):
    return 2 * math.prod(query_THQ) * weight_2HNC[2]


def _flops_backward(grad_THK, slots_THK, query_THQ, weight_2HNC, of_query=True, of_weight=True, **_):
    return (of_query + of_weight) * _flops(query_THQ, weight_2HNC, grad_THK[-1])


def _backward(ctx, grad_THK, _):
    query_THQ, weight_2HNC, slots_THK = ctx.saved_tensors
    of_query, of_weight = ctx.needs_input_grad[:2]
    query, weight = search_backward(grad_THK, slots_THK, query_THQ, weight_2HNC, of_query, of_weight)
    return query if of_query else None, weight if of_weight else None, None


def _second_backward(ctx, second_query, second_weight):
    # The gradients of <gradient of query, second_query> + <gradient of keys, second_weight>, by operations that have
    # gradients themselves.
    grad_THK, slots_THK, query_THQ, weight_2HNC = ctx.saved_tensors
    of_query, of_weight = ctx.wanted
    needs_grad, _, needs_query, needs_weight, *_ = ctx.needs_input_grad
    grad = query = weight = None
    if needs_grad:
        pairs = [(second_query, weight_2HNC)] * of_query + [(query_THQ, second_weight)] * of_weight
        first, *others = (_scores_at(slots_THK, *pair) for pair in pairs)
        grad = sum(others, first).to(grad_THK.dtype)
    if needs_query and of_weight:
        query, _ = search_backward(grad_THK, slots_THK, query_THQ, second_weight.contiguous(), True, False)
    if needs_weight and of_query:
        _, weight = search_backward(grad_THK, slots_THK, second_query.contiguous(), weight_2HNC, False, True)
    return grad, None, query, weight, None, None


def _scores_at(slots_THK: Tensor, query_THQ: Tensor, weight_2HNC: Tensor) -> Tensor:
    """[T, H, K], the scores of these slots."""
    scores_2HTN = half_scores(for_scores(query_THQ), for_scores(weight_2HNC))
    subkeys = halves(slots_THK.transpose(0, 1), weight_2HNC.shape[2])
    first_HTK, second_HTK = (scores.gather(-1, found) for scores, found in zip(scores_2HTN, subkeys, strict=True))
    return (first_HTK + second_HTK).transpose(0, 1)


def _save_for_second(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.wanted = inputs[4:]


search = operation("search", search_reference, _empty_hits, backward=_backward, save=_save, flops=_flops)
search_backward = operation(
    "search_backward",
    search_backward_reference,
    _empty_gradients,
    backward=_second_backward,
    save=_save_for_second,
    flops=_flops_backward,
)
