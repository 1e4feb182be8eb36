"""How memories get into the modules of a model, and out again: what all kinds of models have in common."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.layer import MemoryLayer, layer_class
from memlayers.models.masks import install_hooks
from memlayers.models.placement import MemoryPlacement
from memlayers.models.wrappers import MemoryWrapper, ParallelMemory, ReplacingMemory


def build_memories(
    model: nn.Module,
    placement: MemoryPlacement,
    names: Sequence[str],
    *,
    kind: type[MemoryLayer] | None = None,
    device: torch.device | str | None = None,
) -> list[MemoryLayer]:
    """The memories of `placement`, each in the dtype of its module of `names`; `model` stays as it is.

    Beside float16, in which Adam divides zero by zero, a memory is float32. On `device`; None: on that of its module.
    """
    kind = layer_class(placement.kind) if kind is None else kind
    memories: list[MemoryLayer] = []
    for name in names:
        like = tensor_like(model, name)
        table = memories[0].values if placement.share_values and memories else None
        dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
        memory = kind(placement.config, values=table, device=device or like.device, dtype=dtype)
        memories.append(memory)
    return memories


def install(
    model: nn.Module,
    placement: MemoryPlacement,
    names: Sequence[str],
    memories: Sequence[MemoryLayer],
    *,
    keep_original: bool = False,
) -> None:
    """Puts `memories` in or beside the modules of `names`, and hands masks over to them. Raises nothing."""
    for name, memory in zip(names, memories, strict=True):
        original = model.get_submodule(name)
        wrapper: MemoryWrapper
        if placement.mode == "parallel":
            wrapper = ParallelMemory(original, memory)
        else:
            wrapper = ReplacingMemory(memory, original if keep_original else None)
        if not next(memory.parameters()).is_meta:
            _mark_initialised(wrapper)  # by its constructor; on the meta device weights are yet to be loaded or drawn
        wrapper.training = original.training
        memory.train(original.training)
        set_module(model, name, wrapper)
    install_hooks(model, [f"{name}.memory" for name in names])


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the one that is there."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def put_beside(original: nn.Module, memory: MemoryLayer) -> None:
    """Gives a module the device of the memory that was built like it, and its dtype if that is another one now."""
    like = next(memory.query.parameters())
    if like.is_meta:  # offloaded: its place says nothing
        return
    original.to(like.device)
    own = next((tensor for tensor in original.parameters() if tensor.is_floating_point()), like)
    if own.dtype != like.dtype:  # parts of a module may differ on purpose: nothing is cast that need not be
        original.to(like.dtype)


def reset_what_was_not_loaded(wrapper: MemoryWrapper) -> None:
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


def _mark_initialised(wrapper: MemoryWrapper) -> None:
    # For `transformers`, which draws the weights of every module without this mark.
    parts: Any = (wrapper, *wrapper.memory.modules())
    for module in parts:
        module._is_hf_initialized = True


def tensor_like(model: nn.Module, name: str) -> Tensor:
    """A tensor on the device and in the dtype that a memory at the module `name` takes."""
    module = model.get_submodule(name)
    for tensor in itertools.chain(module.parameters(), model.parameters()):
        if tensor.is_floating_point():  # quantised weights are not
            return tensor
    return torch.empty(())
