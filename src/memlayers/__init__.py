"""Large memory layers for PyTorch: add a billion trainable parameters to a model at almost no compute."""

from typing import TYPE_CHECKING, Any

from memlayers.config import MemoryConfig
from memlayers.keys import FlatKeys, Hits, NormalisedKeys, ProductKeys
from memlayers.layer import MemoryLayer
from memlayers.memory_plus import MemoryPlus
from memlayers.optim import RowAdagrad, RowAdam, RowSGD
from memlayers.usage import UsageMeter
from memlayers.values import ValueTable
from memlayers.version import __version__ as __version__

if TYPE_CHECKING:
    from memlayers.diagnosis import doctor
    from memlayers.models import add_memory, load_memory, save_memory

__all__ = [
    "FlatKeys",
    "Hits",
    "MemoryConfig",
    "MemoryLayer",
    "MemoryPlus",
    "NormalisedKeys",
    "ProductKeys",
    "RowAdagrad",
    "RowAdam",
    "RowSGD",
    "UsageMeter",
    "ValueTable",
    "add_memory",
    "doctor",
    "load_memory",
    "save_memory",
]


def __getattr__(name: str) -> Any:
    # The public names that need transformers, which takes seconds to import.
    if name in ("add_memory", "load_memory", "save_memory"):
        from memlayers import models

        return getattr(models, name)
    if name == "doctor":  # a tool: imported when it is used
        from memlayers.diagnosis import doctor

        return doctor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
