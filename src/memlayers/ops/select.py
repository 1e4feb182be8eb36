"""select: the exact K best slots of a product of two codebooks, from the half scores (paper, section 3.2).

Slot (i, j) scores first[i] + second[j]. With both lists sorted, i-th best and j-th best (1-based) can be among the K
best sums only if i * j <= K: the i * j - 1 other pairs of better or equal ranks all score at least as much. So a
staircase of pairs (119 at K = 32) is scored, never the K * K grid and never all N * N slots.

Letters: N sub-keys a codebook, K neighbours, P pairs of the staircase, ... any leading shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memlayers.ops.precision import wide_dtype, widened
from memlayers.ops.registry import operation

_LOW_WORD = 0xFFFFFFFF  # ties are broken by what is packed here, so it bounds the slots: 2**32


def select_reference(first_N: Tensor, second_N: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The K best pair sums of each row.

    first_N, second_N: [..., N], half scores. Returns (scores [..., K] descending, slots [..., K] int64, the slot of
    (i, j) being i * N + j). Equal sums go to the lower slot. Scores are differentiable, and at least float32.
    """
    first_N, second_N = widened(first_N), widened(second_N)
    num_subkeys = first_N.shape[-1]
    index_N = torch.arange(num_subkeys, device=first_N.device)
    first_K, second_K = best(first_N, index_N, topk), best(second_N, index_N, topk)
    rank_first_P, rank_second_P = staircase(topk, first_N.device)
    row_P, column_P = first_K[..., rank_first_P], second_K[..., rank_second_P]
    sum_P = first_N.gather(-1, row_P) + second_N.gather(-1, column_P)
    slots_K = best(sum_P, row_P * num_subkeys + column_P, topk)
    row_K, column_K = halves(slots_K, num_subkeys)
    return first_N.gather(-1, row_K) + second_N.gather(-1, column_K), slots_K


def check_halves(first_N: Tensor, second_N: Tensor, topk: int) -> None:
    """Raises `ValueError` for what the kernels cannot take, which write wherever the shapes say."""
    num_subkeys = first_N.shape[-1]
    if first_N.shape != second_N.shape:
        raise ValueError(f"half scores must have one shape, got {[*first_N.shape]} and {[*second_N.shape]}")
    check_topk(topk, num_subkeys)


def check_topk(topk: int, num_subkeys: int) -> None:
    """Raises `ValueError` for what the kernels cannot take."""
    if not 1 <= topk <= num_subkeys <= 2**16:
        raise ValueError(
            f"topk must be in [1, N] and N, the number of sub-keys, at most 2**16, got {topk} and {num_subkeys}"
        )


def select_by(
    select_into: Callable[..., None], first_N: Tensor, second_N: Tensor, topk: int, softmax: bool = False
) -> tuple[Tensor, Tensor]:
    """What kernels of [A, B, N] with adjacent scores find, for any leading shape; scores are float32."""
    leading, num_subkeys = first_N.shape[:-1], first_N.shape[-1]
    if first_N.ndim != 3:
        first_N, second_N = (half.reshape(1, -1, num_subkeys) for half in (first_N, second_N))
    first_N, second_N = (half if half.stride(-1) == 1 else half.contiguous() for half in (first_N, second_N))
    shape = (*first_N.shape[:-1], topk)
    scores_K = first_N.new_empty(shape, dtype=torch.float32)
    slots_K = first_N.new_empty(shape, dtype=torch.int64)
    select_into(first_N, second_N, scores_K, slots_K, softmax=softmax)
    return scores_K.view(*leading, topk), slots_K.view(*leading, topk)


def halves(slots: Tensor, num_subkeys: int) -> tuple[Tensor, Tensor]:
    """The sub-keys (i, j) of each slot i * N + j."""
    first = torch.div(slots, num_subkeys, rounding_mode="floor")
    return first, slots - first * num_subkeys


def _empty_pairs(first_N, second_N, topk):
    shape = (*first_N.shape[:-1], topk)
    dtype = wide_dtype(first_N.dtype, second_N.dtype)
    return first_N.new_empty(shape, dtype=dtype), first_N.new_empty(shape, dtype=torch.int64)


def _save_slots(ctx, inputs, output):
    first_N, second_N, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.num_subkeys, ctx.dtypes = first_N.shape[-1], (first_N.dtype, second_N.dtype)


def _scatter_to_halves(ctx, grad_K, _):
    (slots_K,) = ctx.saved_tensors
    grads = []
    for subkey_K, dtype in zip(halves(slots_K, ctx.num_subkeys), ctx.dtypes, strict=True):
        zeros_N = grad_K.new_zeros(*grad_K.shape[:-1], ctx.num_subkeys)
        grads.append(zeros_N.scatter_add(-1, subkey_K, grad_K).to(dtype))
    return *grads, None


select_pairs = operation("select", select_reference, _empty_pairs, backward=_scatter_to_halves, save=_save_slots)


def staircase(topk: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The 0-based ranks (i, j) with (i + 1) * (j + 1) <= topk, as two int64 tensors [P]."""
    ranks = [(i, j) for i in range(topk) for j in range(topk // (i + 1))]
    first_P, second_P = torch.tensor(ranks, device=device).unbind(1)
    return first_P, second_P


def best(scores_N: Tensor, ids_N: Tensor, topk: int) -> Tensor:
    """The ids of the K best scores, best first; among equal scores the lower id comes first.

    scores_N: [..., N], float32 or float64. ids_N: int64 in [0, 2**32), [N] or the shape of the scores. `torch.topk`
    leaves ties in any order, so score and id are made one integer whose order is the order that we promise.
    """
    if scores_N.dtype == torch.float64:  # no room for the id beside 64 bits of score: two stable sorts
        ids_N = ids_N.expand_as(scores_N)
        by_id_N = ids_N.argsort(dim=-1, stable=True)
        by_score_N = scores_N.gather(-1, by_id_N).argsort(dim=-1, descending=True, stable=True)
        return ids_N.gather(-1, by_id_N.gather(-1, by_score_N[..., :topk]))
    # Adding zero turns -0.0 into +0.0, which compare equal but differ in their bits.
    bits_N = (scores_N + 0.0).view(torch.int32)
    # Larger negative numbers have larger magnitudes, so theirs are turned round.
    ordered_N = bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)
    packed_N = (ordered_N.long() << 32) | (_LOW_WORD - ids_N)
    return _LOW_WORD - (packed_N.topk(topk, dim=-1).values & _LOW_WORD)
