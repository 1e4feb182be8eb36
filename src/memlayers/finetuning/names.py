"""The names by which files know the value tables of a model."""

from torch import nn

from memlayers.layer import MemoryLayer, memory_layers
from memlayers.values import ValueTable, modules_of

_AROUND = ("_orig_mod", "base_layer")  # parts of a name that torch.compile and PEFT put inside of it
_BEFORE = ("module.", "base_model.model.")  # and DistributedDataParallel and PEFT before it


def plain_name(name: str) -> str:
    """A name as it is where nothing is around the model."""
    name = ".".join(part for part in name.split(".") if part not in _AROUND)
    for prefix in _BEFORE:
        name = name.removeprefix(prefix)
    return name


def tables_by_name(model: nn.Module) -> dict[str, ValueTable]:
    """The value tables of a model, each once. Raises `ValueError` for a model without."""
    tables = {plain_name(name): table for name, table in modules_of(model, ValueTable).items()}
    if not tables:
        raise ValueError(f"model must have at least one memory, got a {type(model).__name__} without")
    return tables


def layers_by_table(model: nn.Module) -> dict[str, list[MemoryLayer]]:
    """The memories of a model by the name of the table that they read. Raises `ValueError` for a model without."""
    names = {table: name for name, table in tables_by_name(model).items()}
    layers: dict[str, list[MemoryLayer]] = {}
    for layer in memory_layers(model).values():
        layers.setdefault(names[layer.values], []).append(layer)
    return layers
