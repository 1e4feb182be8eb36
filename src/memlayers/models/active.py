"""Which memories of a model answer: those of some names, and, for the length of a block, none."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from memlayers.layer import memory_layers
from memlayers.models.calls import carry_through_checkpoints, switched_off
from memlayers.models.install import match_adapters, match_device_and_dtype
from memlayers.models.modules import memories_in, require_memories, require_name, unwrap
from memlayers.models.wrappers import MemoryWrapper, ReplacingMemory, find_wrappers

Names = str | Sequence[str]


def named_memories(model: nn.Module) -> dict[str, bool]:
    """The names of a model's memories in alphabetical order, and whether those answer (`set_active`)."""
    return dict(sorted((wrapper.memory_name, wrapper.is_active) for _, wrapper in find_wrappers(unwrap(model))))


def set_active(model: nn.Module, names: Names) -> None:
    """From now on the memories of these names answer, and no others; with ``[]`` the model is its base.

    Memories that do not answer stay in the model, on its device and in its optimizer, where they get no gradients; a
    wrapper like DDP, which waits for a gradient of everything, is told so (``find_unused_parameters=True``).

    Args:
        model: one with memories; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too.
        names: one name, or several.

    Raises:
        ValueError: a name of no memory; a memory that is to be silent in place of a module that was not kept. Nothing
            is changed then.
    """
    inner = unwrap(model)
    chosen = _known(inner, names)
    silent = {path: one for path, one in find_wrappers(inner) if one.memory_name not in chosen}
    require_originals(silent)
    prepare_originals(inner, silent.values())
    for _, wrapper in find_wrappers(inner):
        wrapper.is_active = wrapper.memory_name in chosen


@contextmanager
def disable_memory(model: nn.Module, names: Names | None = None) -> Iterator[None]:
    """In its block, the model gives the outputs of the base model, bit for bit.

        with disable_memory(model), torch.no_grad():
            reference = model(**batch).logits

    A memory beside a module adds nothing; one in place of a module that was kept lets that module answer. It counts for
    the thread that enters the block, not for those that run meanwhile or are started in it. A block that is
    checkpointed by `transformers` is repeated in backward as it was called. In `disable_adapter` of PEFT the same is
    done by itself: there memories whose module was not kept stay on, as a part of the base.

    Args:
        model: one with memories; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too.
        names: of the memories that are off; None: all.

    Raises:
        ValueError: a model without memories, or without one of a name; one that has no module to take the place of a
            memory.
    """
    inner = unwrap(model)
    memories = memories_in(inner)
    wrappers = dict(find_wrappers(inner))
    if names is None:
        inside = {memory for wrapper in wrappers.values() for memory in memory_layers(wrapper).values()}
        require_originals(wrappers, [name for name, memory in memories.items() if memory not in inside])
    else:
        chosen = _known(inner, names)
        wrappers = {path: wrapper for path, wrapper in wrappers.items() if wrapper.memory_name in chosen}
        require_originals(wrappers)
    with off(inner, list(wrappers.values())):
        yield


def _known(model: nn.Module, names: Names) -> set[str]:
    """The names as a set. Raises `ValueError` for a model without memories, or without one of a name."""
    known = require_memories(model)
    if not isinstance(names, Iterable):
        raise ValueError(f"names must be the name of a memory or a list of them, got {names!r}")
    return {require_name(known, name) for name in ([names] if isinstance(names, str) else names)}


def require_originals(wrappers: dict[str, MemoryWrapper], others: Sequence[str] = ()) -> None:
    """Raises `ValueError` unless a module can answer in place of each memory; none can in place of `others`."""
    if lost := [*(path for path, wrapper in wrappers.items() if wrapper.original is None), *others]:
        raise ValueError(
            f"model must still have the modules that its memories replaced, got one that has not kept "
            f"{', '.join(lost)}: use add_memory(..., keep_original=True), or mode='parallel'"
        )


@contextmanager
def off(model: nn.Module, wrappers: Sequence[MemoryWrapper]) -> Iterator[None]:
    """In its block, these wrappers of `model`, whose modules are all there, answer without their memories."""
    prepare_originals(model, wrappers)
    for module in model.modules():
        carry_through_checkpoints(module)
    with switched_off(wrappers):
        yield


def prepare_originals(model: nn.Module, wrappers: Iterable[MemoryWrapper]) -> None:
    """Gives kept modules the device, dtype, mode and state of adapters that they would have in the model."""
    for wrapper in wrappers:
        if isinstance(wrapper, ReplacingMemory) and wrapper.original is not None:
            match_device_and_dtype(wrapper)
            match_adapters(wrapper.original, model)
            wrapper.original.train(wrapper.training)
