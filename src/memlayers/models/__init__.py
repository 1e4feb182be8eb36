"""Memories in existing models. Importing this registers the classes with the Auto classes of `transformers`."""

from typing import TYPE_CHECKING, Any

from memlayers.layer import memory_layers
from memlayers.models.add import add_memory, remove_memory
from memlayers.models.carriers import causal_lm
from memlayers.models.classes import register
from memlayers.models.loading import load_memory
from memlayers.models.placement import MemoryPlacement
from memlayers.models.presets import memory_preset
from memlayers.models.saving import save_memory
from memlayers.models.summary import MemorySummary, memory_summary
from memlayers.models.targets import default_layer
from memlayers.models.trainable import freeze_base
from memlayers.models.wrappers import MemoryWrapper, ParallelMemory, ReplacingMemory

if TYPE_CHECKING:
    from memlayers.models.callback import SaveMemory

register()

__all__ = [
    "MemoryPlacement",
    "MemorySummary",
    "MemoryWrapper",
    "ParallelMemory",
    "ReplacingMemory",
    "SaveMemory",
    "add_memory",
    "causal_lm",
    "default_layer",
    "freeze_base",
    "load_memory",
    "memory_layers",
    "memory_preset",
    "memory_summary",
    "remove_memory",
    "save_memory",
]


def __getattr__(name: str) -> Any:
    if name == "SaveMemory":  # what Trainer needs comes with it
        from memlayers.models.callback import SaveMemory

        return SaveMemory
    # MemoryLlamaForCausalLM and the like.
    from memlayers.models import classes

    return getattr(classes, name)
