"""How memories get into the modules of a model and out again: what all kinds of models have in common."""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memlayers.layer import MemoryLayer, layer_class
from memlayers.models.masks import install_hooks, remove_hooks
from memlayers.models.modules import tensor_like
from memlayers.models.placement import MemoryPlacement
from memlayers.models.wrappers import (
    DEFAULT_NAME,
    MemoryWrapper,
    ParallelMemory,
    ReplacingMemory,
    base_name,
    find_wrappers,
    first_float_dtype,
)
from memlayers.storage.low_bits import empty_like
from memlayers.values import TablePlace, ValueTable

_DICTS = (dict, OrderedDict)  # of modules, parameters, buffers and hooks


def build_memories(
    model: nn.Module,
    placement: MemoryPlacement,
    names: Sequence[str],
    *,
    kind: type[MemoryLayer] | None = None,
    values: TablePlace | None = None,
    device: torch.device | str | None = None,
) -> list[MemoryLayer]:
    """The memories of `placement`, each in the dtype of its module of `names`; `model` stays as it is.

    Beside float16, in which Adam divides zero by zero, a memory is float32. On `device`; None: on that of its module.
    Tables are in memory, or below the place `values`, by the names of their modules.
    """
    kind = layer_class(placement.kind) if kind is None else kind
    memories: list[MemoryLayer] = []
    for name in names:
        like = tensor_like(model, name)
        table: ValueTable | TablePlace | None = None if values is None else values.below(base_name(model, name))
        if placement.share_values and memories:
            table = memories[0].values
        dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
        where = device or like.device
        if placement.value_bits is not None and table is None:
            of_floats = kind(placement.config, device="meta").values
            table = empty_like(of_floats, placement.value_bits, device=where)
        memory = kind(placement.config, values=table, device=where, dtype=dtype)
        memories.append(memory)
    return memories


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """An error or an interruption inside leaves the modules, hooks, attributes and classes of `model` as they were."""
    before = []
    for module in model.modules():
        contents = [(value, {**value}) for value in vars(module).values() if type(value) in _DICTS]
        before.append((module, type(module), {**vars(module)}, contents))
    try:
        yield
    except BaseException:
        for module, kind, attributes, contents in before:
            for value, content in contents:
                value.clear()
                value.update(content)
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module.__class__ = kind
        raise


def put_in(
    model: nn.Module,
    placement: MemoryPlacement,
    paths: Sequence[str],
    memories: Sequence[MemoryLayer],
    *,
    name: str = DEFAULT_NAME,
    keep_original: bool = False,
) -> list[MemoryWrapper]:
    """Puts `memories` in or beside the modules at `paths`, and hands masks over to them from now on.

    Returns what stands in the model now, in the order of `paths`. An error, as by `setattr` of a module that is not
    to be changed, leaves some memories in the model: see `all_or_nothing`.
    """
    wrappers: list[MemoryWrapper] = []
    for path, memory in zip(paths, memories, strict=True):
        original = model.get_submodule(path)
        wrapper: MemoryWrapper
        if placement.mode == "parallel":
            wrapper = ParallelMemory(original, memory)
        else:
            wrapper = ReplacingMemory(memory, original if keep_original else None)
        wrapper.training = original.training
        wrapper.memory_name = name
        memory.train(original.training)
        _set_module(model, path, wrapper)
        wrappers.append(wrapper)
    _hand_masks_over(model)
    return wrappers


def take_out(model: nn.Module, paths: Sequence[str]) -> None:
    """The inverse of `put_in`: modules whose wrappers stand at `paths`, outer before inner, stand in their places."""
    for path in reversed(paths):
        wrapper: Any = model.get_submodule(path)
        _set_module(model, path, wrapper.original)
    _hand_masks_over(model)


def _hand_masks_over(model: nn.Module) -> None:
    remove_hooks(model)  # whose paths may be others now
    install_hooks(model, [f"{path}.memory" for path, _ in find_wrappers(model)])


@torch.no_grad()
def reset_unloaded(wrapper: MemoryWrapper) -> None:
    """Initialises a memory and its gate as their `reset_parameters` do, but for what came from a checkpoint."""
    memory: Any = wrapper.memory
    if getattr(memory, "_is_hf_initialized", False):
        return
    tensors = {**dict(memory.named_parameters()), **dict(memory.named_buffers())}
    if isinstance(wrapper, ParallelMemory):
        tensors["gate"] = wrapper.gate
    loaded = {name: tensor for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    if len(loaded) < len(tensors):
        kept = {name: tensor.clone() for name, tensor in loaded.items()}
        memory.reset_parameters()
        if isinstance(wrapper, ParallelMemory):
            wrapper.reset_parameters()
        for name, tensor in kept.items():
            loaded[name].copy_(tensor)
    _mark_initialised(wrapper)


def mark_built(wrappers: Sequence[MemoryWrapper]) -> None:
    """Marks what its constructor has initialised; on the meta device weights are yet to be loaded or drawn."""
    for wrapper in wrappers:
        if not next(wrapper.memory.parameters()).is_meta:
            _mark_initialised(wrapper)


def _mark_initialised(wrapper: MemoryWrapper) -> None:
    # For `transformers`, which draws the weights of every module without this mark.
    parts: Any = (wrapper, *wrapper.memory.modules())
    for module in parts:
        module._is_hf_initialized = True


def match_device_and_dtype(wrapper: ReplacingMemory) -> None:
    """Gives a kept module the device of the memory in its place, and the dtype that the model was cast to since."""
    original, like = wrapper.original, next(wrapper.memory.query.parameters())
    if original is None or like.is_meta:  # offloaded: its place says nothing
        return
    original.to(like.device)
    # Parts of a module may differ on purpose: nothing is cast that need not be.
    if wrapper.kept_dtype not in (None, first_float_dtype(original)):
        original.to(wrapper.kept_dtype)


def match_adapters(original: nn.Module, model: nn.Module) -> None:
    """Gives adapters in a kept module, which PEFT does not find, the state of those in `model`: which, on or off."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")  # optional
    if peft is None:
        return
    like = next((part for part in model.modules() if isinstance(part, peft.BaseTunerLayer)), None)
    for part in original.modules():
        if like is not None and isinstance(part, peft.BaseTunerLayer):
            if part.active_adapters != like.active_adapters:
                part.set_adapter(like.active_adapters)
            if part.disable_adapters != like.disable_adapters:
                part.enable_adapters(not like.disable_adapters)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
