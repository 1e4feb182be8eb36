"""memory_summary: how many parameters a model has and trains, by part, and what bytes they, their gradients and an
optimizer take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.models.modules import adapter_parameters, memories_in, memory_parameters, unwrap
from memlayers.optim.memory_adamw import MemoryAdamW
from memlayers.optim.row_optimizer import RowOptimizer
from memlayers.sizes import nominal_bytes, size_text
from memlayers.values import ValueTable, value_tables

_COLUMNS = ("", "parameters", "trainable", "weights", "gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """The parameters of one part of a model."""

    parameters: int  # how many numbers
    trainable: int  # those that require gradients
    weight_bytes: int  # in the dtypes that they have
    gradient_bytes: int  # of dense gradients; a table in row mode has none
    optimizer_bytes: int | None  # what an optimizer keeps between steps; None: not known


@dataclass(frozen=True, kw_only=True)
class MemorySummary:
    """What `memory_summary` found; as a text it is a table."""

    parts: dict[str, PartSummary]  # "base", "adapters" (of PEFT, if any), "query", "keys", "values", "gate and output"
    optimizer: str | None  # the class of the optimizer; None: none was given
    row_tables: int  # tables whose gradients are recorded by rows
    tables: int

    @property
    def total(self) -> PartSummary:
        """All parts together."""
        total: dict[str, Any] = {}
        for name in PartSummary.__annotations__:
            figures = [vars(part)[name] for part in self.parts.values()]
            total[name] = None if None in figures else sum(figures)
        return PartSummary(**total)

    def __str__(self) -> str:
        rows = [_COLUMNS, *(_row(name, part) for name, part in [*self.parts.items(), ("total", self.total)])]
        if self.optimizer is None:
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        total = self.total
        lines.append(f"trainable: {100 * total.trainable / max(1, total.parameters):.2f} % of the parameters")
        if self.row_tables:
            which = "" if self.row_tables == self.tables else f" ({self.row_tables} of {self.tables} tables)"
            lines.append(f"values{which}: gradients are recorded for the rows that were read, none of a whole table")
        if self.optimizer is not None:
            lines.append(f"optimizer: {self.optimizer}")
        return "\n".join(lines)


def memory_summary(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> MemorySummary:
    """Counts parameters by part, and the bytes of weights, gradients and optimizer state: ``print(memory_summary(m))``.

    A table that several memories share counts once. Activations are not counted. The state is what `optimizer` holds;
    of a parameter that it has not stepped yet, what it is going to hold, which is known of `MemoryAdamW`, of row
    optimizers and of torch's Adam and AdamW. Raises `ValueError` for a model without memories.
    """
    inner = unwrap(model)
    tables = value_tables(inner)
    parts = _parts(inner, tables)
    while isinstance(around := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):  # of accelerate
        optimizer = around
    in_row_mode = {table.weight for table in tables if table.row_gradient is not None}
    summaries = {}
    for name, parameters in parts.items():
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        held = [*trainable, *(table.row_mark for table in tables)] if name == "values" else trainable
        unlisted = [table for table in tables if "weight" not in table._parameters and name == "values"]
        summaries[name] = PartSummary(
            parameters=sum(parameter.numel() for parameter in parameters) + sum(one.shape.numel() for one in unlisted),
            trainable=sum(parameter.numel() for parameter in trainable),
            weight_bytes=nominal_bytes([*parameters, *(part for table in unlisted for part in table.stored)]),
            gradient_bytes=nominal_bytes(parameter for parameter in trainable if parameter not in in_row_mode),
            optimizer_bytes=None if optimizer is None else _state_bytes(optimizer, held),
        )
    return MemorySummary(
        parts=summaries,
        optimizer=None if optimizer is None else type(optimizer).__name__,
        row_tables=len(in_row_mode),
        tables=len(tables),
    )


def _parts(model: nn.Module, tables: Sequence[ValueTable]) -> dict[str, list[nn.Parameter]]:
    """Each parameter in one part, in the order of the model."""
    memories = memories_in(model).values()
    place: dict[nn.Parameter, str] = dict.fromkeys(memory_parameters(model), "gate and output")
    for memory in memories:
        place |= dict.fromkeys(memory.query.parameters(), "query")
        place |= dict.fromkeys(memory.keys.parameters(), "keys")
        place |= dict.fromkeys(memory.values.parameters(), "values")
    place |= dict.fromkeys(adapters := adapter_parameters(model), "adapters")
    names = ("base", *(["adapters"] if adapters else []), "query", "keys", "values", "gate and output")
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    marks = {table.row_mark for table in tables}  # companions, which are no weights
    for parameter in model.parameters():
        if parameter not in marks:
            parts[place.get(parameter, "base")].append(parameter)
    return parts


def _state_bytes(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> int | None:
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    total = 0
    for parameter in parameters:
        if parameter not in groups:
            continue
        state: dict[str, Any] | None = optimizer.state.get(parameter)
        if not state and (state := _state_to_come(optimizer, parameter, groups[parameter])) is None:
            return None
        total += nominal_bytes(value for value in state.values() if isinstance(value, Tensor))
    return total


def _state_to_come(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, group: dict[str, Any]
) -> dict[str, Any] | None:
    """The state after the first step, of tensors that take no memory; None for an optimizer that is not known."""
    if isinstance(optimizer, MemoryAdamW):
        (part,) = (part for part in optimizer._parts() if any(group is own for own in part.param_groups))
        return _state_to_come(part, parameter, group)
    like = torch.empty_like(parameter, device="meta")
    if isinstance(optimizer, RowOptimizer):
        return optimizer.new_state(like, group)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        moments = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
        return {"step": torch.empty((), device="meta"), **{name: torch.empty_like(like) for name in moments}}
    return None


def _row(name: str, part: PartSummary) -> tuple[str, ...]:
    state = "unknown" if part.optimizer_bytes is None else size_text(part.optimizer_bytes)
    sizes = size_text(part.weight_bytes), size_text(part.gradient_bytes), state
    return (name, f"{part.parameters:,}", f"{part.trainable:,}", *sizes)
