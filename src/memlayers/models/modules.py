"""What is in a model: the model inside of what was put around it, its memories, their parameters and tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor, nn

from memlayers.layer import MemoryLayer, memory_layers
from memlayers.models.placement import MemoryPlacement
from memlayers.models.wrappers import MemoryWrapper, ParallelMemory, base_name, find_wrappers
from memlayers.values import ValueTable, modules_of, value_tables


def unwrap(model: nn.Module) -> nn.Module:
    """`model` without the modules that `torch.compile`, `DistributedDataParallel` and PEFT put around it."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and callable(get_base_model := getattr(model, "get_base_model", None)):
            model = get_base_model()
        else:
            return model


def tensor_like(model: nn.Module, name: str) -> Tensor:
    """A tensor on the device and in the dtype that a memory at the module `name` takes."""
    for part in chain(model.get_submodule(name).modules(), model.modules()):
        for tensor in part.parameters(recurse=False):
            if tensor.is_floating_point() and packed_shape(part) is None:  # packed weights may be of any dtype
                return tensor
    return torch.empty(())


def packed_shape(module: nn.Module) -> tuple[int, int] | None:
    """The shape that the weight of a quantised linear map [out, in] stands for; None for any other module.

    Those of bitsandbytes, GPTQ, AWQ, HQQ and their like say what they take and return, and keep numbers of another
    shape or of fewer bits.
    """
    if isinstance(module, MemoryWrapper):  # it would answer for its base
        return None
    shape = [getattr(module, side, None) for side in ("out_features", "in_features")]
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    if not (isinstance(shape[0], int) and isinstance(shape[1], int) and own):
        return None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and {*weight.shape} == {*shape}:
        is_packed = not weight.is_floating_point() or weight.element_size() == 1
    else:
        is_packed = isinstance(weight, Tensor) or any(not tensor.is_floating_point() for tensor in own)
    return (shape[0], shape[1]) if is_packed else None


def packed_shapes(model: nn.Module) -> dict[nn.Module, tuple[int, int]]:
    """The quantised linear maps in `model`, each with its `packed_shape`."""
    return {part: shape for part in model.modules() if (shape := packed_shape(part)) is not None}


def weight_sizes(module: nn.Module) -> set[int]:
    """All sizes of the weights of `module`; of quantised ones, of what they stand for."""
    sizes: set[int] = set()
    packed = packed_shapes(module)
    for part in module.modules():
        sizes.update(packed.get(part) or (size for tensor in part.parameters(recurse=False) for size in tensor.shape))
    return sizes


def memory_names(model: nn.Module) -> list[str]:
    """The names of the memories that `add_memory` and `load_memory` put into `model`, in alphabetical order."""
    return sorted({wrapper.memory_name for _, wrapper in find_wrappers(model)})


def require_new_name(model: nn.Module, name: object) -> None:
    """Raises `ValueError` for a name that a new memory of `model` cannot have."""
    if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        raise ValueError(f"name must consist of letters, digits, '_' and '-', got {name!r}")
    known = memory_names(model)
    if name in known or (memory_layers(model) and not known):
        raise ValueError(
            f"model must have no memory {name!r} yet, got one with {', '.join(memory_layers(model))}: "
            f"remove it first, or call the new one otherwise (name=...)"
        )


@dataclass(frozen=True)
class PlacedMemories:
    """Memories of one name: where they are, what they are, and all tensors that came into the model with them."""

    paths: list[str]  # of the wrappers in the model
    wrappers: dict[str, MemoryWrapper]  # by the names that the modules in whose places they are have in the base
    placement: MemoryPlacement  # what `add_memory` was called with
    tables: list[ValueTable]
    tensors: dict[str, Tensor]  # `memory_tensors` and the gates, by the names that files have


def placed_memories(model: nn.Module, name: str | None = None) -> PlacedMemories:
    """What `add_memory` put into `model`, which was unwrapped, under this name; None: under the only one.

    Raises `ValueError` for a model without such memories, for memories that something was put around, and for memories
    that differ in more than their weights.
    """
    found = dict(find_wrappers(model, require_name(require_memories(model), name)))
    wrappers = {base_name(model, path): wrapper for path, wrapper in found.items()}
    memories: dict[str, MemoryLayer] = {}
    for place, wrapper in wrappers.items():
        memory = unwrap(wrapper.memory)  # compiled or not
        if not isinstance(memory, MemoryLayer):
            raise ValueError(
                f"model must have a MemoryLayer at {place}.memory, got a {type(memory).__name__}: merge or unload the "
                f"adapters of memories first, and leave memories out of an adapter's modules_to_save"
            )
        memories[place] = memory
    placement = _placement(model, wrappers, memories)
    tensors = memory_tensors(memories)
    for place, wrapper in wrappers.items():
        if isinstance(wrapper, ParallelMemory):
            tensors[f"{place}.gate"] = wrapper.gate
    tables = value_tables(nn.ModuleList(memories.values()))
    return PlacedMemories(list(found), wrappers, placement, tables, tensors)


def memories_in(model: nn.Module) -> dict[str, MemoryLayer]:
    """The memories of `model` by their names in it. Raises `ValueError` for a model without one."""
    if not (found := memory_layers(model)):
        raise ValueError(f"model must have memories (add_memory), got a {type(model).__name__} without")
    return found


def require_memories(model: nn.Module) -> list[str]:
    """The names of the memories of `model`. Raises `ValueError` for a model without one."""
    if not (known := memory_names(model)):
        raise ValueError(f"model must have memories that add_memory put there, got a {type(model).__name__} without")
    return known


def require_name(known: Sequence[str], name: str | None) -> str:
    """The name; None is that of the only memory. Raises `ValueError` for one that is not among those of a model."""
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        raise ValueError(f"name must be that of one memory, {' or '.join(map(repr, known))}, got {name!r}")
    return name


def kind_of(memory: MemoryLayer) -> str:
    """The name of the class of a memory, also where FSDP (`fully_shard`) has derived one of it."""
    return type(memory).__name__.removeprefix("FSDP")


def _placement(
    model: nn.Module, wrappers: Mapping[str, MemoryWrapper], memories: Mapping[str, MemoryLayer]
) -> MemoryPlacement:
    first, first_wrapper = next(iter(memories.values())), next(iter(wrappers.values()))
    mode = first_wrapper.mode
    for name, memory in memories.items():
        if (type(memory), memory.config, wrappers[name].mode) != (type(first), first.config, mode):
            raise ValueError(
                f"model must have memories of one kind, configuration and mode, as add_memory makes them, got another "
                f"one at {name}"
            )
    bits = {getattr(memory.values, "bits", None) for memory in memories.values()}
    if len(bits) > 1:
        raise ValueError(f"model must have tables of the same bits, got some of {bits}: quantise all of them")
    tables = len({id(memory.values) for memory in memories.values()})
    if tables not in (1, len(memories)):
        raise ValueError(f"model must have memories that share one table or none, got {tables} for {len(memories)}")
    # What cannot be seen: which numbers the blocks had, and whether a single memory was to share its table.
    declared = first_wrapper.placement or getattr(getattr(model, "config", None), "placement", None)
    declared = declared if isinstance(declared, MemoryPlacement) else None
    return MemoryPlacement(
        config=first.config,
        kind=kind_of(first),
        layers=declared.layers if declared and declared.is_numbered else list(memories),
        mode=mode,
        share_values=declared.share_values if declared and len(memories) == 1 else tables < len(memories),
        value_bits=bits.pop(),
    )


def memory_tensors(memories: Mapping[str, MemoryLayer]) -> dict[str, Tensor]:
    """Parameters and buffers of memories, by module; what several memories share is there once, under its first name.

    Buffers that are in no state_dict are there, too: a memory that is built without storage cannot compute them anew.
    """
    seen: set[int] = set()
    found = {}
    for at, memory in memories.items():
        for name, tensor in chain(memory.named_parameters(), memory.named_buffers()):
            # The mark of a table in row mode is the optimizer's.
            if name.rpartition(".")[2] != "row_mark" and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{at}.memory.{name}"] = tensor
    return found


def memory_parameters(model: nn.Module) -> set[nn.Parameter]:
    """All parameters of memories, and their gates; without those of adapters inside of them."""
    found: set[nn.Parameter] = set()
    for memory in memory_layers(model).values():
        found |= set(memory.parameters()) - adapter_parameters(memory)
    for wrapper in modules_of(model, ParallelMemory).values():
        found.add(wrapper.gate)
    return found


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """All parameters that PEFT has put into modules of `model`."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        # Each of its layers says under which names it keeps what it adds; a dotted one is inside of a part.
        for name in getattr(module, "adapter_layer_names", ()):
            part = attrgetter(name)(module)
            if isinstance(part, nn.Parameter):
                found.add(part)
            elif isinstance(part, nn.Module):
                found.update(part.parameters())
        if "adaption_prompt" in module._parameters:  # of AdaptionPrompt, whose modules do not say it
            found.update(module.parameters(recurse=False))
    return found
