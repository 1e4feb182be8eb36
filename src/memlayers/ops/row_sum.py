"""row sum: the rows of a table's gradient, summed by slot from their factors, and their norm.

This is the reference, and what runs without kernels: shapes are static, so that no device is waited for.

An entry whose weight is exactly zero (a padded token's, or one that softmax rounded to nothing) is no read: it adds
nothing to a gradient, and it must not count as a step of its row. Its slot may be anything.

Letters: T tokens, K rows a token, S slots, V width, R tokens of all parts, M entries (slot, weight, token) of all
parts, P rows that are summed at most, C rows of one piece.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops.precision import wide_dtype
from memlayers.ops.registry import operation

# Elements of summed rows that an update handles at a time: 4 MB in float32, so that its passes run in cache.
_CHUNK_ELEMENTS = 2**20


class Part(NamedTuple):
    """A factored gradient: the sum over (t, k) of weights[t, k] * grad[t], added to row slots[t, k]."""

    slots_TK: Tensor
    weights_TK: Tensor
    grad_TV: Tensor

    @property
    def size(self) -> int:
        """Elements held."""
        return self.slots_TK.numel() + self.weights_TK.numel() + self.grad_TV.numel()


class SummedRows(NamedTuple):
    """Summed gradients of P distinct rows, of static shape: P = min(M, S), whatever was read.

    rows_P: the slots (None: all S in order); live_P: whether the row was read (None: every one was). The gradient of a
    row that was not is zero, and an update must leave the row alone.
    """

    rows_P: Tensor | None
    live_P: Tensor | None
    grad_PV: Tensor

    def compact(self) -> "SummedRows":
        """Only the rows that were read. Its shape depends on the data: on a device other than the CPU it would wait."""
        if self.live_P is None:
            return self
        place_P = self.live_P.nonzero().squeeze(1)
        rows_P = place_P if self.rows_P is None else self.rows_P[place_P]
        return SummedRows(rows_P, None, self.grad_PV[place_P])

    def norm(self) -> Tensor:
        """Euclidean norm, a scalar."""
        return torch.linalg.vector_norm(self.grad_PV)

    def chunks(self) -> Iterator[tuple[Tensor | slice, Tensor | None, Tensor]]:
        """(slots [C] or a slice of all, live [C] or None, gradient [C, V]) in pieces that stay in cache."""
        size = max(1, _CHUNK_ELEMENTS // self.grad_PV.shape[1])
        for start in range(0, self.grad_PV.shape[0], size):
            piece = slice(start, min(start + size, self.grad_PV.shape[0]))
            index = piece if self.rows_P is None else self.rows_P[piece]
            yield index, None if self.live_P is None else self.live_P[piece], self.grad_PV[piece]


def row_norm_reference(parts: list[Part], num_slots: int) -> Tensor:
    """Euclidean norm of the summed rows of at least one part; float32, float64 if the gradients are."""
    return sum_parts(parts, num_slots).norm()


def clipping_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply a gradient of this norm by, so that it has at most the other; a scalar on the norm's device."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def parts_of(slots: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Part]:
    """The parts whose factors the lists hold. Raises `ValueError` unless their shapes fit each other."""
    parts = [Part(*factors) for factors in zip(slots, weights, grads, strict=True)]
    for part in parts:
        _check(part)
    return parts


def _check(part: Part) -> None:
    slots_TK, weights_TK, grad_TV = part
    if slots_TK.ndim != 2 or slots_TK.shape != weights_TK.shape or grad_TV.shape[:-1] != slots_TK.shape[:1]:
        raise ValueError(
            "slots, weights and grads must be [T, K], [T, K] and [T, V], got "
            f"{[*slots_TK.shape]}, {[*weights_TK.shape]} and {[*grad_TV.shape]}"
        )


def sum_parts(parts: list[Part], num_slots: int) -> SummedRows:
    """Sum by slot: sort, then one segmented sum."""
    if sum(part.slots_TK.numel() for part in parts) >= num_slots:
        return dense_sum(parts, num_slots)
    entries = _Entries(parts, num_slots)
    touched_S = entries.touched()
    # P = M rows, all distinct: those that were read, in order, then as many others as it takes.
    read_S, unread_S = touched_S.cumsum(0), (~touched_S).cumsum(0)
    place_S = torch.where(touched_S, read_S - 1, read_S[-1] + unread_S - 1)
    slots_S = torch.arange(num_slots, device=place_S.device)
    rows_P = torch.empty_like(slots_S).scatter_(0, place_S, slots_S)[: entries.count]
    live_P = touched_S[rows_P]
    return SummedRows(rows_P, live_P, entries.sums(torch.where(live_P, rows_P, num_slots)))


def dense_sum(parts: list[Part], num_slots: int) -> SummedRows:
    """The same for all S rows."""
    entries = _Entries(parts, num_slots)
    slots_S = torch.arange(num_slots, device=entries.sorted_slots_M.device)
    return SummedRows(None, entries.touched(), entries.sums(slots_S))


class _Entries:
    """The M entries (slot, weight, token) of several parts, sorted by slot; equal slots keep their order.

    Entries of weight zero are sorted behind all slots, as slot S.
    """

    def __init__(self, parts: list[Part], num_slots: int):
        dtype = wide_dtype(*(part.grad_TV.dtype for part in parts))
        self.num_slots = num_slots
        weight_M = _joined([part.weights_TK.flatten().to(dtype) for part in parts])
        slots_M = _joined([part.slots_TK.flatten().long() for part in parts])
        _check_range(slots_M, weight_M, num_slots)
        is_read_M = weight_M != 0
        if slots_M.device.type != "cpu":  # not checked there; a slot of no row must not be written to
            is_read_M &= (slots_M >= 0) & (slots_M < num_slots)
        self.sorted_slots_M, order_M = torch.where(is_read_M, slots_M, num_slots).sort(stable=True)
        self.weight_M = weight_M[order_M]
        self.grad_RV = _joined([part.grad_TV.to(dtype) for part in parts])
        first, tokens = 0, []
        for part in parts:
            num_tokens, topk = part.slots_TK.shape
            token_T = torch.arange(first, first + num_tokens, device=order_M.device)
            tokens.append(token_T.repeat_interleave(topk, output_size=num_tokens * topk))
            first += num_tokens
        self.token_M = _joined(tokens)[order_M]
        self.count = len(order_M)

    def touched(self) -> Tensor:
        """Which of the S slots were read."""
        touched = torch.zeros(self.num_slots + 1, dtype=torch.bool, device=self.sorted_slots_M.device)
        return touched.index_fill_(0, self.sorted_slots_M, True)[:-1]

    def sums(self, slots_P: Tensor) -> Tensor:
        """Sums [P, V] of the entries of each slot, zero for none; slots ascend, and S stands for no slot at all."""
        if self.count == 0:
            return self.grad_RV.new_zeros(len(slots_P), self.grad_RV.shape[1])
        ends = torch.full_like(slots_P[:1], self.num_slots)
        starts = torch.searchsorted(self.sorted_slots_M, torch.cat([slots_P, ends]))
        return F.embedding_bag(
            self.token_M,
            self.grad_RV,
            starts,
            per_sample_weights=self.weight_M,
            mode="sum",
            include_last_offset=True,
        )


def _check_range(slots_M: Tensor, weight_M: Tensor, num_slots: int) -> None:
    if slots_M.device.type != "cpu" or not slots_M.numel():  # elsewhere it would wait for the device
        return
    low, high = torch.where(weight_M == 0, 0, slots_M).aminmax()
    if low < 0 or high >= num_slots:
        raise IndexError(f"slots must be in [0, {num_slots}), got {int(low)} to {int(high)}")


def _joined(pieces: list[Tensor]) -> Tensor:
    """Their concatenation; a merged gradient is a single piece as large as the table, and is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _empty_norm(slots, weights, grads, num_slots):
    return grads[0].new_empty((), dtype=wide_dtype(*(grad.dtype for grad in grads)))


row_norm = operation(
    "row_norm",
    row_norm_reference,
    _empty_norm,
    pack=lambda slots, weights, grads, num_slots: (parts_of(slots, weights, grads), num_slots),
)
