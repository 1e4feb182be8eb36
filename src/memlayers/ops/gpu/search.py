"""search on a GPU: key products by PyTorch and the selection's kernel, a block of tokens at a time.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, K neighbours, t tokens
of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlayers.ops.gpu import select as selection
from memlayers.ops.gpu.launch import launch
from memlayers.ops.precision import without_autocast
from memlayers.ops.search import GPU_BLOCK, token_blocks


def search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The operation."""
    if not _takes(query_THQ, weight_2HNC, topk):
        return NotImplemented
    shape = (*query_THQ.shape[:2], topk)
    scores_THK = query_THQ.new_empty(shape, dtype=torch.float32)
    slots_THK = query_THQ.new_empty(shape, dtype=torch.int64)
    for tokens in token_blocks(len(query_THQ), weight_2HNC, *GPU_BLOCK):
        query_2HtC = query_THQ[tokens].unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
        with without_autocast(query_THQ):
            halves_HtN = [
                _product(query_HtC, keys_HNC.transpose(1, 2))
                for query_HtC, keys_HNC in zip(query_2HtC, weight_2HNC, strict=True)
            ]
        first_tHN, second_tHN = (half_HtN.transpose(0, 1) for half_HtN in halves_HtN)
        selection.select_into(first_tHN, second_tHN, scores_THK[tokens], slots_THK[tokens])
    return scores_THK, slots_THK


def search_backward(
    grad_THK: Tensor,
    slots_THK: Tensor,
    query_THQ: Tensor,
    weight_2HNC: Tensor,
    of_query: bool = True,
    of_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """The operation."""
    if not _takes(query_THQ, weight_2HNC, grad_THK.shape[-1]):
        return NotImplemented
    contiguous = torch.contiguous_format
    grad_query_THQ = torch.empty_like(query_THQ, memory_format=contiguous) if of_query else query_THQ.new_empty(0)
    grad_keys_2HNC = weight_2HNC.new_zeros(weight_2HNC.shape, dtype=torch.float32) if of_weight else None
    grad_THK, slots_THK = grad_THK.float().contiguous(), slots_THK.contiguous()
    for tokens in token_blocks(len(query_THQ), weight_2HNC, *GPU_BLOCK):
        grads_2HtN = _dense(grad_THK[tokens], slots_THK[tokens], weight_2HNC)
        for half, grad_HtN in enumerate(grads_2HtN):
            with without_autocast(query_THQ):
                if of_query:
                    grad_tHC = (grad_HtN @ weight_2HNC[half]).transpose(0, 1)
                    grad_query_THQ[tokens].unflatten(-1, (2, -1))[:, :, half].copy_(grad_tHC)
                if grad_keys_2HNC is not None:
                    query_HtC = query_THQ[tokens].unflatten(-1, (2, -1))[:, :, half].transpose(0, 1)
                    grad_keys_2HNC[half] += _product(grad_HtN.transpose(1, 2), query_HtC)
    grad_keys = weight_2HNC.new_empty(0) if grad_keys_2HNC is None else grad_keys_2HNC.to(weight_2HNC.dtype)
    return grad_query_THQ, grad_keys


def _takes(query: Tensor, weight: Tensor, topk: int) -> bool:
    return query.dtype == weight.dtype and selection.takes(weight.shape[2], topk, weight.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32 where that costs nothing: half scores rounded to 16 bits tie in masses, which low slots would win."""
    if a.is_cuda and torch.version.hip is None and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


def _dense(grad_tHK: Tensor, slots_tHK: Tensor, weight_2HNC: Tensor) -> Tensor:
    """The gradients of half scores, [2, H, t, N] in the dtype of the keys."""
    num_tokens, heads, topk = slots_tHK.shape
    num_subkeys = weight_2HNC.shape[2]
    grads_2HtN = weight_2HNC.new_zeros(2, heads, num_tokens, num_subkeys)
    launch(
        _scatter,
        (num_tokens * heads,),
        grad_tHK,
        slots_tHK,
        grads_2HtN,
        num_tokens,
        heads,
        num_subkeys,
        topk,
        K2=triton.next_power_of_2(topk),
        num_warps=1 if topk <= 32 else 4,
    )
    return grads_2HtN


@triton.jit
def _store_totals(grad_K, subkey_K, exists_K, row_N):
    """Where a sub-key was found several times, all of them store the same total."""
    is_same_KK = (subkey_K[:, None] == subkey_K[None, :]) & exists_K[:, None]
    total_K = tl.sum(tl.where(is_same_KK, grad_K[:, None], 0.0), axis=0)  # along the registers of a thread
    tl.store(row_N + subkey_K, total_K.to(row_N.dtype.element_ty), mask=exists_K)


@triton.jit(do_not_specialize=["num_tokens", "heads", "num_subkeys", "topk"])
def _scatter(grads, slots, out, num_tokens, heads, num_subkeys, topk, K2: tl.constexpr):
    row = tl.program_id(0)
    token, head = row // heads, row % heads
    rank_K = tl.arange(0, K2)
    at_K = row.to(tl.int64) * topk + rank_K
    grad_K = tl.load(grads + at_K, mask=rank_K < topk, other=0.0)
    slot_K = tl.load(slots + at_K, mask=rank_K < topk, other=-1)
    exists_K = (slot_K >= 0) & (slot_K < num_subkeys.to(tl.int64) * num_subkeys)
    slot_K = tl.where(exists_K, slot_K, 0).to(tl.uint32)  # a division of 64 bits is many times as slow
    first_K = (slot_K // num_subkeys.to(tl.uint32)).to(tl.int32)
    second_K = (slot_K - first_K.to(tl.uint32) * num_subkeys.to(tl.uint32)).to(tl.int32)
    row_N = out + (head.to(tl.int64) * num_tokens + token) * num_subkeys
    _store_totals(grad_K, first_K, exists_K, row_N)
    second_half = tl.cast(heads, tl.int64) * num_tokens * num_subkeys
    _store_totals(grad_K, second_K, exists_K, row_N + second_half)
