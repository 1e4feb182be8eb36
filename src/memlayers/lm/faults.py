"""What stops a run that was set up well, and how the first thing that went wrong is found."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.checks import CommandFailed
from memlayers.listening import floating
from memlayers.values import ValueTable, value_tables

ELEMENTS_AT_ONCE = 1 << 24


class TrainingFault(CommandFailed):
    """A run cannot go on: its numbers are not finite any more, or the machine has no room for it."""


class Diverged(TrainingFault):
    """The numbers of a run are not finite any more: so they will be at every attempt."""


def bad_parameter(model: nn.Module, *, buffers: bool = True) -> str | None:
    """The first parameter (or buffer) of the model that is not finite, and where; None if all are."""
    tables = {table.weight: table for table in value_tables(model)}
    for name, tensor in [*model.named_parameters(), *(model.named_buffers() if buffers else ())]:
        table = tables.get(tensor)
        slots = None if table is None else table.changed_slots()
        if (found := _bad_elements(name, tensor, slots, is_table=table is not None)) is not None:
            return found
    return None


def bad_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The first tensor of the optimizer's state that is not finite; None if all are."""
    changed = {table.weight: table.changed_slots() for table in value_tables(model)}
    for name, parameter in model.named_parameters():
        slots = changed.get(parameter)
        for what, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and (found := _bad_elements(f"{what} of {name}", value, slots)) is not None:
                return found
    return None


def bad_gradient(model: nn.Module) -> str | None:
    """The gradient that backward spoiled first, which is the last one of the model; None if all are finite."""
    found = None
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.grad is not None:
                found = _bad_elements(f"the gradient of {prefix}{name}", parameter.grad) or found
        rows = module.row_gradient if isinstance(module, ValueTable) else None
        if rows is not None and not bool(rows.is_finite()):
            found = f"the gradient of rows of {prefix}weight"
    return found


def rows_are_finite(model: nn.Module) -> bool:
    """Whether all recorded row gradients are."""
    gradients = [table.row_gradient.is_finite() for table in value_tables(model) if table.row_gradient is not None]
    return bool(torch.stack(gradients).all()) if gradients else True


def bad_output(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The first module whose output is not finite when `run` calls the model; None if there is none."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in floating(output)):
                found.append(f"the output of {name} ({type(module).__name__})")

        return hook

    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if name and (isinstance(module, ValueTable) or not any(module.children()))
    ]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _bad_elements(name: str, tensor: Tensor, slots: Tensor | None = None, *, is_table: bool = False) -> str | None:
    """slots: Of the rows that may have changed; None: of all."""
    if not tensor.is_floating_point():
        return None
    bad, first = 0, None
    rows = tensor.detach().reshape(len(tensor), -1) if tensor.ndim else tensor.detach().reshape(1, 1)
    step = max(1, ELEMENTS_AT_ONCE // max(1, rows.shape[1]))  # so that a large table needs no large mask
    for start in range(0, len(rows) if slots is None else len(slots), step):
        some = slice(start, start + step) if slots is None else slots[start : start + step]
        finite = torch.isfinite(rows[some])
        if not bool(finite.all()):
            row_is_bad = ~finite.all(1)
            if first is None:
                first = int(row_is_bad.nonzero()[0])
                first = start + first if slots is None else int(slots[start + first])
            bad += int(row_is_bad.sum()) if is_table else int((~finite).sum())
    if first is None:
        return None
    if is_table:
        return f"{name} ({bad:,} of {len(rows):,} rows, the first is {first})"
    return f"{name} ({bad:,} of {tensor.numel():,} elements)"
