"""record: what backward leaves behind for a row optimizer, and how long it lives.

The gradient of a table is kept factored: (slots, weights, gradient of the output), some 10 MB for 2,048 tokens where
the summed rows would take 700. `RowGradient` holds it; the operation `record_` appends to it in backward.

Why an operation: appending to a Python list from a backward that `torch.compile` traces is silently lost. What the
operation mutates is `RowGradient.handle`, a tensor that is its argument (a global one crashes there): the number of
the `RowGradient` and a count of recorded tokens, on the CPU, so that reading it never waits for a device. Its
implementation runs at run time, compiled or not, and survives the copies of the handle that functionalisation makes.

Life: gradients are recorded while a backward pass runs, and committed when that pass accumulates the gradient of the
companion parameter `mark`. So what `torch.autograd.grad` computes on the side is never taken for a gradient, and
whoever clears the companion's gradient (`zero_grad` of the model or of the optimizer) discards what is recorded.
Passes may nest (reentrant checkpointing), so each keeps its own until then.

An entry whose weight is exactly zero (a padded token's, or one that softmax rounded to nothing) is no read: it adds
nothing to a gradient, and it must not count as a step of its row.

Letters: T tokens, K rows a token, S slots, V width, R recorded tokens, M recorded entries (slot, weight, token),
P rows that are summed at most.
"""

import itertools
import weakref
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_numbers = itertools.count(1)
# The way from the number in a handle to its object. It keeps nothing alive.
_row_gradients: "weakref.WeakValueDictionary[int, RowGradient]" = weakref.WeakValueDictionary()


# What backward adds to the companion's gradient. Its square is 0 in float32, so a norm over all parameters does not
# see it; it is far above the smallest float32, so neither clipping nor averaging makes it 0. Only zero_grad does.
MARK = 1e-23

# Elements of summed rows that an update handles at a time: 4 MB in float32, so that its passes run in cache.
_CHUNK_ELEMENTS = 2**20


@torch.library.custom_op("memlayers::record_", mutates_args=("handle",))
def record_(handle: Tensor, slots_TK: Tensor, weights_TK: Tensor, grad_TV: Tensor) -> None:
    """Append one call's factored gradient to the `RowGradient` of the handle."""
    row_gradient = _row_gradients.get(int(handle[0]))
    if row_gradient is None or row_gradient.owner() is None:
        raise RuntimeError(
            "backward reached a value table in row mode whose row optimizer is gone, so its gradient would be lost: "
            "keep the optimizer alive, build a new one, or call table.release() to train it with a dense gradient"
        )
    row_gradient._append(Part(slots_TK.detach(), weights_TK.detach(), grad_TV.detach()))
    handle[1] += slots_TK.shape[0]


@record_.register_fake
def _(handle, slots_TK, weights_TK, grad_TV):
    return None


class Part(NamedTuple):
    """The factored gradient of one read."""

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
        """(index of the rows, live [C] or None, gradient [C, V]) in pieces that stay in cache."""
        size = max(1, _CHUNK_ELEMENTS // self.grad_PV.shape[1])
        for start in range(0, self.grad_PV.shape[0], size):
            piece = slice(start, min(start + size, self.grad_PV.shape[0]))
            index = piece if self.rows_P is None else self.rows_P[piece]
            yield index, None if self.live_P is None else self.live_P[piece], self.grad_PV[piece]


class RowGradient:
    """The gradient of one table in row mode: opaque, factored, consumed by its owner's step."""

    def __init__(self, owner: object, mark: nn.Parameter, num_slots: int):
        self.owner = weakref.ref(owner)
        number = next(_numbers)
        self.handle = torch.tensor([number, 0], device="cpu")
        _row_gradients[number] = self
        self._mark = mark
        self._num_slots = num_slots
        self._parts: list[Part] = []
        self._merged: SummedRows | None = None
        self._uncommitted: dict[int, list[Part]] = {}
        self._seen: tuple[Tensor | None, int] = (None, 0)
        # Weakly: torch keeps the hook where Python's collector cannot see the cycle.
        commit = weakref.WeakMethod(self._commit)

        def commit_if_alive(mark: Tensor) -> None:
            method = commit()
            if method is not None:
                method(mark)

        mark.register_post_accumulate_grad_hook(commit_if_alive)

    # What a loop or an optimizer may do with it.

    def add(self, slots_TK: Tensor, weights_TK: Tensor, grad_TV: Tensor) -> None:
        """Add sum over (t, k) of weights[t, k] * grad[t] to row slots[t, k], as a backward pass would."""
        if self._was_cleared():
            self._forget()
            self._mark.grad = torch.full_like(self._mark, MARK)
            self._seen = (self._mark.grad, self._mark.grad._version)
        self._add(Part(slots_TK, weights_TK, grad_TV))

    @property
    def is_empty(self) -> bool:
        """Nothing to step on: nothing was recorded, or it was discarded by clearing the companion's gradient."""
        return self._was_cleared() or not (self._parts or self._merged)

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradient by a number."""
        self._parts = [part._replace(weights_TK=part.weights_TK * factor) for part in self._parts]
        if self._merged is not None:
            self._merged.grad_PV.mul_(factor)

    def norm(self) -> Tensor:
        """Euclidean norm of the summed rows, a scalar; zero when nothing is recorded."""
        summed = self.summed()
        if summed is None:
            return torch.zeros((), device=self._mark.device)
        assert summed.live_P is not None
        return summed.norm() * summed.live_P.any()

    def discard(self) -> None:
        """Forget what is recorded, as `zero_grad` does."""
        self._forget()
        self._mark.grad = None

    def summed(self) -> SummedRows | None:
        """The rows summed by slot, or None when nothing is recorded; what is recorded stays."""
        grad = self._mark.grad
        if grad is None or not (self._parts or self._merged):
            return None
        if self._merged is not None:
            self._merge()
            summed = self._merged
        else:
            summed = sum_parts(self._parts, self._num_slots)
        if self._was_written(grad):  # Whether it was cleared is left to the device: no row is live then.
            assert summed.live_P is not None
            summed = summed._replace(live_P=summed.live_P & grad.any())
        return summed

    def consume(self) -> SummedRows | None:
        """The rows summed by slot, or None when nothing is recorded; nothing stays."""
        summed = self.summed()
        self._forget()
        return summed

    # How it is recorded.

    def _append(self, part: Part) -> None:
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass not in self._uncommitted:
            if self._was_cleared():
                self._parts, self._merged = [], None
            self._uncommitted[backward_pass] = []
            # After the pass, whatever it did not commit was computed on the side.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_of_pass, backward_pass))
        self._uncommitted[backward_pass].append(part)

    def _commit(self, mark: Tensor) -> None:
        for part in self._uncommitted.pop(torch._C._current_graph_task_id(), []):
            self._add(part)
        assert mark.grad is not None
        self._seen = (mark.grad, mark.grad._version)

    def _end_of_pass(self, backward_pass: int) -> None:
        self._uncommitted.pop(backward_pass, None)

    def _add(self, part: Part) -> None:
        self._parts.append(part)
        if sum(part.size for part in self._parts) > self._num_slots * part.grad_TV.shape[1]:
            self._merge()

    def _was_cleared(self) -> bool:
        grad = self._mark.grad
        return grad is None or (self._was_written(grad) and not bool(grad.any()))

    def _was_written(self, grad: Tensor) -> bool:
        """Whether somebody wrote to it: a clipping, which leaves it above zero, or zero_grad(set_to_none=False)."""
        return self._seen[0] is not grad or self._seen[1] != grad._version

    def _forget(self) -> None:
        self._parts, self._merged, self._uncommitted = [], None, {}

    def _merge(self) -> None:
        """One dense gradient instead of factors that have grown larger than that."""
        if not self._parts:
            return
        new = dense_sum(self._parts, self._num_slots)
        if self._merged is not None:
            assert new.live_P is not None
            assert self._merged.live_P is not None
            new = SummedRows(None, new.live_P | self._merged.live_P, new.grad_PV.add_(self._merged.grad_PV))
        self._parts, self._merged = [], new


def sum_parts(parts: list[Part], num_slots: int) -> SummedRows:
    """Sum by slot: sort, then one segmented sum. Every shape is static, so no device is waited for."""
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
        dtype = torch.float64 if parts[0].grad_TV.dtype == torch.float64 else torch.float32
        self.num_slots = num_slots
        weight_M = torch.cat([part.weights_TK.flatten().to(dtype) for part in parts])
        slots_M = torch.cat([part.slots_TK.flatten() for part in parts])
        self.sorted_slots_M, order_M = torch.where(weight_M == 0, num_slots, slots_M).sort(stable=True)
        self.weight_M = weight_M[order_M]
        self.grad_RV = torch.cat([part.grad_TV.to(dtype) for part in parts])
        first, tokens = 0, []
        for part in parts:
            num_tokens, topk = part.slots_TK.shape
            token_T = torch.arange(first, first + num_tokens, device=order_M.device)
            tokens.append(token_T.repeat_interleave(topk, output_size=num_tokens * topk))
            first += num_tokens
        self.token_M = torch.cat(tokens)[order_M]
        self.count = len(order_M)

    def touched(self) -> Tensor:
        """Which of the S slots were read."""
        touched = torch.zeros(self.num_slots + 1, dtype=torch.bool, device=self.sorted_slots_M.device)
        return touched.index_fill_(0, self.sorted_slots_M, True)[:-1]

    def sums(self, slots_P: Tensor) -> Tensor:
        """Sums [P, V] of the entries of each slot, zero for none; slots ascend, and S stands for no slot at all."""
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
