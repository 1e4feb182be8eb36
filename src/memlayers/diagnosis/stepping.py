"""Checks of the optimizers: who trains what, and which rows a real step of theirs writes.

Letters: S slots, V width, R rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.diagnosis.aside import all_parts, is_at_zero, step_aside
from memlayers.diagnosis.report import Finding
from memlayers.diagnosis.subjects import Subject
from memlayers.diagnosis.watch import Read, Watch, read_rows
from memlayers.optim.row_optimizer import RowOptimizer
from memlayers.values import ValueTable

MOST_UNREAD = 4096  # unread rows of a table in row mode that are looked at
_NO_OPTIMIZER = "not checked: no optimizer was given"


class Training:
    """Who trains which parameter: the groups of each, over all optimizers."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.groups: dict[Tensor, list[tuple[torch.optim.Optimizer, dict[str, Any]]]] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.groups.setdefault(parameter, []).append((optimizer, group))

    def of(self, parameter: Tensor) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
        """The optimizers and groups that hold a parameter."""
        return self.groups.get(parameter, [])


def check_model_groups(model: nn.Module, subjects: Sequence[Subject], training: Training) -> Finding:
    """Parameters outside of memories are in one group each, and the optimizers hold no others."""
    if not training.optimizers:
        return Finding("parameters", None, "skip", _NO_OPTIMIZER)
    inside = {parameter for subject in subjects for _, parameter in subject.parameters()}
    marks = {table.row_mark for subject in subjects for table in subject.tables}
    names = {parameter: name for name, parameter in model.named_parameters() if parameter not in marks}
    outside = {parameter: name for parameter, name in names.items() if parameter not in inside}
    twice = [name for parameter, name in outside.items() if len(training.of(parameter)) > 1]
    if twice:
        return Finding(
            "parameters", None, "fail", f"{_some(twice)} {_are(twice)} in more than one group: updated twice a step",
            "put each parameter into one group of one optimizer",
        )  # fmt: skip
    missing = [name for parameter, name in outside.items() if parameter.requires_grad and not training.of(parameter)]
    unknown = sum(parameter not in names and parameter not in marks for parameter in training.groups)
    if missing or unknown:
        said = [f"{_some(missing)} {_are(missing)} trainable but in no group"] if missing else []
        if unknown:
            said.append(f"the optimizer holds {unknown} parameter{'s' * (unknown > 1)} that the model does not have")
        return Finding(
            "parameters", None, "warn", "; ".join(said),
            "freeze what is not to be trained, and make the optimizer after the memories have been added",
        )  # fmt: skip
    return Finding("parameters", None, "pass", "outside of memories, each trainable one is in exactly one group")


def check_training(subject: Subject, training: Training) -> Iterator[Finding]:
    """Groups, owner and weight decay of one memory."""
    yield owner(subject, training)
    if not training.optimizers:
        for check in ("groups", "decay"):
            yield Finding(check, subject.name, "skip", _NO_OPTIMIZER)
        return
    yield groups(subject, training)
    yield decay(subject, training)


def groups(subject: Subject, training: Training) -> Finding:
    """Each trainable parameter of a memory is in exactly one group, over all optimizers."""
    named = [(name, parameter) for name, parameter in subject.parameters() if parameter.requires_grad]
    missing = [name for name, parameter in named if not training.of(parameter)]
    twice = [name for name, parameter in named if len(training.of(parameter)) > 1]
    said = [f"{_some(missing)} {_are(missing)} in no group: never updated"] if missing else []
    if twice:
        said.append(f"{_some(twice)} {_are(twice)} in more than one group: updated twice a step")
    if said:
        return Finding(
            "groups", subject.name, "fail", "; ".join(said),
            "put each parameter into one group of one optimizer, made after the memory was added (or use MemoryAdamW)",
        )  # fmt: skip
    return Finding("groups", subject.name, "pass", f"each of {len(named)} trainable parameters is in exactly one")


def owner(subject: Subject, training: Training) -> Finding:
    """A table in row mode has an owner that lives, is among the optimizers, and is alone."""
    table = subject.table

    def fails(message: str, advice: str) -> Finding:
        return Finding("owner", subject.name, "fail", message, advice)

    if table.row_gradient is None:
        return Finding("owner", subject.name, "pass", "no row optimizer owns the table: its gradients are dense")
    its_owner = table.row_gradient.owner()
    if its_owner is None:
        return fails(
            "the table has no owner: it is in row mode, and its row optimizer is gone",
            "keep the optimizer alive, build another, or call values.release() to train it with dense gradients",
        )
    kind = type(its_owner).__name__
    if not training.optimizers:
        return Finding(
            "owner", subject.name, "pass", f"{kind}, which is alive (no optimizer was given to compare with)"
        )
    if not any(its_owner is part for part in all_parts(training.optimizers)):
        given = ", ".join(type(optimizer).__name__ for optimizer in training.optimizers)
        return fails(
            f"the table is owned by a {kind} that is not among the optimizers given ({given}): these never update it",
            "step its owner too, or call release() on it before another optimizer is made",
        )
    assert isinstance(its_owner, RowOptimizer)
    if not any(table.weight is parameter for group in its_owner.param_groups for parameter in group["params"]):
        return fails(f"the table is in no group of its owner, a {kind}", "build the optimizer again, with this table")
    others = [
        type(optimizer).__name__
        for optimizer, _ in training.of(table.weight)
        if not any(its_owner is part for part in all_parts([optimizer]))
    ]
    if others:
        return fails(
            f"the table is in the wrong group: a {kind} owns it, and it is in a group of {' and '.join(others)} too",
            f"leave values.weight out of {' and '.join(others)}",
        )
    return Finding("owner", subject.name, "pass", f"{kind}, which is alive and among the optimizers given")


def decay(subject: Subject, training: Training) -> Finding:
    """No weight decay on the table: it would shrink every row that is not read."""
    rates = [float(group.get("weight_decay") or 0) for _, group in training.of(subject.table.weight)]
    if any(rates):
        return Finding(
            "decay", subject.name, "fail", f"weight decay of {max(rates):g} on the table: rows that are not read fade",
            "put values.weight into a group with weight_decay = 0 (MemoryAdamW does)",
        )  # fmt: skip
    return Finding("decay", subject.name, "pass", "none on the table")


# A real step.


def check_step(
    subjects: Sequence[Subject], watches: Sequence[Watch], reads: Sequence[Read], training: Training
) -> dict[Subject, list[Finding]]:
    """Steps the optimizers, on what memories have alone, and compares the rows that were read and those that were not.

    Everything is put back afterwards.
    """
    if not training.optimizers:
        return {subject: _both(subject, _NO_OPTIMIZER) for subject in subjects}
    tables = {table: None for subject in subjects for table in subject.tables}
    live = {table: read_rows(reads, table, live=True) for table in tables}
    touched = {table: read_rows(reads, table, live=False) for table in tables}
    looked_at: dict[nn.Parameter, Tensor] = {}
    for table in tables:
        if table.row_gradient is not None:
            looked_at[table.weight] = torch.cat([touched[table], _unread(table, touched[table])]).sort().values
    parameters = [
        parameter for subject in subjects for _, parameter in subject.parameters() if parameter not in looked_at
    ]
    changed: dict[ValueTable, Tensor] = {}
    spoilt: dict[Subject, list[str]] = {}
    with step_aside(training.optimizers, parameters, looked_at) as before:
        for optimizer in training.optimizers:
            if optimizer.param_groups:
                optimizer.step()
        for table in tables:
            rows = looked_at.get(table.weight)
            changed[table] = _changed(table.weight.detach(), before[table.weight], rows)
        for subject in subjects:
            spoilt[subject] = [name for name, parameter in subject.parameters() if not _is_finite(parameter, looked_at)]
    findings = {}
    for subject, watch in zip(subjects, watches, strict=True):
        table = subject.table
        if not watch.has_gradient:
            findings[subject] = _both(subject, "not checked: the memory is not reached")
        elif not table.weight.requires_grad:
            findings[subject] = _both(subject, "not checked: the table is frozen")
        elif subject.has_lost_owner:
            findings[subject] = _both(subject, "not checked: the table has no owner")
        elif spoilt[subject]:
            findings[subject] = [
                Finding(
                    "written", subject.name, "fail", f"a step makes {_some(spoilt[subject])} not finite",
                    "train memories in float32 or bfloat16 (Adam divides zero by zero in float16), or lower the rate",
                ),
                Finding("unread", subject.name, "skip", "not checked: what a step writes is not finite"),
            ]  # fmt: skip
        else:
            findings[subject] = [
                _written(subject, live[table], changed[table], training),
                _unread_rows(subject, touched[table], changed[table], training),
            ]
    return findings


def _written(subject: Subject, live: Tensor, changed: Tensor, training: Training) -> Finding:
    table = subject.table
    if not len(live):
        return Finding(
            "written", subject.name, "fail", "no row that was read has a gradient", "see the check gradients"
        )
    share = float(torch.isin(live, changed).double().mean())
    kinds = [type(optimizer).__name__ for optimizer in training.optimizers]
    said = f"of {len(live):,} rows that were read, a step of {' and '.join(kinds)} writes {share:.1%}"
    if any(is_at_zero(group) and not is_constant(group) for _, group in training.of(table.weight)):
        said += " (at the learning rate that its schedule began with: now it is 0)"
    if share < 0.95:
        advice = _why_not_written(table, training)
        if share >= 0.5:
            return Finding("written", subject.name, "warn", said, advice)
        what = "rows are never written: " if share == 0 else "most rows are not written: "
        return Finding("written", subject.name, "fail", what + said, advice)
    return Finding("written", subject.name, "pass", said)


def _why_not_written(table: ValueTable, training: Training) -> str:
    held = training.of(table.weight)
    if not held:
        return "put values.weight into a group of an optimizer, or use MemoryAdamW"
    for _, group in held:
        name = "value_lr" if is_constant(group) else "lr"
        if group.get(name) is not None and float(group[name]) == 0:
            return f"{name} of its group is 0: raise it"
    if table.weight.dtype in (torch.bfloat16, torch.float16):
        return (
            f"updates may round to nothing in {str(table.weight.dtype)[6:]}: use a row optimizer's stochastic rounding"
        )
    return "see whether the optimizer's step skips the table, or its learning rate is too small for its dtype"


def is_constant(group: dict[str, Any]) -> bool:
    """Whether its tables are trained at a rate that no schedule changes."""
    return "value_lr" in group and not group.get("schedule_values")


def _unread_rows(subject: Subject, touched: Tensor, changed: Tensor, training: Training) -> Finding:
    table = subject.table
    wrong = int((~torch.isin(changed, touched)).sum())
    if not wrong:
        return Finding("unread", subject.name, "pass", "a step leaves all other rows as they are")
    if table.row_gradient is not None:
        return Finding(
            "unread", subject.name, "fail", f"a step changes rows that were not read ({wrong:,} of those looked at)",
            "see what the row optimizer's update writes to",
        )  # fmt: skip
    return Finding(
        "unread", subject.name, "warn", f"a step changes {wrong:,} rows that were not read (momentum or weight decay)",
        "train the table with a row optimizer, which leaves them alone",
    )  # fmt: skip


def _unread(table: ValueTable, touched: Tensor) -> Tensor:
    """Some slots that were not read, spread evenly."""
    num_slots = len(table.weight)
    step = max(1, num_slots // MOST_UNREAD)
    some = torch.arange(0, num_slots, step, device=touched.device)
    return some[~torch.isin(some, touched)]


def _changed(weight_SV: Tensor, before_RV: Tensor, rows: Tensor | None) -> Tensor:
    """Slots whose rows differ from what they were; rows: which ones `before_RV` holds, None for all."""
    if rows is not None:
        return rows[(weight_SV[rows] != before_RV).any(1)]
    size = max(1, (1 << 24) // weight_SV.shape[1])  # so that a large table needs no large mask
    pieces = zip(weight_SV.split(size), before_RV.split(size), strict=True)
    return torch.cat([(now != then).any(1) for now, then in pieces]).nonzero().squeeze(1)


def _both(subject: Subject, message: str) -> list[Finding]:
    return [Finding(check, subject.name, "skip", message) for check in ("written", "unread")]


def _is_finite(parameter: nn.Parameter, looked_at: Mapping[nn.Parameter, Tensor]) -> bool:
    rows = looked_at.get(parameter)
    return bool((parameter.detach() if rows is None else parameter.detach()[rows]).isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
