"""How a model's padding mask reaches its memories.

A block calls ``self.mlp(hidden)``: no mask arrives there, yet padding must count neither in the query's BatchNorm nor
in the usage figures. So a pre-forward hook lays the mask of the call on each memory (`MemoryLayer.mask`) and a forward
hook takes it away again, also when the call fails.

The hooks sit on the *base model* (``model.transformer``, ``model.model``), not on the outermost one: wrappers such as
PEFT's call ``model.forward`` directly, which skips the outermost model's hooks, but every forward of the outer model
calls the base model as a module. A model of several parts (the halves of an encoder-decoder, towers for text and for
images) has masks of its own for each, or none: there they sit on the part, too. They hold names and no state, and are
found by their functions, so deepcopy and pickle carry them along.

Under gradient checkpointing a block runs a second time during backward, long after the call has ended and the mask was
taken away, perhaps after another batch went through. There the mask travels as an argument of the checkpointed
function.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlayers.layer import MemoryLayer, memory_layers


def install_hooks(model: nn.Module, memories: Sequence[str]) -> None:
    """Hands the masks that `model` is called with to its memories of these names from now on.

    A model whose forward takes no ``attention_mask`` hands over none.
    """
    givers: dict[str, list[str]] = {}  # modules that are given masks, and their memories
    for memory in memories:
        for giver in _givers(model, memory):
            givers.setdefault(giver, []).append(memory)
    for giver, names in givers.items():
        base: Any = model.get_submodule(giver)
        # Its place differs between models, and between versions of transformers for one model.
        position = _parameters(base).index("attention_mask")
        paths = tuple(name.removeprefix(f"{giver}." if giver else "") for name in names)
        base.register_forward_pre_hook(partial(hand_over_mask, paths, position), with_kwargs=True)
        base.register_forward_hook(partial(take_away_mask, paths), always_call=True)


def _givers(model: nn.Module, memory: str) -> list[str]:
    """The modules around a memory that its mask comes from, from the outside in: the base model, a part of it, both."""
    if not isinstance(model, PreTrainedModel):
        return [""] if "attention_mask" in _parameters(model) else []
    parts = memory.split(".")
    around = [".".join(parts[:count]) for count in range(len(parts))]
    whole = next(name for name, module in model.named_modules() if module is model.base_model)
    models = [name for name in around if isinstance(model.get_submodule(name), PreTrainedModel)]
    models = [name for name in models if len(name) >= len(whole)]
    if not models or "attention_mask" not in _parameters(model.get_submodule(models[-1])):
        return []  # of images, say
    if getattr(model.config, "is_encoder_decoder", False):
        return models[-1:]
    takes = [name for name in models if "attention_mask" in _parameters(model.get_submodule(name))]
    return [takes[0], *takes[-1:]] if len(takes) > 1 else takes


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def remove_hooks(model: nn.Module) -> None:
    """The inverse of `install_hooks`, and of what they did to checkpointed blocks."""
    for module in model.modules():
        hooks: Any
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, partial) and hook.func in (hand_over_mask, take_away_mask):
                    del hooks[number]
                    for marks in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                        marks.pop(number, None)
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, partial) and checkpoint.func is checkpoint_with_mask:
            module.__dict__["_gradient_checkpointing_func"] = checkpoint.args[0]


def hand_over_mask(
    paths: tuple[str, ...], position: int, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Pre-forward hook: lays the mask of this call, [B, T] with True for real tokens, on each memory."""
    mask = kwargs["attention_mask"] if "attention_mask" in kwargs else (args[position : position + 1] or (None,))[0]
    is_prepared = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
    mask_BT = None
    for path in paths:
        *around, memory = _along(base, path)
        if memory.mask is not None and (mask is None or is_prepared):
            continue  # from the whole model, of which this is a part
        if mask_BT is None and mask is not None:
            mask_BT = _of_this_call(mask, _num_tokens(args, kwargs), training=base.training)
        memory.mask = mask_BT
        if mask_BT is not None and base.training and not torch.compiler.is_compiling():
            for module in around:
                _carry_mask_through_checkpoint(module)


def take_away_mask(paths: tuple[str, ...], base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: the mask belongs to one call only."""
    for path in paths:
        *_, memory = _along(base, path)
        memory.mask = None


def _along(base: nn.Module, path: str) -> Iterator[Any]:
    """The modules from `base` to the one at `path`, both included."""
    module: Any = base
    yield module
    for name in path.split("."):
        module = getattr(module, name)
        yield module


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    ids = kwargs["input_ids"] if "input_ids" in kwargs else (args[:1] or (None,))[0]
    if ids is not None:
        return ids.shape[-1]
    embeddings = kwargs.get("inputs_embeds")
    return None if embeddings is None else embeddings.shape[1]


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
    if mask.shape[1] == num_tokens:  # sliced, it would tie `torch.export` to one number of tokens
        return mask.to(torch.bool)
    # With a cache the mask covers past and present, [B, past + T]: the last T columns are those of this call.
    return mask[:, mask.shape[1] - num_tokens :].to(torch.bool)


def _carry_mask_through_checkpoint(module: nn.Module) -> None:
    """Makes the checkpoint function of `module`, if one is set, keep the masks for the second run."""
    checkpoint = module.__dict__.get("_gradient_checkpointing_func")
    if checkpoint is None or (isinstance(checkpoint, partial) and checkpoint.func is checkpoint_with_mask):
        return
    memories = tuple(memory_layers(module).values())
    module.__dict__["_gradient_checkpointing_func"] = partial(checkpoint_with_mask, checkpoint, memories)


def checkpoint_with_mask(
    checkpoint: Callable[..., Any], memories: tuple[MemoryLayer, ...], run: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoints ``run(*args)`` so that each of its runs sees the masks that are current now."""
    if torch.compiler.is_compiling():
        # The traced region holds the mask as an input of its own, and must not write to a module.
        return checkpoint(run, *args)
    masks = [memory.mask for memory in memories]
    return checkpoint(partial(run_with_masks, memories, run, len(masks)), *masks, *args)


def run_with_masks(memories: tuple[MemoryLayer, ...], run: Callable[..., Any], count: int, *args: Any) -> Any:
    """Runs `run` on what follows `count` masks among `args`, with these on `memories`; puts back what was there."""
    before = [memory.mask for memory in memories]
    for memory, mask_BT in zip(memories, args[:count], strict=True):
        memory.mask = mask_BT
    try:
        return run(*args[count:])
    finally:
        for memory, mask_BT in zip(memories, before, strict=True):
            memory.mask = mask_BT
