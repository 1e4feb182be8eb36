"""Large memory layers for PyTorch: add a billion trainable parameters to a model at almost no compute."""

from typing import TYPE_CHECKING, Any

from memlayers.config import MemoryConfig
from memlayers.keys import FlatKeys, Hits, ProductKeys
from memlayers.layer import MemoryLayer
from memlayers.optim import RowAdagrad, RowAdam, RowSGD
from memlayers.usage import UsageMeter
from memlayers.values import ValueTable

if TYPE_CHECKING:
    from memlayers.models import add_memory

__version__ = "0.1.0"

__all__ = [
    "FlatKeys",
    "Hits",
    "MemoryConfig",
    "MemoryLayer",
    "ProductKeys",
    "RowAdagrad",
    "RowAdam",
    "RowSGD",
    "UsageMeter",
    "ValueTable",
    "add_memory",
]


def __getattr__(name: str) -> Any:
    # The only public name that needs transformers, which takes seconds to import.
    if name == "add_memory":
        from memlayers.models import add_memory

        return add_memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
