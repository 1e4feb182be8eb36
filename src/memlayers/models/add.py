"""add_memory and remove_memory: memories in an existing model, and the model as it was."""

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from memlayers.config import MemoryConfig
from memlayers.layer import MemoryLayer, memory_layers
from memlayers.models.classes import config_with_memory, with_memory
from memlayers.models.identity import forget_base, identity_of, record_base, recorded_base
from memlayers.models.install import build_memories, install, put_beside, set_module
from memlayers.models.masks import remove_hooks
from memlayers.models.mixin import MemoryMixin
from memlayers.models.placement import MemoryPlacement
from memlayers.models.suitable import require_suitable
from memlayers.models.targets import Layers, choose, names_of
from memlayers.models.trainable import adapter_parameters
from memlayers.models.unwrapping import unwrap
from memlayers.models.wrappers import Mode, find_wrappers

Model = TypeVar("Model", bound=nn.Module)


def add_memory(
    model: Model,
    config: MemoryConfig,
    layers: Layers | None = None,
    *,
    mode: Mode = "replace",
    kind: type[MemoryLayer] = MemoryLayer,
    share_values: bool = False,
    keep_original: bool = False,
) -> Model:
    """Puts memories into a model, in place: m(x) instead of a feed-forward network f(x), or f(x) + gate * m(x).

    A model of `transformers` also changes its class, LlamaForCausalLM to MemoryLlamaForCausalLM: a plain class would be
    saved and loaded back with random feed-forward networks, silently. Create the optimizer afterwards: there are new
    parameters, and in "replace" mode the replaced modules' are gone.

    Args:
        model: any module; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too.
        config: what each memory is; ``config.dim`` is the width of what the modules are given and return.
        layers: where. Blocks counted from 1, for models of `transformers` whose blocks have a feed-forward module
            ``mlp``; or names of modules; or regular expressions that match whole names. None: the block at three
            quarters of the depth (`default_layer`).
        mode: "replace" puts a memory in place of each module (paper, section 3.3). "parallel" keeps the module and
            adds the memory behind a gate that begins at zero: the outputs are bit for bit those of `model`.
        kind: the class of the memories, `MemoryLayer` or one derived from it (`MemoryPlus`).
        share_values: one table of values for all of them; queries and keys stay their own.
        keep_original: in "replace" mode, keep the replaced modules for `remove_memory`, outside of the model: they are
            in no state_dict and no optimizer.

    Returns:
        `model` itself. Memories stand on the device, in the dtype and in the mode (train or eval) of their module;
        beside float16 they are float32.

    Raises:
        ValueError: a layer that `model` does not have, named twice, or none; ``config.dim`` is another width; a model
            that has memories already. The model is then as it was.
    """
    inner = unwrap(model)
    if memories := memory_layers(inner):
        raise ValueError(f"model must have no memory yet, got one with {', '.join(memories)}")
    if not (isinstance(kind, type) and issubclass(kind, MemoryLayer)):
        raise ValueError(f"kind must be MemoryLayer or a class derived from it, got {kind!r}")
    placement = MemoryPlacement(
        config=config, kind=kind.__name__, layers=choose(inner, layers), mode=mode, share_values=share_values
    )
    if not isinstance(keep_original, bool):
        raise ValueError(f"keep_original must be True or False, got {keep_original!r}")
    names = names_of(inner, placement)
    for name in names:
        require_suitable(inner, name, placement)
    attach(inner, placement, names, build_memories(inner, placement, names, kind=kind), keep_original=keep_original)
    return model


def attach(
    model: nn.Module,
    placement: MemoryPlacement,
    names: list[str],
    memories: list[MemoryLayer],
    *,
    keep_original: bool = False,
) -> None:
    """Puts finished memories into a model that was unwrapped. What fails leaves the model as it was."""
    base = identity_of(model, without=names if placement.mode == "replace" else [])
    originals = {name: model.get_submodule(name) for name in names}
    try:
        install(model, placement, names, memories, keep_original=keep_original)
        record_base(model, base)
        if isinstance(model, PreTrainedModel):
            _declare(model, placement)
    except BaseException:
        _detach(model, originals)
        raise


def _declare(model: PreTrainedModel, placement: MemoryPlacement) -> None:
    """Gives a model of `transformers` the class and the configuration that know of its memories."""
    plain: Any = type(model)
    memory_class = with_memory(plain)
    # All that it says, also what is in no file; configurations of parts stay those that the parts have.
    config: Any = copy.copy(model.config)
    config.__class__ = config_with_memory(config.__class__)
    config.set_placement(placement)
    config.set_model_class(memory_class.__name__, memory_class.auto_class_name)
    model.__class__ = memory_class
    _exchange_config(model, config)
    assert isinstance(model, MemoryMixin)
    model.declare_memories()
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def remove_memory(model: Model) -> Model:
    """The inverse of `add_memory`, in place: the model gives the outputs of the base model again, bit for bit.

    Removes memories added in "parallel" mode, or in "replace" mode with ``keep_original=True``; a kept module takes the
    device of the memory in its place, and its dtype if the model was cast since. What was frozen stays frozen. Build
    the optimizer anew: the memories' parameters are gone.

    Raises:
        ValueError: a model without memories, or one whose replaced modules were not kept, or kept with adapters of PEFT
            that the model has merged since. The model is then as it was.
    """
    inner = unwrap(model)
    wrappers = dict(find_wrappers(inner))
    if not wrappers:
        raise ValueError(f"model must have memories that add_memory put there, got a {type(inner).__name__} without")
    originals = {name: wrapper.original for name, wrapper in wrappers.items()}
    if lost := [name for name, original in originals.items() if original is None]:
        raise ValueError(
            f"model must still have the modules that its memories replaced, got one that has not kept "
            f"{', '.join(lost)}: use add_memory(..., keep_original=True), or mode='parallel'"
        )
    has_adapters = bool(adapter_parameters(inner))
    for name, original in originals.items():
        if original is not None and not has_adapters and adapter_parameters(original):
            raise ValueError(
                f"model must have no adapters in the modules that its memories replaced, got some in {name} that were "
                f"not merged with the others: call remove_memory first, then merge"
            )
    for wrapper in wrappers.values():
        if wrapper.mode == "replace" and wrapper.original is not None:
            put_beside(wrapper.original, wrapper.memory)
            wrapper.original.train(wrapper.training)
    _detach(inner, {name: original for name, original in originals.items() if original is not None})
    return model


def _detach(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Puts the modules of the base back, and the class and the configuration that the model had."""
    recorded = recorded_base(model)
    if isinstance(model, MemoryMixin):
        model.undeclare_memories()
    remove_hooks(model)
    forget_base(model)
    for name, original in originals.items():
        set_module(model, name, original)
    if isinstance(model, MemoryMixin):
        plain: Any = model.config.without_memory()
        if plain.architectures == [type(model).__name__]:
            plain.architectures = [model.plain_class.__name__]
        # Not where base and memory came from, which is no base.
        model.name_or_path = plain._name_or_path = "" if recorded is None else recorded.name_or_path
        _exchange_config(model, plain)
        model.__class__ = model.plain_class  # type: ignore[assignment]
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _exchange_config(model: PreTrainedModel, config: Any) -> None:
    # One object is shared by the model and its parts. It is not changed: the caller may build other models from it.
    before = model.config
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = config
