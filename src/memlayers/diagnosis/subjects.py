"""The memories of a model, and what stands beside each of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from memlayers.layer import MemoryLayer, memory_layers
from memlayers.optim.row_optimizer import RowOptimizer
from memlayers.values import ValueTable, value_tables


@dataclass(frozen=True)
class Subject:
    """One memory: its parts, and the networks that its output is compared with."""

    name: str
    layer: MemoryLayer
    table: ValueTable
    gate: nn.Parameter | None  # of a memory beside a network; what it adds is multiplied by it
    beside: tuple[nn.Module, ...]  # that network, or else those of other blocks; none: the input is compared with
    is_parallel: bool
    wrapper: nn.Module | None = None  # what stands in the model, where that is not the layer itself

    @property
    def is_active(self) -> bool:
        """Whether it answers (`memlayers.models.set_active`)."""
        return getattr(self.wrapper, "is_active", True)

    @property
    def tables(self) -> list[ValueTable]:
        """Its table first, then others that a subclass may have."""
        return list(dict.fromkeys([self.table, *value_tables(self.layer)]))

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters by their name in it, the gate too; not the companions of tables in row mode."""
        marks = {table.row_mark for table in value_tables(self.layer)}
        for name, parameter in self.layer.named_parameters():
            if parameter not in marks:
                yield name.replace("_orig_mod.", ""), parameter
        if self.gate is not None:
            yield "gate", self.gate


def has_lost_owner(table: ValueTable) -> bool:
    """It is in row mode, and the optimizer that would train it is gone."""
    return table.row_gradient is not None and table.row_gradient.owner() is None


def chosen_rows(table: ValueTable) -> Tensor | None:
    """The slots that its row optimizer may move; None where that is all of them."""
    owner = None if table.row_gradient is None else table.row_gradient.owner()
    chosen = owner.chosen_rows if isinstance(owner, RowOptimizer) else None
    return None if chosen is None else chosen[table]


def find_subjects(model: nn.Module) -> list[Subject]:
    """The memories of `model`, in its order. Raises `ValueError` if it has none."""
    modules = dict(model.named_modules())
    subjects = []
    for name, layer in memory_layers(model).items():
        place = re.sub(r"(\._orig_mod|\.modules_to_save\.\w+)+$", "", name)
        wrapper_name, _, last = place.rpartition(".")
        wrapper = modules.get(wrapper_name) if last == "memory" else None
        base = gate = None
        if wrapper is not None:
            # By its parts, not by its class (memlayers.models.wrappers), which would import transformers.
            place, base, gate = wrapper_name, wrapper._modules.get("base"), wrapper._parameters.get("gate")
        beside = (base,) if base is not None else tuple(_siblings(place, modules))
        table, *_ = value_tables(layer.values)
        subjects.append(Subject(_shown(name), layer, table, gate, beside, base is not None, wrapper))
    if not subjects:
        raise ValueError(
            f"model must have at least one memory (MemoryLayer), got a {type(model).__name__} without: it was not "
            "added, or the model was saved or loaded as a plain class"
        )
    return subjects


def find_trainable(model: nn.Module) -> list[Subject]:
    """Those whose tables can be trained. Raises `ValueError` if there is none."""
    subjects = find_subjects(model)
    trainable = [subject for subject in subjects if not subject.table.untrainable]
    if not trainable:
        raise ValueError(f"what is examined is the training of {subjects[0].name}: {subjects[0].table.untrainable}")
    return trainable


def _siblings(name: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """What stands at the same place in other blocks, and is no memory."""
    pattern = re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))
    for other, module in modules.items():
        is_there = other != name and re.fullmatch(pattern, other) is not None
        if is_there and not memory_layers(module):
            yield module


def _shown(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod") or "(the model itself)"
