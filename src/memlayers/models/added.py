"""What `add_memory` has put into a model: which memories, where, and their tensors by the names that files have."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from memlayers.layer import MemoryLayer
from memlayers.models.identity import base_name
from memlayers.models.install import build_memories
from memlayers.models.mixin import MemoryMixin
from memlayers.models.placement import MemoryPlacement
from memlayers.models.unwrapping import unwrap
from memlayers.models.wrappers import MemoryWrapper, ParallelMemory, find_wrappers


def added_memories(model: nn.Module) -> dict[str, MemoryWrapper]:
    """The wrappers of `model`, which was unwrapped, by the names of the modules in whose places they are.

    Raises `ValueError` for a model without memories, and for memories that something was put around.
    """
    wrappers = {base_name(name): wrapper for name, wrapper in find_wrappers(model)}
    if not wrappers:
        raise ValueError(f"model must have memories that add_memory put there, got a {type(model).__name__} without")
    for name, wrapper in wrappers.items():
        if not isinstance(memory := memory_of(wrapper), MemoryLayer):
            raise ValueError(
                f"model must have a MemoryLayer at {name}.memory, got a {type(memory).__name__}: merge or unload the "
                f"adapters of memories first, and leave memories out of an adapter's modules_to_save"
            )
    return wrappers


def memory_of(wrapper: MemoryWrapper) -> MemoryLayer:
    """The memory, compiled or not."""
    return unwrap(wrapper.memory)  # type: ignore[return-value]


def placement_of(model: nn.Module, wrappers: Mapping[str, MemoryWrapper]) -> MemoryPlacement:
    """What `add_memory` was called with. Raises `ValueError` where memories differ in more than their weights."""
    memories = [memory_of(wrapper) for wrapper in wrappers.values()]
    first, mode = memories[0], next(iter(wrappers.values())).mode
    for (name, wrapper), memory in zip(wrappers.items(), memories, strict=True):
        if (type(memory), memory.config, wrapper.mode) != (type(first), first.config, mode):
            raise ValueError(
                f"model must have memories of one kind, configuration and mode, as add_memory makes them, got another "
                f"one at {name}"
            )
    tables = len({id(memory.values) for memory in memories})
    if tables not in (1, len(memories)):
        raise ValueError(f"model must have memories that share one table or none, got {tables} for {len(memories)}")
    layers: Sequence[int] | Sequence[str] = list(wrappers)
    if isinstance(model, MemoryMixin) and isinstance(model.config.placement.layers[0], int):
        layers = model.config.placement.layers
    shared = tables == 1 and len(memories) > 1
    if len(memories) == 1 and isinstance(model, MemoryMixin):
        shared = model.config.placement.share_values
    return MemoryPlacement(
        config=first.config, kind=type(first).__name__, layers=layers, mode=mode, share_values=shared
    )


def memory_tensors(memories: Mapping[str, MemoryLayer]) -> dict[str, Tensor]:
    """Parameters and buffers of memories, by module; what several memories share is there once, under its first name.

    Buffers that are in no state_dict are there, too: a memory that is built without storage cannot compute them anew.
    """
    seen: set[int] = set()
    found = {}
    for at, memory in memories.items():
        for name, tensor in (*memory.named_parameters(), *memory.named_buffers()):
            # The mark of a table in row mode is the optimizer's.
            if name.rpartition(".")[2] != "row_mark" and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{at}.memory.{name}"] = tensor
    return found


def added_tensors(wrappers: Mapping[str, MemoryWrapper]) -> dict[str, Tensor]:
    """All that was added: `memory_tensors`, and the gates in "parallel" mode."""
    tensors = memory_tensors({name: memory_of(wrapper) for name, wrapper in wrappers.items()})
    gates = {name: wrapper.gate for name, wrapper in wrappers.items() if isinstance(wrapper, ParallelMemory)}
    return {**tensors, **{f"{name}.gate": gate for name, gate in gates.items()}}


def empty_memories(model: nn.Module, placement: MemoryPlacement, names: Sequence[str]) -> list[MemoryLayer]:
    """The memories of `placement` without storage, on the meta device: shapes and dtypes only.

    Raises `ValueError` for a kind that is not known, and for one that holds what is in no file.
    """
    memories = build_memories(model, placement, names, device="meta")
    for part in (part for memory in memories for part in memory.modules()):
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"kind must keep all tensors as parameters or buffers to be saved and loaded, got "
                    f"{placement.kind} with the tensor {name!r} in its {type(part).__name__}: use register_buffer"
                )
    return memories


def at_names(placement: MemoryPlacement, names: Sequence[str]) -> MemoryPlacement:
    """The same at modules that have these names in another model; block numbers stay."""
    return placement if isinstance(placement.layers[0], int) else dataclasses.replace(placement, layers=names)
