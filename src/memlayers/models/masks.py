"""How a model's padding mask reaches its memories.

A block calls ``self.mlp(hidden)``: no mask arrives there, yet padding must count neither in the query's BatchNorm nor
in the usage figures. So a pre-forward hook lays the mask of the call on each memory (`MemoryLayer.mask`) and a forward
hook takes it away again, also when the call fails.

The hooks sit on the *base model* (``model.transformer``, ``model.model``), not on the outermost one: wrappers such as
PEFT's call ``model.forward`` directly, which skips the outermost model's hooks, but every forward of the outer model
calls the base model as a module. They hold no state and are found by name, so deepcopy and pickle carry them along.

Under gradient checkpointing a block runs a second time during backward, long after the call has ended and the mask was
taken away, perhaps after another batch went through. There the mask travels as an argument of the checkpointed
function.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.layer import MemoryLayer


def install_hooks(base: nn.Module, *, blocks: str) -> None:
    """Hands the masks of `base`, whose forward runs its list of `blocks`, to the memories in them from now on."""
    # Its place differs between models, and between versions of transformers for one model.
    position = list(inspect.signature(base.forward).parameters).index("attention_mask")
    base.register_forward_pre_hook(partial(hand_over_mask, blocks, position), with_kwargs=True)
    base.register_forward_hook(partial(take_away_mask, blocks), always_call=True)


def hand_over_mask(blocks: str, position: int, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-forward hook: lays the mask of this call, [B, T] with True for real tokens, on each memory."""
    mask = kwargs["attention_mask"] if "attention_mask" in kwargs else (args[position : position + 1] or (None,))[0]
    mask_BT = None if mask is None else _of_this_call(mask, _num_tokens(args, kwargs), training=base.training)
    for memory in _memories(base, blocks):
        memory.mask = mask_BT


def take_away_mask(blocks: str, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: the mask belongs to one call only."""
    for memory in _memories(base, blocks):
        memory.mask = None


def _memories(base: nn.Module, blocks: str) -> list[MemoryLayer]:
    return [block.mlp for block in getattr(base, blocks) if isinstance(block.mlp, MemoryLayer)]


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    ids = kwargs["input_ids"] if "input_ids" in kwargs else (args[:1] or (None,))[0]
    if ids is not None:
        return int(ids.shape[-1])
    embeddings = kwargs.get("inputs_embeds")
    return None if embeddings is None else int(embeddings.shape[1])


def _of_this_call(mask: Any, num_tokens: int | None, *, training: bool) -> Tensor | None:
    """The columns of `mask` that belong to the tokens of this call; None where no memory can depend on them."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        if training:
            got = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(
                f"attention_mask must have 2 dimensions [batch, tokens] when a model with a memory is trained (the "
                f"query's statistics must not see padding), got {got}"
            )
        # Prepared masks (a static cache's, [B, 1, T, S]) no longer say which tokens are padding. In evaluation the
        # output at a real token does not depend on it: statistics are the running ones.
        return None
    if num_tokens is None:
        return None  # the model's own forward reports that neither input_ids nor inputs_embeds came
    if mask.shape[1] < num_tokens:
        raise ValueError(f"attention_mask must have a column for each of the {num_tokens} tokens, got {mask.shape[1]}")
    # With a cache the mask covers past and present, [B, past + T]: the last T columns are those of this call.
    return mask[:, mask.shape[1] - num_tokens :].to(torch.bool)


def carry_mask_through_checkpoint(block: Any) -> None:
    """Makes the checkpoint function of `block`, if one is set, keep the mask for the second run of the block."""
    checkpoint = block.__dict__.get("_gradient_checkpointing_func")
    if checkpoint is None or (isinstance(checkpoint, partial) and checkpoint.func is checkpoint_with_mask):
        return
    block._gradient_checkpointing_func = partial(checkpoint_with_mask, checkpoint, block.mlp)


def checkpoint_with_mask(
    checkpoint: Callable[..., Any], memory: MemoryLayer, run: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoints ``run(*args)`` so that each of its runs sees the mask that is current now."""
    if torch.compiler.is_compiling():
        # The traced region holds the mask as an input of its own, and must not write to a module.
        return checkpoint(run, *args)
    return checkpoint(partial(run_with_mask, memory, run), memory.mask, *args)


def run_with_mask(memory: MemoryLayer, run: Callable[..., Any], mask_BT: Tensor | None, *args: Any) -> Any:
    """Runs ``run(*args)`` with `mask_BT` on `memory`, and puts back what was there before."""
    before, memory.mask = memory.mask, mask_BT
    try:
        return run(*args)
    finally:
        memory.mask = before
