"""What the calls of models in progress say about their tokens: a stack for each thread.

Several threads may call one model, and a call may end by an interrupt that no hook hears of. So nothing of a call
stands on a module: it stands in the thread that makes the call, and counts as long as the frame that makes it is on
that thread's stack. A thread that runs a part of a call for another (autograd's, which repeats checkpointed blocks) is
given it by `during`.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """A call in progress of a module that hands its mask to memories inside of it, the giver."""

    giver: str  # its name in the model that memories were added to; a copy's calls have the same
    says: bool  # whether memories are to take this mask, also None, or that of a call around this one
    mask: Tensor | None  # [B, T], True for real tokens; None if all are real
    frame: FrameType | None  # that makes the call; None in a compiled region, which sees none


# `calls`: the innermost first. No class of our own: torch.compile writes to no attribute of such a one.
_thread = threading.local()


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


def during(calls: Sequence[Call], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)`` as a part of these calls, in whichever thread."""
    before = getattr(_thread, "calls", ())
    _thread.calls = _made_by(inspect.currentframe(), calls)
    try:
        return run(*args, **kwargs)
    finally:
        _thread.calls = before


def _made_by(frame: FrameType | None, calls: Sequence[Call]) -> tuple[Call, ...]:
    return tuple(call._replace(frame=frame) for call in calls)


def _runs(frame: FrameType) -> bool:
    """Whether this frame is among those that this thread runs now."""
    here = inspect.currentframe()
    while here is not None and here is not frame:
        here = here.f_back
    return here is not None
