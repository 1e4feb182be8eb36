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

Letters: T tokens, K rows a token, S slots, V width.
"""

import itertools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from memlayers.ops.row_sum import Part, SummedRows, dense_sum, parts_of, row_norm, sum_parts
from memlayers.ops.table import operation
from memlayers.torch_private import after_backward, current_backward, version

_numbers = itertools.count(1)
# The way from the number in a handle to its object. It keeps nothing alive.
_row_gradients: "weakref.WeakValueDictionary[int, RowGradient]" = weakref.WeakValueDictionary()


# What backward adds to the companion's gradient. Its square is 0 in float32, so a norm over all parameters does not
# see it; it is far above the smallest float32, so neither clipping nor averaging makes it 0. Only zero_grad does.
MARK = 1e-23


def _record(handle: Tensor, slots_TK: Tensor, weights_TK: Tensor, grad_TV: Tensor) -> None:
    """Append one call's factored gradient to the `RowGradient` of the handle."""
    row_gradient = _row_gradients.get(int(handle[0]))
    if row_gradient is None or row_gradient.owner() is None:
        raise RuntimeError(
            "backward reached a value table in row mode whose row optimizer is gone, so its gradient would be lost: "
            "keep the optimizer alive, build a new one, or call table.release() to train it with a dense gradient"
        )
    if _is_captured(grad_TV):
        raise RuntimeError(
            "a CUDA graph would replay this backward without recording its row gradient, so the table would not be "
            "trained: capture the forward pass only, or call table.release() to train it with a dense gradient"
        )
    # Copies, made here: what is compiled reuses the memory of an argument once this returns.
    row_gradient._append(Part(slots_TK.clone(), weights_TK.detach().clone(), grad_TV.detach().clone()))
    handle[1] += slots_TK.shape[0]


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _flops(handle, slots_TK, weights_TK, grad_TV, **_):
    return 2 * math.prod(slots_TK) * grad_TV[1]  # of the sum that the step makes, as of the one of a dense gradient


record_ = operation("record_", _record, lambda *_: None, flops=_flops)


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
        self._is_merged = False  # whether the first part is the sum of many
        self._uncommitted: dict[int, list[Part]] = {}
        self._seen: tuple[Tensor | None, object] = (None, 0)
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
            self._seen = (self._mark.grad, version(self._mark.grad))
        self._add(*parts_of([slots_TK], [weights_TK], [grad_TV]))

    @property
    def is_empty(self) -> bool:
        """Nothing to step on: nothing was recorded, or it was discarded by clearing the companion's gradient."""
        return self._was_cleared() or not self._parts

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradient by a number."""
        self._parts = [part._replace(weights_TK=part.weights_TK * factor) for part in self._parts]

    def norm(self) -> Tensor:
        """Euclidean norm of the summed rows, a scalar; zero when nothing is recorded."""
        parts = self._recorded()
        if parts is None:
            return torch.zeros((), device=self._mark.device)
        slots, weights, grads = (list(factors) for factors in zip(*parts, strict=True))
        return row_norm(slots, weights, grads, self._num_slots)

    def is_finite(self) -> Tensor:
        """Whether what is recorded, its products and their squares are: a scalar of bool on the table's device."""
        sizes = [part.weights_TK.abs().amax() * part.grad_TV.abs().amax() for part in self._parts if part.size]
        checks = [torch.isfinite(size.float().square()) for size in sizes]
        return torch.stack(checks).all() if checks else torch.ones((), dtype=torch.bool, device=self._mark.device)

    def discard(self) -> None:
        """Forget what is recorded, as `zero_grad` does."""
        self._forget()
        self._mark.grad = None

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside there is nothing recorded; afterwards what was recorded before is there again, and nothing else."""
        before = self._parts, self._is_merged, self._uncommitted, self._seen
        handle, grad = self.handle.clone(), self._mark.grad
        self.discard()
        try:
            yield
        finally:
            self._parts, self._is_merged, self._uncommitted, self._seen = before
            self.handle.copy_(handle)
            self._mark.grad = grad

    def summed(self) -> SummedRows | None:
        """The rows summed by slot, or None when nothing is recorded: to look at; what is recorded stays."""
        parts = self._recorded()
        return None if parts is None else sum_parts(parts, self._num_slots)

    def consume(self) -> list[Part] | None:
        """What is recorded, or None when nothing is; nothing stays."""
        parts = self._recorded()
        self._forget()
        return parts

    def _recorded(self) -> list[Part] | None:
        grad = self._mark.grad
        if grad is None or not self._parts:
            return None
        if self._was_written(grad):  # Whether it was cleared is left to the device: no weight is left then.
            is_there = grad.any()
            return [part._replace(weights_TK=part.weights_TK.where(is_there, 0)) for part in self._parts]
        return self._parts

    # How it is recorded.

    def _append(self, part: Part) -> None:
        backward_pass = current_backward()
        if backward_pass not in self._uncommitted:
            if self._was_cleared():
                self._parts, self._is_merged = [], False
            self._uncommitted[backward_pass] = []
            # After the pass, whatever it did not commit was computed on the side.
            after_backward(partial(self._end_of_pass, backward_pass))
        self._uncommitted[backward_pass].append(part)

    def _commit(self, mark: Tensor) -> None:
        for part in self._uncommitted.pop(current_backward(), []):
            self._add(part)
        assert mark.grad is not None
        self._seen = (mark.grad, version(mark.grad))

    def _end_of_pass(self, backward_pass: int) -> None:
        self._uncommitted.pop(backward_pass, None)

    def _add(self, part: Part) -> None:
        self._parts.append(part)
        factors = self._parts[1:] if self._is_merged else self._parts
        if sum(part.size for part in factors) > self._num_slots * part.grad_TV.shape[1]:
            self._merge(factors)

    def _was_cleared(self) -> bool:
        grad = self._mark.grad
        return grad is None or (self._was_written(grad) and not bool(grad.any()))

    def _was_written(self, grad: Tensor) -> bool:
        """Whether somebody wrote to it: a clipping, which leaves it above zero, or zero_grad(set_to_none=False)."""
        return self._seen[0] is not grad or self._seen[1] != version(grad)

    def _forget(self) -> None:
        self._parts, self._is_merged, self._uncommitted = [], False, {}

    def _merge(self, factors: list[Part]) -> None:
        """One dense gradient, as a part that reads each row once, instead of factors that have grown larger than it."""
        _, live_S, grad_SV = dense_sum(factors, self._num_slots)
        assert live_S is not None
        if self._is_merged:
            before = self._parts[0]
            live_S = live_S | (before.weights_TK[:, 0] != 0)
            grad_SV.addcmul_(before.grad_TV, before.weights_TK)
        slots_S1 = torch.arange(self._num_slots, device=grad_SV.device)[:, None]
        self._parts, self._is_merged = [Part(slots_S1, live_S[:, None].to(grad_SV.dtype), grad_SV)], True
