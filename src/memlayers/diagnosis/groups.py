"""Who trains a memory? Its owner, the groups of the optimizers, and the weight decay there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.diagnosis.findings import Answer, fails, passed, warns
from memlayers.diagnosis.subjects import Subject
from memlayers.optim import MemoryAdamW
from memlayers.optim.row_optimizer import RowOptimizer
from memlayers.values import value_tables

_Group = dict[str, Any]


class Training:
    """Who trains which parameter: the groups of each, over all optimizers."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.kinds = [type(optimizer).__name__ for optimizer in optimizers]
        self._held: dict[Tensor, list[tuple[torch.optim.Optimizer, _Group]]] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._held.setdefault(parameter, []).append((optimizer, group))

    @property
    def parameters(self) -> set[Tensor]:
        """All that the optimizers hold."""
        return set(self._held)

    def holders(self, parameter: Tensor) -> list[torch.optim.Optimizer]:
        """The optimizers that hold a parameter, one for each group."""
        return [optimizer for optimizer, _ in self._held.get(parameter, [])]

    def groups(self, parameter: Tensor) -> list[_Group]:
        """The groups that hold a parameter."""
        return [group for _, group in self._held.get(parameter, [])]


def all_parts(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """The optimizers, and the two that a `MemoryAdamW` is made of."""
    parts: list[torch.optim.Optimizer] = []
    for optimizer in optimizers:
        parts += [optimizer, *(optimizer._parts() if isinstance(optimizer, MemoryAdamW) else [])]
    return parts


def is_at_zero(group: Mapping[str, Any]) -> bool:
    """A schedule has its learning rate at zero: a warm-up begins there, a decay ends there."""
    rate, first = group.get("lr"), group.get("initial_lr")
    return rate is not None and first is not None and float(rate) == 0 and float(first) > 0


def is_constant(group: Mapping[str, Any]) -> bool:
    """Whether its tables are trained at a rate that no schedule changes."""
    return "value_lr" in group and not group.get("schedule_values")


def owner(subject: Subject, training: Training) -> Answer:
    """A table in row mode has an owner that lives, is among the optimizers, and is alone."""
    table = subject.table
    if table.row_gradient is None:
        return passed("no row optimizer owns the table: its gradients are dense")
    its_owner = table.row_gradient.owner()
    if its_owner is None:
        return fails(
            "the table has no owner: it is in row mode, and its row optimizer is gone",
            "keep the optimizer alive, build another, or call values.release() to train it with dense gradients",
        )
    kind = type(its_owner).__name__
    if not training.optimizers:
        return passed(f"{kind}, which is alive (no optimizer was given to compare with)")
    if not any(its_owner is part for part in all_parts(training.optimizers)):
        return fails(
            f"the table is owned by a {kind} that is not among the optimizers given ({', '.join(training.kinds)}): "
            "these never update it",
            "step its owner too, or call release() on it before another optimizer is made",
        )
    assert isinstance(its_owner, RowOptimizer)
    if not any(table.weight is parameter for group in its_owner.param_groups for parameter in group["params"]):
        return fails(f"the table is in no group of its owner, a {kind}", "build the optimizer again, with this table")
    others = " and ".join(
        type(optimizer).__name__
        for optimizer in training.holders(table.weight)
        if not any(its_owner is part for part in all_parts([optimizer]))
    )
    if others:
        return fails(
            f"the table is in the wrong group: a {kind} owns it, and it is in a group of {others} too",
            f"leave values.weight out of {others}",
        )
    if (fault := table.row_gradient.fault()) is not None:
        return warns(f"a step of {kind} will be refused: {fault.partition(': ')[0]}", fault.partition(": ")[2])
    return passed(f"{kind}, which is alive and among the optimizers given")


def groups(subject: Subject, training: Training) -> Answer:
    """Each trainable parameter of a memory is in exactly one group, over all optimizers."""
    named = {name: parameter for name, parameter in subject.parameters() if parameter.requires_grad}
    missing = [name for name, parameter in named.items() if not training.groups(parameter)]
    twice = [name for name, parameter in named.items() if len(training.groups(parameter)) > 1]
    said = [f"{_are(missing)} in no group: never updated"] if missing else []
    said += [f"{_are(twice)} in more than one group: updated twice a step"] if twice else []
    if said:
        return fails(
            "; ".join(said),
            "put each parameter into one group of one optimizer, made after the memory was added (or use MemoryAdamW)",
        )
    return passed(f"each of {len(named)} trainable parameters is in exactly one")


def decay(subject: Subject, training: Training) -> Answer:
    """No weight decay on the table: it would shrink every row that is not read."""
    groups = [group for table in subject.tables for group in training.groups(table.weight)]
    rates = [float(group.get("weight_decay") or 0) for group in groups]
    if any(rates):
        return fails(
            f"weight decay of {max(rates):g} on the table: rows that are not read fade",
            "put values.weight into a group with weight_decay = 0 (MemoryAdamW does)",
        )
    return passed("none on the table")


def parameters(model: nn.Module, subjects: Sequence[Subject], training: Training) -> Answer:
    """Parameters outside of memories are in one group each, and the optimizers hold no others."""
    inside = {parameter for subject in subjects for _, parameter in subject.parameters()}
    marks = {table.row_mark for table in value_tables(model)}
    names = {parameter: name for name, parameter in model.named_parameters() if parameter not in marks}
    outside = {name: parameter for parameter, name in names.items() if parameter not in inside}
    if twice := [name for name, parameter in outside.items() if len(training.groups(parameter)) > 1]:
        return fails(
            f"{_are(twice)} in more than one group: updated twice a step",
            "put each parameter into one group of one optimizer",
        )
    said = []
    if missing := [name for name, one in outside.items() if one.requires_grad and not training.groups(one)]:
        said.append(f"{_are(missing)} trainable but in no group")
    if unknown := len(training.parameters - names.keys() - marks):
        said.append(f"the optimizer holds {unknown} parameter{'s' * (unknown > 1)} that the model does not have")
    if said:
        return warns(
            "; ".join(said),
            "freeze what is not to be trained, and make the optimizer after the memories have been added",
        )
    return passed("outside of memories, each trainable one is in exactly one group")


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _are(names: Sequence[str]) -> str:
    return f"{some(names)} {'is' if len(names) == 1 else 'are'}"
