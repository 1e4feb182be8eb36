"""An examination leaves a model and its optimizers as they were, bit for bit, whatever happens inside.

What is copied: buffers, the small parameters of memories and their optimizer state; of a table in row mode only the
rows that a step may write (and their state); of a dense one all of it, with its state, as a dense optimizer may write
to every row. Gradients are not copied: those that are pending are taken off and put back.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memlayers.diagnosis.groups import all_parts, is_at_zero
from memlayers.diagnosis.subjects import Subject
from memlayers.listening import Listener
from memlayers.optim.row_optimizer import RowOptimizer
from memlayers.storage import MappedTable
from memlayers.torch_private import hooks_after_accumulation, preserved_versions
from memlayers.values import ValueTable, value_tables


class Undo(ExitStack):
    """Puts back on leaving, last one first, what its methods were told of."""

    def attribute(self, holder: object, name: str, value: Any) -> None:
        """Sets an attribute until then."""
        self.callback(setattr, holder, name, getattr(holder, name))
        setattr(holder, name, value)

    def entries(self, held: MutableMapping[Any, Any]) -> None:
        """The entries of a mapping, not what is in them."""
        self.callback(_refill, held, dict(held))

    def contents(self, tensor: Tensor, rows: Tensor | None = None) -> Tensor:
        """The contents of a tensor, or of some rows of it; returns the copy."""
        copy = tensor.detach().clone() if rows is None else tensor.detach()[rows]
        self.callback(_write, tensor, rows, copy)
        return copy


def _refill(held: MutableMapping[Any, Any], before: Mapping[Any, Any]) -> None:
    held.clear()
    held.update(before)


@torch.no_grad()
def _write(tensor: Tensor, rows: Tensor | None, copy: Tensor) -> None:
    if rows is None:
        tensor.copy_(copy)
    else:
        tensor[rows] = copy


@contextmanager
def untouched(model: nn.Module, subjects: Sequence[Subject]) -> Iterator[None]:
    """Modes, buffers, gradients, random state, memories' parameters but tables, and who listens to them."""
    # Contents come back, and so do the counters of their versions: a forward pass that waits for its backward is not
    # told that something has changed.
    in_place = [one for one in (*model.parameters(), *model.buffers()) if not one.is_inference()]
    with preserved_versions(in_place), Undo() as undo:
        _keep_random_state(undo)
        tables = value_tables(model)
        for module in model.modules():
            undo.attribute(module, "training", module.training)
            undo.attribute(module, "_non_persistent_buffers_set", set(module._non_persistent_buffers_set))
            undo.entries(module._buffers)
        for buffer in model.buffers():
            if not _is_expanded(buffer):  # nobody can write to one
                undo.contents(buffer)
        for table in tables:
            if table.row_gradient is not None:
                undo.enter_context(table.row_gradient.set_aside())
        for parameter in model.parameters():
            undo.attribute(parameter, "grad", None)
            undo.attribute(parameter, "requires_grad", parameter.requires_grad)
            hooks = hooks_after_accumulation(parameter)
            if hooks:  # no optimizer that steps in the backward pass does so
                undo.entries(hooks)
                hooks.clear()
        weights = {table.weight for subject in subjects for table in subject.tables}
        for parameter in {own: None for subject in subjects for _, own in subject.parameters() if own not in weights}:
            undo.contents(parameter)
        for module in {part: None for one in subjects for part in (*one.layer.modules(), *one.beside)}:
            # The handles of hooks refer to the mapping that comes back.
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                undo.attribute(module, name, _without_listeners(getattr(module, name)))
        yield


def _keep_random_state(undo: Undo) -> None:
    undo.callback(random.setstate, random.getstate())
    undo.callback(np.random.set_state, np.random.get_state())
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():
        undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _without_listeners(hooks: Mapping[int, Callable[..., Any]]) -> OrderedDict[int, Callable[..., Any]]:
    heard = ((key, hook) for key, hook in hooks.items() if not isinstance(getattr(hook, "__self__", None), Listener))
    return OrderedDict(heard)


@contextmanager
def step_untouched(
    optimizers: Sequence[torch.optim.Optimizer], subjects: Sequence[Subject], rows: Mapping[ValueTable, Tensor]
) -> Iterator[dict[ValueTable, Tensor]]:
    """The optimizers step on what memories have alone, within `untouched`; afterwards nothing tells of the step.

    rows: of tables in row mode, the slots that a step may write. Yields what is put back: the contents of each table,
    or of its rows.
    """
    tables = {table: None for subject in subjects for table in subject.tables}
    parts = all_parts(optimizers)
    owned = [(table, part) for part in parts if isinstance(part, RowOptimizer) for table in part._tables]
    with Undo() as undo:
        for table, _ in owned:
            if table.row_gradient is not None and table not in tables:  # of another model: it is not to be consumed
                undo.enter_context(table.row_gradient.set_aside())
        for table in tables:
            if isinstance(table, MappedTable) and table.unchanged_since >= 0:
                undo.callback(table.restore)  # after the contents: its log is to know of no change either
        before = {table: undo.contents(table.weight, rows.get(table)) for table in tables}
        slots_of = {table.weight: slots for table, slots in rows.items()}
        allowed = {parameter for subject in subjects for _, parameter in subject.parameters()}
        for part in parts:
            undo.entries(vars(part))
            part._optimizer_step_pre_hooks = OrderedDict()  # hooks of a step are for real steps
            part._optimizer_step_post_hooks = OrderedDict()
        # The groups and the state of a `MemoryAdamW` are those of its parts.
        for group in {id(group): group for part in parts for group in part.param_groups}.values():
            undo.entries(group)
        for state in {id(part.state): part.state for part in parts}.values():
            undo.entries(state)
            for table, part in owned:  # in files they stay: those that the step would make are made before, of zeros
                if part.state is state and isinstance(table, MappedTable) and table in tables:
                    part._state_of(table, part.param_groups[0])
            for parameter in allowed & state.keys():
                state[parameter] = _to_step_on(state[parameter], undo, len(parameter), slots_of.get(parameter))
        owner_of = {table.weight: part for table, part in owned}
        for optimizer in optimizers:
            mine = all_parts([optimizer])
            for group in optimizer.param_groups:
                # A table in row mode belongs to its owner only, also where another has it in a group by mistake.
                group["params"] = [
                    parameter
                    for parameter in group["params"]
                    if parameter in allowed and (parameter not in slots_of or owner_of.get(parameter) in mine)
                ]
                if is_at_zero(group):
                    group["lr"] = group["initial_lr"]
        for part in parts:
            if not isinstance(part, RowOptimizer):  # which has one group, always
                part.param_groups = [group for group in part.param_groups if group["params"]]
        yield before


def _to_step_on(value: Any, undo: Undo, num_slots: int, slots: Tensor | None) -> Any:
    """State with containers and tensors of its own; but where `slots` are given, a tensor of rows has those undone."""
    if isinstance(value, Tensor):
        if slots is None or not value.ndim or len(value) != num_slots:
            return value.clone()
        undo.contents(value, slots)
        return value
    if isinstance(value, dict):
        return {name: _to_step_on(inner, undo, num_slots, slots) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_step_on(inner, undo, num_slots, slots) for inner in value)
    return value
