"""What is true of a call also holds when a checkpointed block of it runs again.

Under gradient checkpointing a block runs a second time during backward, in a thread of autograd's, long after the call
has ended, perhaps after another batch went through. So the calls in progress (`calls`) and the memories that are off
(`switch`) travel with the checkpointed function.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from memlayers.models import calls, switch

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
    return checkpoint(partial(_run, calls.in_progress(), switch.now_off(), run), *args, **kwargs)


def _run(
    in_progress: Sequence[calls.Call], off: Sequence[nn.Module], run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with switch.only_off(off):
        return calls.during(in_progress, run, *args, **kwargs)
