"""add_memory: puts memories into an existing Hugging Face causal LM."""

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from memlayers.config import MemoryConfig
from memlayers.layer import MemoryLayer
from memlayers.models.classes import WITH_MEMORY
from memlayers.models.configs import MemoryConfigMixin
from memlayers.models.mixin import MemoryMixin, build_memories
from memlayers.models.placement import MemoryPlacement

Model = TypeVar("Model", bound=PreTrainedModel)


def add_memory(
    model: Model, config: MemoryConfig, layers: Sequence[int] | None = None, *, share_values: bool = False
) -> Model:
    """Replaces the feed-forward network of some blocks by a memory, in place: x + m(x) where it was x + FFN(x).

    The model also changes its class, GPT2LMHeadModel to MemoryGPT2LMHeadModel or LlamaForCausalLM to
    MemoryLlamaForCausalLM: a plain class would be saved and loaded back with random feed-forward networks, silently.
    Create the optimizer afterwards: the replaced networks' parameters are gone, new ones have come.

    Args:
        model: a `transformers` GPT2LMHeadModel or LlamaForCausalLM.
        config: what each memory is; ``config.dim`` is the model's hidden size.
        layers: blocks to change, counted from 1. None: one, at three quarters of the depth (`default_layer`).
        share_values: one table of values for all of them; queries and keys stay their own.

    Returns:
        `model` itself. Memories stand on the device, in the dtype and in the mode (train or eval) of their block.

    Raises:
        ValueError: a layer outside 1..N, named twice, or none; ``config.dim`` is another size; a class of model without
            support; a model that has memories already. The model is then as it was.
    """
    with_memory = WITH_MEMORY.get(type(model))
    if with_memory is None and not isinstance(model, MemoryMixin):
        supported = ", ".join(plain.__name__ for plain in WITH_MEMORY)
        raise ValueError(f"model must be one of {supported} (transformers), got {type(model).__name__}")
    if with_memory is None or memory_layers(model):
        raise ValueError(f"model must have no memory yet, got one with {', '.join(memory_layers(model))}")
    plain_config = model.config
    num_blocks = plain_config.num_hidden_layers
    chosen = (default_layer(num_blocks),) if layers is None else layers
    placement = MemoryPlacement(config=config, layers=chosen, share_values=share_values)
    memory_config = _with_section(plain_config, with_memory, placement)
    memories = build_memories(getattr(model.base_model, with_memory.blocks_name), placement)

    # Nothing below fails.
    model.__class__ = with_memory  # type: ignore[assignment]
    for module in model.modules():
        # One object is shared by the model and its parts. It is not changed: the caller may build other models from it.
        if getattr(module, "config", None) is plain_config:
            module.config = memory_config  # type: ignore[assignment]
    assert isinstance(model, MemoryMixin)
    model.install_memories(placement, memories)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def default_layer(num_blocks: int) -> int:
    """The block for a single memory, counted from 1: three quarters of the depth, rounded up.

    Middle-to-late is best in the paper's table 3 (5 of 6, then 4; the last is worse again), and 3 of 4 was good in our
    first runs: this gives 3 of 4, 5 of 6, 9 of 12, 18 of 24.
    """
    return math.ceil(num_blocks * 3 / 4)


def memory_layers(model: nn.Module) -> dict[str, MemoryLayer]:
    """The memories of `model` by their name in it, in the order in which a token meets them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MemoryLayer)}


def _with_section(
    plain_config: PreTrainedConfig, with_memory: type[MemoryMixin], placement: MemoryPlacement
) -> MemoryConfigMixin:
    """All that `plain_config` says (also what is in no file: the choice of attention), and the section ``memory``."""
    config = copy.deepcopy(plain_config)
    config.__class__ = with_memory.config_class  # type: ignore[assignment]
    assert isinstance(config, MemoryConfigMixin)
    config.set_placement(placement)
    return config
