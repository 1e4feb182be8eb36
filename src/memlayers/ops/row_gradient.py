"""row gradient: what backward leaves behind for a row optimizer, and how long it lives.

The gradient of a table is kept factored: (slots, weights, gradient of the output), some 10 MB for 2,048 tokens where
the summed rows would take 700. `RowGradient` holds it; the operation `record_` appends to it in backward.

Why an operation: appending to a Python list from a backward that `torch.compile` traces is silently lost. What the
operation mutates is `RowGradient.handle`, a tensor that is its argument (a global one crashes there): the number of
the `RowGradient` and a count of recorded tokens, on the CPU, so that reading it never waits for a device. Its
implementation runs at run time, compiled or not, and survives the copies of the handle that functionalisation makes.
Each forward pass leaves another handle for the next one: what is compiled saves it for backward, and would take what
another backward pass has written to it for an error.

Life: what a backward pass records waits under the number of that pass. When the pass reaches the companion parameter of
the table, a hook puts it into the companion's gradient, as a `RowTensor`: from there on it is where the gradients of
other parameters are, and what a loop does to those happens to it. So what `torch.autograd.grad` computes on the side is
never taken for a gradient. Passes may nest (reentrant checkpointing), and several threads may run some at once.

Letters: T tokens, K rows a token, S slots, V width.
"""

import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memlayers.ops.precision import wide_dtype
from memlayers.ops.registry import operation
from memlayers.ops.row_gradient_tensor import REMEDY, Recorded, RowTensor, dense_part
from memlayers.ops.row_sum import Part, SummedRows, parts_of, row_norm, sum_parts
from memlayers.torch_private import after_backward, current_backward, has_gradient_hooks, hooks_after_accumulation

_numbers = itertools.count(1)
# The way from the number in a handle to its object. It keeps nothing alive.
_row_gradients: "weakref.WeakValueDictionary[int, RowGradient]" = weakref.WeakValueDictionary()


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


def renew_handle(handle: Tensor) -> None:
    """Called by each forward pass, when it runs: the next one takes another handle."""
    row_gradient = _row_gradients.get(int(handle[0]))
    if row_gradient is not None:
        row_gradient.handle = handle.detach().clone()


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _flops(handle, slots_TK, weights_TK, grad_TV, **_):
    return 2 * math.prod(slots_TK) * grad_TV[1]  # of the sum that the step makes, as of the one of a dense gradient


def _refuse_batch(*_: Tensor) -> None:
    raise RuntimeError(
        "a value table in row mode records the gradient of one backward pass at a time, and this one is batched "
        "(is_grads_batched=True, vectorize=True): take the gradients one by one, or call table.release() to give it "
        "dense gradients"
    )


record_ = operation("record_", _record, lambda *_: None, flops=_flops, batched=_refuse_batch)


class RowGradient:
    """The gradient of one table in row mode: opaque, factored, consumed by its owner's step.

    What anybody does to the gradient of the companion is done to it (`memlayers.ops.row_gradient_tensor` says what is).

    Args:
        owner: the row optimizer; it is not kept alive.
        weight: the table, [S, V].
        mark: its companion.

    Raises:
        ValueError: hooks are registered on the table.
    """

    def __init__(self, owner: object, weight: nn.Parameter, mark: nn.Parameter):
        if has_gradient_hooks(weight):
            raise ValueError(HOOKS)
        self.owner = weakref.ref(owner)
        number = next(_numbers)
        self.handle = torch.tensor([number, 0], device="cpu")
        _row_gradients[number] = self
        self._weight, self._mark = weight, mark
        self._num_slots = weight.shape[0]
        self._passes: dict[int, list[Part]] = {}  # what each has recorded that has not reached the companion
        self._reached = False  # a pass has put something into the companion's gradient since the last step
        self._missed = False  # or has not
        self._hooks: OrderedDict[int, Callable[[RowHookArgument], None]] = OrderedDict()
        # From the norm of what is recorded here; of a table in columns that over all of them, which all ranks ask for.
        self.whole_norm: Callable[[Tensor], Tensor] = lambda norm: norm
        mark.requires_grad_(True)
        mark.grad = None  # of dense mode, where it is zero
        # Weakly: torch keeps the hook where Python's collector cannot see the cycle.
        commit = weakref.WeakMethod(self._commit)
        self._handle_of_hook = mark.register_hook(lambda grad: None if (call := commit()) is None else call(grad))

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is the gradient of that tensor."""
        return weight is self._weight

    def close(self) -> None:
        """Forgets the companion, which may be used by another."""
        self._handle_of_hook.remove()
        self._mark.grad = None

    # What a loop or an optimizer may do with it.

    def add(self, slots_TK: Tensor, weights_TK: Tensor, grad_TV: Tensor) -> None:
        """Add sum over (t, k) of weights[t, k] * grad[t] to row slots[t, k], as a backward pass would."""
        recorded = self._recorded or self._new()
        recorded.add(self._new(parts_of([slots_TK], [weights_TK], [grad_TV])))
        if self._recorded is None:
            self._mark.grad = RowTensor(self._mark, recorded)

    @property
    def is_empty(self) -> bool:
        """Nothing to step on: nothing was recorded, or it was discarded by clearing the companion's gradient."""
        return not self._parts

    @property
    def has_hooks(self) -> bool:
        """Whether somebody changes the gradient on its way, by `register_hook`."""
        return bool(self._hooks)

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradient by a number."""
        if self._recorded is not None:
            self._recorded.scale(factor)

    def norm(self) -> Tensor:
        """Euclidean norm of the summed rows, a scalar; zero when nothing is recorded."""
        return self.norm_of(self._parts)

    def norm_of(self, parts: list[Part]) -> Tensor:
        """That of such a gradient."""
        if not parts:
            return torch.zeros((), device=self._mark.device)
        return self.whole_norm(row_norm(*_factors(parts), self._num_slots))

    def is_finite(self) -> Tensor:
        """Whether what is recorded, its products and their squares are: a scalar of bool on the table's device."""
        sizes = [part.weights_TK.abs().amax() * part.grad_TV.abs().amax() for part in self._parts if part.size]
        checks = [torch.isfinite(size.float().square()) for size in sizes]
        device = self._mark.device
        is_finite = torch.stack(checks).all() if checks else torch.ones((), dtype=torch.bool, device=device)
        return torch.isfinite(self.whole_norm(torch.where(is_finite, 0.0, math.inf)))

    def discard(self) -> None:
        """Forget what is recorded, as `zero_grad` does."""
        self._mark.grad = None
        self._passes, self._missed = {}, False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside there is nothing recorded; afterwards what was recorded before is there again, and nothing else."""
        before = self._passes, self._reached, self._missed
        handle, grad = self.handle.clone(), self._mark.grad
        self.discard()
        self._reached = False
        try:
            yield
        finally:
            self._passes, self._reached, self._missed = before
            self.handle.copy_(handle)
            self._mark.grad = grad

    def summed(self) -> SummedRows | None:
        """The rows summed by slot, or None when nothing is recorded: to look at; what is recorded stays."""
        return sum_parts(self._parts, self._num_slots) if self._parts else None

    def register_hook(self, hook: "Callable[[RowHookArgument], None]") -> RemovableHandle:
        """See `memlayers.ValueTable.register_row_hook`."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def held(self) -> list[Part]:
        """What is recorded; it stays.

        Of what somebody has set as the gradient of the table itself, such as the second derivatives of a penalty, each
        row that is not zero counts as one that was recorded.

        Raises:
            RuntimeError: the gradient cannot be the one that was meant.
        """
        if (fault := self.fault()) is not None:
            raise RuntimeError(fault)
        grad = self._weight.grad
        return [*self._parts, *([] if grad is None else [_part_of(grad)])]

    def consume(self, parts: list[Part] | None = None) -> list[Part] | None:
        """What is recorded, as hooks leave it, or None when nothing is; nothing stays.

        Args:
            parts: to be used in place of what is `held`, as the sum over several processes.

        Raises:
            RuntimeError: as `held` does; nothing is changed.
        """
        recorded = self._new(self.held() if parts is None else parts)
        for hook in list(self._hooks.values()):
            if recorded.parts:
                hook(RowHookArgument(recorded, self))
        self._weight.grad = None
        if self._recorded is not None:
            self._recorded.clear()
        self._reached = self._missed = False
        return recorded.parts or None

    @property
    def is_merged(self) -> bool:
        """Whether some of what is recorded was summed into one dense gradient."""
        return self._recorded is not None and self._recorded.is_merged

    @property
    def passes(self) -> int:
        """The backward passes that are recorded."""
        return 0 if self._recorded is None else self._recorded.passes

    def fault(self) -> str | None:
        """What somebody did to the gradient that cannot be followed, and the remedy; None if all is well."""
        if has_gradient_hooks(self._weight) or hooks_after_accumulation(self._weight):
            return HOOKS
        grad = self._mark.grad
        if grad is None and self._missed and not self._reached and self._weight.grad is None:
            return (
                "a backward pass went through a value table in row mode and did not reach its row_mark, so its row "
                "gradient was not kept: have row_mark beside weight in the list that backward(inputs=...) or "
                "autograd.grad is given, as model.parameters() does, and set both gradients; or call zero_grad() on "
                "the optimizer if the pass was not meant to train the table"
            )
        if grad is not None and not isinstance(grad, RowTensor) and (self._reached or bool(grad.any())):
            return f"the gradient of row_mark was replaced by a plain tensor, which holds no row gradient: {REMEDY}"
        return None

    def _new(self, parts: Iterable[Part] = ()) -> Recorded:
        return Recorded(self._num_slots, self._mark, parts)

    @property
    def _recorded(self) -> Recorded | None:
        return self._mark.grad.recorded if isinstance(self._mark.grad, RowTensor) else None

    @property
    def _parts(self) -> list[Part]:
        return self._recorded.parts if self._recorded is not None else []

    # How it is recorded.

    def _append(self, part: Part) -> None:
        backward_pass = current_backward()
        parts = self._passes.get(backward_pass)
        if parts is None:
            parts = self._passes.setdefault(backward_pass, [])
            # After the pass, whatever did not reach the companion was computed on the side.
            after_backward(partial(self._end_of_pass, backward_pass))
        parts.append(part)

    def _commit(self, grad: Tensor) -> Tensor:
        if has_gradient_hooks(self._weight):
            raise RuntimeError(HOOKS)
        if self._mark.grad is not None and self._recorded is None and not self._mark.grad.any():
            self._mark.grad = None  # a loop that makes its gradients beforehand
        recorded = self._new()
        recorded.has_graph, recorded.passes = torch.is_grad_enabled(), 1
        for part in self._passes.pop(current_backward(), []):
            recorded.add(self._new([part]))
            self._reached = True
        return RowTensor(grad, recorded)

    def _end_of_pass(self, backward_pass: int) -> None:
        self._missed |= bool(self._passes.pop(backward_pass, None))


class RowHookArgument:
    """The row gradient of one step, in the hands of a hook of `ValueTable.register_row_hook`."""

    def __init__(self, recorded: Recorded, of: RowGradient):
        self._recorded, self._of = recorded, of

    @property
    def slots(self) -> Tensor:
        """The slots of the rows that have a gradient, ascending."""
        read = [part.slots_TK[part.weights_TK != 0] for part in self._recorded.parts]
        return torch.cat(read).unique()

    def norm(self) -> Tensor:
        """Euclidean norm of the summed rows, a scalar."""
        return self._of.norm_of(self._recorded.parts)

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies the gradient by a number, or that of each row by its own: a tensor [S].

        A row that is multiplied by zero is as one that was not read: the step leaves it, and its state, as they are.
        """
        if torch.is_tensor(factor) and factor.ndim:
            if factor.shape != (self._recorded.num_slots,):
                raise ValueError(
                    f"factor must be a number or a tensor of shape [{self._recorded.num_slots}], one number a row, got "
                    f"{[*factor.shape]}"
                )
            self._recorded.scale_rows(factor)
        else:
            self._recorded.scale(factor)

    def keep(self, rows_S: Tensor) -> None:
        """Only the rows where the mask [S] of bool is True; the step leaves the others as they are."""
        if rows_S.dtype != torch.bool:
            raise ValueError(f"rows_S must be a mask of dtype torch.bool, one a row, got {rows_S.dtype}")
        self.scale(rows_S)


HOOKS = (
    "a hook is registered on the weight of a value table in row mode, where it is called without a gradient: use "
    "ValueTable.register_row_hook, or call release() on the row optimizer and train the table with dense gradients"
)


def _factors(parts: list[Part]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    slots, weights, grads = (list(factors) for factors in zip(*parts, strict=True))
    return slots, weights, grads


def _part_of(grad_SV: Tensor) -> Part:
    """What somebody has set as the gradient of a table."""
    grad_SV = grad_SV.detach()
    if grad_SV.is_sparse:
        grad_SV = grad_SV.coalesce()
        slots_T1, grad_TV = grad_SV.indices().T, grad_SV.values()
        return Part(slots_T1.contiguous(), torch.ones_like(slots_T1, dtype=wide_dtype(grad_TV.dtype)), grad_TV)
    return dense_part(grad_SV.to(wide_dtype(grad_SV.dtype)), (grad_SV != 0).any(1))
