"""Are the rows that were read written, and only those? Found out by a real step, which is then undone.

Letters: S slots, V width, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memlayers.diagnosis.findings import NOT_REACHED, Answer, fails, not_checked, passed, warns
from memlayers.diagnosis.groups import Training, is_at_zero, is_constant, some
from memlayers.diagnosis.subjects import Subject, chosen_rows, has_lost_owner
from memlayers.diagnosis.untouched import step_untouched
from memlayers.diagnosis.watch import Read, Watch, read_slots
from memlayers.values import ValueTable

MOST_UNREAD = 4096  # unread rows of a table in row mode that are looked at
PASSES_FROM, WARNS_FROM = 0.95, 0.5  # share of the rows that were read


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step did to a memory."""

    read: Tensor  # slots of its table that were read
    live: Tensor  # those whose output has a gradient, and that may be moved (choose_rows)
    changed: Tensor  # those whose rows the step changed, among all that were looked at
    spoilt: list[str]  # parameters that are not finite after it
    unwritten: list[str]  # further tables of it of which rows have a gradient, and none was changed


def take_step(subjects: Sequence[Subject], reads: Sequence[Read], training: Training) -> dict[Subject, Step]:
    """Steps the optimizers, on what memories have alone, looks at what that did, and puts everything back."""
    tables = {table: None for subject in subjects for table in subject.tables}
    read = {table: read_slots(reads, table) for table in tables}
    live = {table: read_slots(reads, table, live=True) for table in tables}
    for table in tables:
        if (chosen := chosen_rows(table)) is not None:
            live[table] = live[table][torch.isin(live[table], chosen)]
    rows = {table: _looked_at(table, read[table]) for table in tables if table.row_gradient is not None}
    rows_of = {table.weight: slots for table, slots in rows.items()}
    with step_untouched(training.optimizers, subjects, rows) as before:
        for optimizer in training.optimizers:
            if optimizer.param_groups:
                optimizer.step()
        changed = {table: _changed(table.weight.detach(), before[table], rows.get(table)) for table in tables}
        idle = {table.weight for table in tables if len(live[table]) and not len(changed[table])}
        return {
            subject: Step(
                read=read[subject.table],
                live=live[subject.table],
                changed=changed[subject.table],
                spoilt=[name for name, one in subject.parameters() if not _is_finite(one, rows_of.get(one))],
                unwritten=[
                    name for name, one in subject.parameters() if one in idle and one is not subject.table.weight
                ],
            )
            for subject in subjects
        }


def written(watch: Watch, step: Step, training: Training) -> Answer:
    """A step writes the rows that were read, and everything is finite after it."""
    if why := _why_not_checked(watch):
        return why
    if step.spoilt:
        return fails(
            f"a step makes {some(step.spoilt)} not finite",
            "train memories in float32 or bfloat16 (Adam divides zero by zero in float16), or lower the rate",
        )
    if not len(step.live):
        if chosen_rows(watch.subject.table) is not None:
            return warns(
                "the batch reads none of the rows that were chosen (choose_rows), so nothing of the table is trained",
                "choose rows that the text reads (memlayers.select_slots)",
            )
        return fails("no row that was read has a gradient", "see the check gradients")
    if step.unwritten:
        return fails(
            f"no row of {some(step.unwritten)} is written: a step of {' and '.join(training.kinds)} leaves it as it is",
            "see that the optimizer that is stepped trains all tables of the memory (MemoryAdamW does)",
        )
    table = watch.subject.table
    share = float(torch.isin(step.live, step.changed).double().mean())
    said = f"of {len(step.live):,} rows that were read, a step of {' and '.join(training.kinds)} writes {share:.1%}"
    if any(is_at_zero(group) and not is_constant(group) for group in training.groups(table.weight)):
        said += " (at the learning rate that its schedule began with: now it is 0)"
    if share >= PASSES_FROM:
        return passed(said)
    advice = _why_not_written(table, training)
    if share >= WARNS_FROM:
        return warns(said, advice)
    what = "rows are never written: " if share == 0 else "most rows are not written: "
    return fails(what + said, advice)


def unread(watch: Watch, step: Step) -> Answer:
    """A step leaves the rows that were not read as they are."""
    if why := _why_not_checked(watch):
        return why
    if step.spoilt:
        return not_checked("what a step writes is not finite")
    wrong = int((~torch.isin(step.changed, step.read)).sum())
    if not wrong:
        return passed("a step leaves all other rows as they are")
    if watch.subject.table.row_gradient is not None:
        return fails(
            f"a step changes rows that were not read ({wrong:,} of those looked at)",
            "see what the row optimizer's update writes to",
        )
    return warns(
        f"a step changes {wrong:,} rows that were not read (momentum or weight decay)",
        "train the table with a row optimizer, which leaves them alone",
    )


def _why_not_checked(watch: Watch) -> Answer | None:
    if not watch.has_gradient:
        return NOT_REACHED
    if not watch.subject.table.weight.requires_grad:
        return not_checked("the table is frozen")
    return not_checked("the table has no owner") if has_lost_owner(watch.subject.table) else None


def _why_not_written(table: ValueTable, training: Training) -> str:
    held = training.groups(table.weight)
    if not held:
        return "put values.weight into a group of an optimizer, or use MemoryAdamW"
    for group in held:
        name = "value_lr" if is_constant(group) else "lr"
        if group.get(name) is not None and float(group[name]) == 0:
            return f"{name} of its group is 0: raise it"
    if table.weight.dtype in (torch.bfloat16, torch.float16):
        dtype = str(table.weight.dtype).removeprefix("torch.")
        return f"updates may round to nothing in {dtype}: use a row optimizer's stochastic rounding"
    return "see whether the optimizer's step skips the table, or its learning rate is too small for its dtype"


def _looked_at(table: ValueTable, read: Tensor) -> Tensor:
    """The slots that were read, and some that were not, spread evenly; ascending."""
    some_slots = torch.arange(0, len(table.weight), max(1, len(table.weight) // MOST_UNREAD), device=read.device)
    return torch.cat([read, some_slots]).unique()


def _changed(weight_SV: Tensor, before_RV: Tensor, rows: Tensor | None) -> Tensor:
    """Slots whose rows differ from what they were; rows: which ones `before_RV` holds, None for all."""
    if rows is not None:
        return rows[(weight_SV[rows] != before_RV).any(1)]
    size = max(1, (1 << 24) // weight_SV.shape[1])  # so that a large table needs no large mask
    pieces = zip(weight_SV.split(size), before_RV.split(size), strict=True)
    return torch.cat([(now != then).any(1) for now, then in pieces]).nonzero().squeeze(1)


def _is_finite(parameter: nn.Parameter, rows: Tensor | None) -> bool:
    return bool((parameter.detach() if rows is None else parameter.detach()[rows]).isfinite().all())
