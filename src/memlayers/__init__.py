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


# The names of each module, which is imported when one of them is asked for: torch takes seconds, and some need
# transformers.
_NAMES = {
    "experts": "Experts",
    "keys": "FlatKeys Hits NormalisedKeys ProductKeys",
    "storage": "HostMemory MappedFile",
    "config": "MemoryConfig",
    "layer": "MemoryLayer",
    "finetuning": "MemoryPatch SlotCounts memory_diff select_slots slot_rates",
    "memory_plus": "MemoryPlus",
    "optim": "RowAdagrad RowAdam RowSGD",
    "explorer": "SlotTrace explore",
    "usage": "UsageMeter",
    "values": "ValueTable",
    "models": "add_memory disable_memory load_memory quantize_memory save_memory",
    "diagnosis": "doctor",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        if not name.startswith("_") and importlib.util.find_spec(f"memlayers.{name}"):  # as in memlayers.optim.RowAdam
            return importlib.import_module(f"memlayers.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"memlayers.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
