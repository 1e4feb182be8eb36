"""Large memory layers for PyTorch: add a billion trainable parameters to a model at almost no compute."""

import importlib
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
    from memlayers.models import add_memory, disable_memory, load_memory, save_memory

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
    "disable_memory",
    "doctor",
    "load_memory",
    "save_memory",
]


# These need transformers, or are tools: each is imported when it is asked for.
_ON_DEMAND = {
    "add_memory": "memlayers.models",
    "disable_memory": "memlayers.models",
    "doctor": "memlayers.diagnosis",
    "load_memory": "memlayers.models",
    "save_memory": "memlayers.models",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
