"""switch: which memories are off, for the length of a block (`memlayers.models.disable`).

Which memories are off stands in the thread, not on a module: other threads may call the same model meanwhile. A block
that is checkpointed runs again in backward, perhaps in another thread and when other memories are off; there what was
off travels with the checkpointed function.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

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
        _thread.off = before


def carry_through_checkpoints(model: nn.Module) -> None:
    """Makes the checkpoint functions of `transformers` in `model` keep what is off for the second run."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not _carries(checkpoint):
            module.__dict__["_gradient_checkpointing_func"] = partial(_checkpoint, checkpoint)


def _carries(checkpoint: Any) -> bool:
    while isinstance(checkpoint, partial):
        if checkpoint.func is _checkpoint:
            return True
        checkpoint = checkpoint.args[0] if checkpoint.args else checkpoint.func
    return False


def _checkpoint(checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # the traced region is repeated as it was traced
        return checkpoint(run, *args, **kwargs)
    off = [wrapper for wrapper, _ in getattr(_thread, "off", ())]
    return checkpoint(partial(_run, off, run), *args, **kwargs)


def _run(off: Sequence[nn.Module], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = getattr(_thread, "off", ())
    _thread.off = ()
    try:
        with switched_off(off):
            return run(*args, **kwargs)
    finally:
        _thread.off = before
