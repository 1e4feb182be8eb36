"""doctor: one forward and backward pass and one step of the optimizers, looked at and then undone."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.diagnosis.collapse import usage
from memlayers.diagnosis.findings import Answer, Finding, Report, not_checked
from memlayers.diagnosis.gradients import frozen, gradients
from memlayers.diagnosis.groups import Training, decay, groups, owner, parameters
from memlayers.diagnosis.loss import check_loss, default_loss, has_labels
from memlayers.diagnosis.neighbours import neighbours
from memlayers.diagnosis.output import output
from memlayers.diagnosis.reached import reached
from memlayers.diagnosis.subjects import Subject, find_trainable, has_lost_owner
from memlayers.diagnosis.untouched import Undo, untouched
from memlayers.diagnosis.watch import Watches
from memlayers.diagnosis.written import take_step, unread, written
from memlayers.distributed.agreement import alone
from memlayers.torch_private import without_compiled_graphs

Loss = Callable[[nn.Module, Any], Tensor]

_OF_PASS = {
    "reached": reached,
    "neighbours": neighbours,
    "usage": usage,
    "output": output,
    "gradients": gradients,
    "frozen": frozen,
}
_OF_LABELS = ("reached", "gradients", "written", "unread")
_NO_LABEL, _NO_OPTIMIZER = not_checked("no label counts"), not_checked("no optimizer was given")


def doctor(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    loss: Loss | None = None,
) -> Report:
    """Whether every memory of `model` is reached, trained and used; nothing is different afterwards.

    In several processes call it on one rank, with the model inside of its wrapper, or on each: nothing is exchanged.

    Runs a forward and a backward pass in training mode, eagerly also where the model is compiled, and one step of the
    optimizers on the memories' parameters. Then everything is put back bit for bit: parameters, buffers, gradients
    (rows', too), optimizers, modes, random state, usage meters. A dense table and its optimizer state are copied for
    that; of a table in row mode only the rows that were read.

    Args:
        model: any module with memories: a Hugging Face model, one wrapped by PEFT, a compiled or a plain one.
        batch: a mapping for ``model(**batch)`` (a causal LM without ``labels`` gets ``input_ids`` for them), a tuple
            for ``model(*batch)``, or a tensor; the more tokens, the more it says about usage.
        optimizer: the one, or all, that will train the model. None: what concerns them is not checked.
        loss: ``loss(model, batch)`` returns a scalar. None: ``.loss`` of the output, else a fixed random projection of
            its first floating tensor.

    Raises:
        ValueError: a model without memories, or an optimizer that is none. What the model, the loss or an optimizer
            raises goes through.
    """
    training = Training(as_optimizers(optimizer))
    subjects = find_trainable(model)
    subjects = [subject for subject in subjects if subject.is_active] or subjects
    with (
        untouched(model, subjects),
        without_compiled_graphs(),
        alone(),  # what other ranks read could not be undone
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        _seed()
        model.train()
        watches = Watches(subjects)
        for watch in watches.of.values():
            watch.gate_was_zero = _open_gate(watch.subject)
        with Undo() as undo, watches:
            for table in {table for subject in subjects for table in subject.tables if has_lost_owner(table)}:
                # It would raise in backward: without a gradient of its own, the rest can be looked at.
                undo.attribute(table.weight, "requires_grad", False)
            value = (loss or default_loss)(model, batch)
            counts = loss is not None or has_labels(model, batch)
            answers: list[tuple[str, str | None, Answer]] = [("loss", None, check_loss(value, counts=counts))]
            if value.requires_grad:
                value.backward()
        of_pass = [[(check, ask(watch)) for check, ask in _OF_PASS.items()] for watch in watches.of.values()]
        steps = take_step(subjects, watches.reads, training) if training.optimizers else None
    answers.append(("parameters", None, parameters(model, subjects, training) if steps else _NO_OPTIMIZER))
    for subject, watch, found in zip(subjects, watches.of.values(), of_pass, strict=True):
        found.append(("owner", owner(subject, training)))
        if steps is None:
            found += [(check, _NO_OPTIMIZER) for check in ("groups", "decay", "written", "unread")]
        else:
            found += [
                ("groups", groups(subject, training)),
                ("decay", decay(subject, training)),
                ("written", written(watch, steps[subject], training)),
                ("unread", unread(watch, steps[subject])),
            ]
        answers += [(check, subject.name, answer) for check, answer in found]
    if not counts:
        answers = [(check, name, _NO_LABEL if check in _OF_LABELS else answer) for check, name, answer in answers]
    return Report(tuple(Finding(check, name, *answer) for check, name, answer in answers))


def _seed() -> None:
    """Dropout: the same report each time. torch.manual_seed would queue a seed for devices that are not in use."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@torch.no_grad()
def _open_gate(subject: Subject) -> bool:
    """Opens a gate at zero, which hides everything behind it; returns whether it was."""
    gate = subject.gate
    if gate is None or bool(gate.any()):
        return False
    gate.fill_(1)
    return True


def as_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """One optimizer, several, or none, without what accelerate wraps around them. Raises `ValueError` for others."""
    given = [] if optimizer is None else [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    optimizers = []
    for one in given if isinstance(given, Iterable) else [given]:
        while isinstance(inner := getattr(one, "optimizer", None), torch.optim.Optimizer):  # accelerate's wrapper
            one = inner
        if not isinstance(one, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be one torch.optim.Optimizer or several, got {type(one).__name__}")
        optimizers.append(one)
    return optimizers
