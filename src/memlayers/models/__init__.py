"""Memories in existing models. Importing this registers the classes with the Auto classes of `transformers`.

Read `add` first: what people call, and `active`. Below, each imports those before it only: `placement` (where memories
go), `calls` (what calls in progress say, and which memories are off), `masks` (how padding reaches memories),
`wrappers` (what stands in the model), `modules` (what is in a model), `targets` (which modules can take one), `install`
(put in, take out), `identity` (is it the same base), `folder` (the format on disk), `storage` (memory <-> folder),
`classes` (what `transformers` must know; `auto_classes` finds its Auto classes), `quantise` (tables of few bits).
`adapters` (what PEFT must know), `summary`, `presets`, `checkpoints` and `carriers` stand beside it.
"""

from typing import TYPE_CHECKING, Any

from memlayers.extras import require_extra

require_extra("lm", "memlayers.models", "transformers", "safetensors", "huggingface_hub")

from memlayers.layer import memory_layers
from memlayers.models import adapters as adapters  # changes PEFT, where that is imported
from memlayers.models import classes
from memlayers.models.active import disable_memory, named_memories, set_active
from memlayers.models.add import add_memory, freeze_base, load_memory, remove_memory, save_memory
from memlayers.models.carriers import causal_lm
from memlayers.models.placement import MemoryPlacement
from memlayers.models.presets import memory_preset
from memlayers.models.quantise import quantize_memory
from memlayers.models.summary import MemorySummary, memory_summary
from memlayers.models.targets import default_layer, find_layers
from memlayers.models.wrappers import MemoryWrapper, ParallelMemory, ReplacingMemory

if TYPE_CHECKING:
    from memlayers.models.checkpoints import SaveMemory

classes.register()

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
    "disable_memory",
    "find_layers",
    "freeze_base",
    "load_memory",
    "memory_layers",
    "memory_preset",
    "memory_summary",
    "named_memories",
    "quantize_memory",
    "remove_memory",
    "save_memory",
    "set_active",
]


def __getattr__(name: str) -> Any:
    if name == "SaveMemory":  # imported late: the Trainer that comes with it takes seconds
        from memlayers.models.checkpoints import SaveMemory  # importing Trainer takes a second

        return SaveMemory
    return getattr(classes, name)  # MemoryLlamaForCausalLM and the like
