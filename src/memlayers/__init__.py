"""Large memory layers for PyTorch: add a billion trainable parameters to a model at almost no compute."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from memlayers.version import __version__ as __version__

if TYPE_CHECKING:
    from memlayers.config import MemoryConfig
    from memlayers.diagnosis import doctor
    from memlayers.experts import Experts
    from memlayers.explorer import SlotTrace, explore
    from memlayers.finetuning import MemoryPatch, SlotCounts, memory_diff, select_slots, slot_rates
    from memlayers.keys import FlatKeys, Hits, NormalisedKeys, ProductKeys
    from memlayers.layer import MemoryLayer
    from memlayers.memory_plus import MemoryPlus
    from memlayers.models import add_memory, disable_memory, load_memory, quantize_memory, save_memory
    from memlayers.optim import RowAdagrad, RowAdam, RowSGD
    from memlayers.storage import HostMemory, MappedFile
    from memlayers.usage import UsageMeter
    from memlayers.values import ValueTable

__all__ = [
    "Experts",
    "FlatKeys",
    "Hits",
    "HostMemory",
    "MappedFile",
    "MemoryConfig",
    "MemoryLayer",
    "MemoryPatch",
    "MemoryPlus",
    "NormalisedKeys",
    "ProductKeys",
    "RowAdagrad",
    "RowAdam",
    "RowSGD",
    "SlotCounts",
    "SlotTrace",
    "UsageMeter",
    "ValueTable",
    "add_memory",
    "disable_memory",
    "doctor",
    "explore",
    "load_memory",
    "memory_diff",
    "quantize_memory",
    "save_memory",
    "select_slots",
    "slot_rates",
]


# Where each name comes from once it is asked for: torch takes seconds to import, and some need transformers.
_ON_DEMAND = {
    "Experts": "experts",
    "FlatKeys": "keys",
    "Hits": "keys",
    "HostMemory": "storage",
    "MappedFile": "storage",
    "MemoryConfig": "config",
    "MemoryLayer": "layer",
    "MemoryPatch": "finetuning",
    "MemoryPlus": "memory_plus",
    "NormalisedKeys": "keys",
    "ProductKeys": "keys",
    "RowAdagrad": "optim",
    "RowAdam": "optim",
    "RowSGD": "optim",
    "SlotCounts": "finetuning",
    "SlotTrace": "explorer",
    "UsageMeter": "usage",
    "ValueTable": "values",
    "add_memory": "models",
    "disable_memory": "models",
    "doctor": "diagnosis",
    "explore": "explorer",
    "load_memory": "models",
    "memory_diff": "finetuning",
    "quantize_memory": "models",
    "save_memory": "models",
    "select_slots": "finetuning",
    "slot_rates": "finetuning",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        if not name.startswith("_") and importlib.util.find_spec(f"memlayers.{name}"):  # as in memlayers.optim.RowAdam
            return importlib.import_module(f"memlayers.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"memlayers.{_ON_DEMAND[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
