"""disable_memory: a model without its memories, for the length of a block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from memlayers.layer import memory_layers
from memlayers.models.calls import carry_through_checkpoints, switched_off
from memlayers.models.install import match_adapters, match_device_and_dtype
from memlayers.models.modules import unwrap
from memlayers.models.wrappers import MemoryWrapper, find_wrappers


@contextmanager
def disable_memory(model: nn.Module) -> Iterator[None]:
    """In its block, the model gives the outputs of the base model, bit for bit.

        with disable_memory(model), torch.no_grad():
            reference = model(**batch).logits

    A memory beside a module adds nothing; one in place of a module that was kept lets that module answer. It counts for
    the thread that enters the block, not for those that run meanwhile or are started in it. A block that is
    checkpointed by `transformers` is repeated in backward as it was called. In `disable_adapter` of PEFT the same is
    done by itself: there memories whose module was not kept stay on, as a part of the base.

    Args:
        model: one with memories; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too.

    Raises:
        ValueError: a model without memories, or with one that has no module to take its place.
    """
    inner = unwrap(model)
    wrappers = dict(find_wrappers(inner))
    if not memory_layers(inner):
        raise ValueError(f"model must have memories (add_memory), got a {type(inner).__name__} without")
    inside = {memory for wrapper in wrappers.values() for memory in memory_layers(wrapper).values()}
    lost = [name for name, wrapper in wrappers.items() if wrapper.original is None]
    lost += [name for name, memory in memory_layers(inner).items() if memory not in inside]
    if lost:
        raise ValueError(
            f"model must still have the modules that its memories replaced, got one that has not kept "
            f"{', '.join(lost)}: use add_memory(..., keep_original=True), or mode='parallel'"
        )
    with off(inner, list(wrappers.values())):
        yield


@contextmanager
def off(model: nn.Module, wrappers: Sequence[MemoryWrapper]) -> Iterator[None]:
    """In its block, these wrappers of `model`, whose modules are all there, answer without their memories."""
    for wrapper in wrappers:
        if wrapper.mode == "replace" and wrapper.original is not None:
            match_device_and_dtype(wrapper.original, wrapper.memory)
            match_adapters(wrapper.original, model)
    for module in model.modules():
        carry_through_checkpoints(module)
    with switched_off(wrappers):
        yield
