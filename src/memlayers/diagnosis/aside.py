"""Everything that an examination changes in a model and its optimizers, put back bit for bit, whatever happens inside.

What is copied: buffers, the small parameters of memories and their optimizer state; of a table in row mode only the
rows that a step may write (and their state); of a dense one all of it, with its state, as a dense optimizer may write
to every row. Gradients are not copied: those that are pending are taken off and put back.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memlayers.diagnosis.subjects import Subject
from memlayers.optim import MemoryAdamW
from memlayers.optim.row_optimizer import RowOptimizer
from memlayers.torch_private import hooks_after_accumulation, preserved_versions
from memlayers.usage import UsageMeter
from memlayers.values import value_tables


@contextmanager
def model_aside(model: nn.Module, subjects: Sequence[Subject]) -> Iterator[None]:
    """Modes, buffers, gradients, random state, memories' parameters but tables, and who listens to them."""
    # Contents come back, and so do the counters of their versions: a forward pass that waits for its backward is not
    # told that something has changed.
    in_place = [one for one in (*model.parameters(), *model.buffers()) if not one.is_inference()]
    with ExitStack() as stack:
        stack.enter_context(preserved_versions(in_place))
        for held in (
            _random_state(), _modes(model), _buffers(model), _gradients(model), _hooks_of_gradients(model),
            _listeners(subjects),
        ):  # fmt: skip
            stack.enter_context(held)
        tables = {subject.table.weight for subject in subjects}
        small = {parameter for subject in subjects for _, parameter in subject.parameters() if parameter not in tables}
        stack.enter_context(_parameters(small))
        yield


@contextmanager
def _random_state() -> Iterator[None]:
    in_python, in_numpy, on_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(in_python)
        np.random.set_state(in_numpy)
        torch.set_rng_state(on_cpu)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    held = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in model.modules()]
    copies = {buffer: buffer.clone() for _, buffers, _ in held for buffer in buffers.values() if buffer is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in copies.items():
                if not any(
                    stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
                ):
                    buffer.copy_(copy)  # an expanded one can be written by nobody
        for module, buffers, not_persistent in held:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = not_persistent


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    tables = value_tables(model)
    held = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        for table in tables:
            if table.row_gradient is not None:
                stack.enter_context(table.row_gradient.set_aside())
        for parameter, _, _ in held:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, grad, requires_grad in held:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


@contextmanager
def _hooks_of_gradients(model: nn.Module) -> Iterator[None]:
    """No optimizer that steps in the backward pass does so; what commits the gradients of rows stays."""
    marks = {table.row_mark for table in value_tables(model)}
    held = []
    for parameter in model.parameters():
        hooks = hooks_after_accumulation(parameter)
        if hooks and parameter not in marks:
            held.append((hooks, dict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


@contextmanager
def _listeners(subjects: Sequence[Subject]) -> Iterator[None]:
    """Usage meters, and whatever says so, hear nothing; and the mask of a call that failed does not stay."""
    masks = [(subject.layer, subject.layer.mask) for subject in subjects]
    modules = {module: None for subject in subjects for module in (*subject.layer.modules(), *subject.beside)}
    held = [
        (module, name, getattr(module, name)) for module in modules for name in ("_forward_hooks", "_forward_pre_hooks")
    ]
    for module, name, hooks in held:
        heard = OrderedDict((number, hook) for number, hook in hooks.items() if not _is_meter(hook))
        setattr(module, name, heard)  # the handles of hooks refer to the first dictionary, which comes back
    try:
        yield
    finally:
        for module, name, hooks in held:
            setattr(module, name, hooks)
        for layer, mask in masks:
            layer.mask = mask


def _is_meter(hook: object) -> bool:
    listener = getattr(hook, "__self__", None)
    return isinstance(listener, UsageMeter) or getattr(listener, "pauses_in_doctor", False)


@contextmanager
def _parameters(parameters: Iterable[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
    copies = {parameter: parameter.detach().clone() for parameter in parameters}
    try:
        yield copies
    finally:
        with torch.no_grad():
            for parameter, copy in copies.items():
                parameter.copy_(copy)


# What a step changes.


@contextmanager
def step_aside(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Iterable[nn.Parameter], rows: dict[nn.Parameter, Tensor]
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """The optimizers step on these parameters alone, and on these rows of tables in row mode; afterwards they have not.

    parameters: without tables in row mode. Yields what is put back: each parameter as it was, or its rows.
    """
    allowed = {*parameters, *rows}
    tables = [table for part in all_parts(optimizers) if isinstance(part, RowOptimizer) for table in part._tables]
    with ExitStack() as stack:
        before = dict(stack.enter_context(_parameters(parameter for parameter in allowed if parameter not in rows)))
        for table in tables:  # of other models: what is recorded there must not be consumed
            if table.row_gradient is not None and table.weight not in allowed:
                stack.enter_context(table.row_gradient.set_aside())
        for weight, slots in rows.items():
            before[weight] = stack.enter_context(_some_rows(weight, slots))
        stack.enter_context(_optimizers(optimizers, allowed, rows))
        yield before


@contextmanager
def _some_rows(tensor_SV: Tensor, slots: Tensor) -> Iterator[Tensor]:
    copy = tensor_SV.detach()[slots]
    try:
        yield copy
    finally:
        tensor_SV.detach()[slots] = copy


@contextmanager
def _optimizers(
    optimizers: Sequence[torch.optim.Optimizer], allowed: set[nn.Parameter], rows: dict[nn.Parameter, Tensor]
) -> Iterator[None]:
    parts = all_parts(optimizers)
    attributes = [(part, dict(vars(part))) for part in parts]
    # The groups and the state of a `MemoryAdamW` are those of its parts.
    groups = {id(group): (group, dict(group)) for part in parts for group in part.param_groups}.values()
    states = {id(part.state): (part.state, dict(part.state)) for part in parts}.values()
    owner_of = {id(table.weight): part for part in parts if isinstance(part, RowOptimizer) for table in part._tables}
    slots_of = {id(weight): slots for weight, slots in rows.items()}
    with ExitStack() as stack:
        try:
            for state, states_before in states:
                for parameter, values in states_before.items():
                    if parameter in rows:
                        state[parameter] = _copied(values, lambda one: one)
                        for value in _tensors(values):
                            stack.enter_context(_state_of_rows(value, len(parameter), slots_of[id(parameter)]))
                    elif parameter in allowed:
                        state[parameter] = _copied(values, Tensor.clone)
            for part in parts:  # hooks of a step are for real steps
                part._optimizer_step_pre_hooks = OrderedDict()
                part._optimizer_step_post_hooks = OrderedDict()
            for optimizer in optimizers:
                mine = all_parts([optimizer])
                for group in optimizer.param_groups:
                    # A table in row mode belongs to its owner only, also where another has it in a group by mistake.
                    group["params"] = [
                        parameter
                        for parameter in group["params"]
                        if parameter in allowed and (parameter not in rows or owner_of.get(id(parameter)) in mine)
                    ]
                    if is_at_zero(group):
                        group["lr"] = group["initial_lr"]
            for part in parts:
                if not isinstance(part, RowOptimizer):  # which has one group, always
                    part.param_groups = [group for group in part.param_groups if group["params"]]
            yield
        finally:
            for group, fields in groups:
                group.clear()
                group.update(fields)
            for state, states_before in states:
                state.clear()
                state.update(states_before)
            for part, attributes_before in attributes:
                vars(part).clear()
                vars(part).update(attributes_before)


@contextmanager
def _state_of_rows(value: Tensor, num_slots: int, slots: Tensor) -> Iterator[None]:
    if value.ndim and len(value) == num_slots:
        with _some_rows(value, slots):
            yield
    else:
        copy = value.clone()
        try:
            yield
        finally:
            value.copy_(copy)


def _copied(value: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """Containers anew, with what is made of each tensor."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, dict):
        return {name: _copied(inner, of_tensor) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(inner, of_tensor) for inner in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def is_at_zero(group: Mapping[str, Any]) -> bool:
    """A schedule has its learning rate at zero: a warm-up begins there, a decay ends there."""
    rate, first = group.get("lr"), group.get("initial_lr")
    return rate is not None and first is not None and float(rate) == 0 and float(first) > 0


def all_parts(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """The optimizers, and the two that a `MemoryAdamW` is made of."""
    parts: list[torch.optim.Optimizer] = []
    for optimizer in optimizers:
        parts += [optimizer, *(optimizer._parts() if isinstance(optimizer, MemoryAdamW) else [])]
    return parts
