"""What is true of the calls that a thread makes: their masks, and the memories that are off; and how it is repeated.

Several threads may call one model, and a call may end by an interrupt that no hook hears of. So nothing of a call
stands on a module: it stands in the thread that makes the call, and counts as long as the frame that makes it is on
that thread's stack. Which memories are off (`memlayers.models.active`) stands there, too.

Under gradient checkpointing a block runs a second time during backward, in a thread of autograd's, long after the call
has ended, perhaps after another batch went through. So both travel with the checkpointed function.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memlayers.torch_private import current_backward


class Call(NamedTuple):
    """A call in progress of a module that hands its mask to memories inside of it, the giver."""

    giver: str  # its name in the model that memories were added to; a copy's calls have the same
    says: bool  # whether memories are to take this mask, also None, or that of a call around this one
    mask: Tensor | None  # [B, T], True for real tokens; None if all are real
    frame: FrameType | None  # that makes the call; None in a compiled region, which sees none


# `calls`: the innermost first. `off`: pairs of a memory's wrapper and the backward pass in which it was switched off,
# -1 outside of any. No class of our own, to whose attributes torch.compile does not write, and no `ContextVar`, which
# it cannot read.
_thread = threading.local()

# Masks.


def in_progress() -> tuple[Call, ...]:
    """The calls that this thread makes, the innermost first."""
    calls: tuple[Call, ...] = getattr(_thread, "calls", ())
    if not calls or torch.compiler.is_compiling():
        return calls
    return tuple(call for call in calls if call.frame is None or _runs(call.frame))


def begin(giver: str, mask: Tensor | None, *, says: bool) -> None:
    """Enters a call that the caller's caller makes."""
    frame: Any = None
    if not torch.compiler.is_compiling():
        frame = inspect.currentframe().f_back.f_back  # type: ignore[union-attr]
    _thread.calls = (Call(giver, says, mask, frame), *in_progress())


def end(giver: str) -> None:
    """Leaves the innermost call of this giver, and what was left inside of it."""
    calls: tuple[Call, ...] = getattr(_thread, "calls", ())
    for count, call in enumerate(calls):
        if call.giver == giver:
            _thread.calls = calls[count + 1 :]
            return


def mask_for(givers: Sequence[str]) -> Tensor | None:
    """The mask of the innermost call in progress of one of these givers that says one."""
    if not givers:
        return None
    for call in getattr(_thread, "calls", ()):
        if call.says and call.giver in givers:
            is_over = call.frame is not None and not torch.compiler.is_compiling() and not _runs(call.frame)
            return None if is_over else call.mask
    return None


def _runs(frame: FrameType) -> bool:
    """Whether this frame is among those that this thread runs now."""
    here = inspect.currentframe()
    while here is not None and here is not frame:
        here = here.f_back
    return here is not None


# Memories that are off.


def is_off(wrapper: nn.Module) -> bool:
    """Whether this thread has switched the wrapper's memory off."""
    for off, when in getattr(_thread, "off", ()):
        if off is wrapper:
            if not torch.compiler.is_compiling() and when != current_backward():
                raise ValueError(
                    "disable_memory must not be around a backward pass that repeats a checkpointed block of a call "
                    "made outside of it, or checkpointed by hand: call backward() outside"
                )
            return True
    return False


@contextmanager
def switched_off(wrappers: Sequence[nn.Module], *, others: bool = True) -> Iterator[None]:
    """In its block, the memories of these wrappers are off for this thread; so are, with `others`, those that were."""
    before = getattr(_thread, "off", ())
    _put((*((wrapper, current_backward()) for wrapper in wrappers), *(before if others else ())))
    try:
        yield
    finally:
        _put(before)


def _put(off: tuple[tuple[nn.Module, int], ...]) -> None:
    """Nothing stays where nothing is off: compiled blocks would be compiled again for threads that differ in that."""
    vars(_thread).pop("off", None)
    if off:
        _thread.off = off


# When a block runs again.

# Where a module keeps the function that checkpoints what is in it: `transformers`, then PyTorch's `CheckpointWrapper`.
_NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")


def carry_through_checkpoints(module: nn.Module) -> None:
    """Makes the checkpoint function of `module`, if it has one, keep what is true now for the second run."""
    for name in _NAMES:
        checkpoint = module.__dict__.get(name)
        if checkpoint is not None and not _carries(checkpoint):
            module.__dict__[name] = partial(_checkpoint, checkpoint)


def carry_no_more(module: nn.Module) -> None:
    """The inverse of `carry_through_checkpoints`."""
    for name in _NAMES:
        checkpoint = module.__dict__.get(name)
        if isinstance(checkpoint, partial) and checkpoint.func is _checkpoint:
            module.__dict__[name] = checkpoint.args[0]


def _carries(checkpoint: Any) -> bool:
    while isinstance(checkpoint, partial):
        if checkpoint.func is _checkpoint:
            return True
        checkpoint = checkpoint.args[0] if checkpoint.args else checkpoint.func
    return False


def _checkpoint(checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # the traced region holds the mask as an input, and is repeated as it was traced
        return checkpoint(run, *args, **kwargs)
    off = [wrapper for wrapper, _ in getattr(_thread, "off", ())]
    return checkpoint(partial(_run, in_progress(), off, run), *args, **kwargs)


def _run(calls: Sequence[Call], off: Sequence[nn.Module], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)`` as a part of these calls, with these memories off, in whichever thread."""
    before, frame = getattr(_thread, "calls", ()), inspect.currentframe()
    _thread.calls = tuple(call._replace(frame=frame) for call in calls)
    try:
        with switched_off(off, others=False):
            return run(*args, **kwargs)
    finally:
        _thread.calls = before
