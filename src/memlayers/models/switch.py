"""switch: which memories are off, for the length of a block (`memlayers.models.disable`).

Which memories are off stands in the thread, not on a module: other threads may call the same model meanwhile. A block
that is checkpointed runs again in backward, perhaps in another thread and when other memories are off: see
`recomputation`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from memlayers.torch_private import current_backward

# `off`: pairs of a memory's wrapper and the backward pass in which it was switched off, -1 outside of any. No
# `ContextVar`, which torch.compile cannot read.
_thread = threading.local()


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
def switched_off(wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """In its block, the memories of these wrappers are off for this thread."""
    before = getattr(_thread, "off", ())
    _thread.off = (*((wrapper, current_backward()) for wrapper in wrappers), *before)
    try:
        yield
    finally:
        _put(before)


def now_off() -> list[nn.Module]:
    """The wrappers whose memories this thread has switched off."""
    return [wrapper for wrapper, _ in getattr(_thread, "off", ())]


@contextmanager
def only_off(wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """In its block, the memories of these wrappers and of no others are off for this thread."""
    before = getattr(_thread, "off", ())
    _put(())
    try:
        with switched_off(wrappers):
            yield
    finally:
        _put(before)


def _put(off: tuple[tuple[nn.Module, int], ...]) -> None:
    """Nothing stays where nothing is off: compiled blocks would be compiled again for threads that differ in that."""
    vars(_thread).pop("off", None)
    if off:
        _thread.off = off
