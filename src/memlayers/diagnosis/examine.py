"""doctor: one forward and backward pass and one step of the optimizers, looked at and then undone."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.diagnosis.aside import model_aside
from memlayers.diagnosis.passing import check_pass
from memlayers.diagnosis.report import Finding, Report
from memlayers.diagnosis.stepping import Training, check_model_groups, check_step, check_training
from memlayers.diagnosis.subjects import Subject, find_subjects, has_lost_owner
from memlayers.diagnosis.watch import Watches
from memlayers.torch_private import without_compiled_graphs

Loss = Callable[[nn.Module, Any], Tensor]

_OF_GRADIENTS = ("reached", "gradients", "written", "unread")


def doctor(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    loss: Loss | None = None,
) -> Report:
    """Whether every memory of `model` is reached, trained and used; nothing is different afterwards.

    Runs a forward and a backward pass in training mode, eagerly also where the model is compiled, and one step of the
    optimizers on the memories' parameters. Then everything is put back bit for bit: parameters, buffers, gradients
    (rows', too), optimizers, modes, random state, usage meters. A dense table and its optimizer state are copied for
    that; of a table in row mode only the rows that were read.

    Args:
        model: any module with memories: a Hugging Face model, one wrapped by PEFT, a compiled or a plain one.
        batch: a mapping for ``model(**batch)`` (a causal LM without ``labels`` gets ``input_ids`` for them), a tuple
            for ``model(*batch)``, or a tensor; the more tokens, the more it says about usage.
        optimizer: the one, or all, that will train the model. None: what concerns them is not checked.
        loss: ``loss(model, batch)`` gives a scalar. None: ``.loss`` of the output, else a fixed random projection of
            its first floating tensor.

    Raises:
        ValueError: a model without memories, or an optimizer that is none. What the model, the loss or an optimizer
            raises goes through.
    """
    optimizers = _as_optimizers(optimizer)
    subjects = find_subjects(model)
    training = Training(optimizers)
    with model_aside(model, subjects), without_compiled_graphs(), torch.inference_mode(False), torch.enable_grad():
        _seed()
        model.train()
        nudged = {subject for subject in subjects if _open_gate(subject)}
        watches = Watches(subjects)
        with _without_lost_tables(subjects), watches.listening():
            value = (loss or default_loss)(model, batch)
            counts = loss is not None or _has_labels(model, batch)
            findings = [_check_loss(value, counts=counts)]
            if value.requires_grad:
                value.backward()
        findings.append(check_model_groups(model, subjects, training))
        listed = [watches.of[subject.layer] for subject in subjects]
        passed = {watch.subject: list(check_pass(watch, nudged=watch.subject in nudged)) for watch in listed}
        stepped = check_step(subjects, listed, watches.reads, training)
    for subject in subjects:
        findings += [*passed[subject], *check_training(subject, training), *stepped[subject]]
    if not counts:
        findings = [
            Finding(one.check, one.memory, "skip", "not checked: no label counts")
            if one.check in _OF_GRADIENTS
            else one
            for one in findings
        ]
    return Report(tuple(findings))


def _seed() -> None:
    """Dropout: the same report each time. torch.manual_seed would queue a seed for devices that are not in use."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes, or a fixed random projection of its first floating output."""
    if isinstance(batch, Mapping):
        output = model(**_with_labels(model, batch))
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(value, Tensor):
        return value
    first = next(_floating(output), None)
    if first is None:
        raise ValueError(f"loss must be given for a model that returns no floating tensor, got {type(output).__name__}")
    # Not a mean of squares, which has no gradient behind a norm.
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(first.shape, generator=generator).to(first.device, torch.float32)
    tokens = max(1, first.numel() // max(1, first.shape[-1] if first.ndim else 1))
    return (first.float() * direction).sum() / tokens


def _with_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(batch)
    if "input_ids" in given and "labels" not in given and _is_causal_lm(model):
        given["labels"] = _labels(given["input_ids"], given.get("attention_mask"))
    return given


def _has_labels(model: nn.Module, batch: Any) -> bool:
    """Whether any label counts, where there are some."""
    labels = _with_labels(model, batch).get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return True
    if _is_causal_lm(model):  # the first of a sequence is predicted by nothing
        labels = labels[..., 1:]
    return bool((labels != -100).any())


def _labels(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    return input_ids if mask is None or mask.shape != input_ids.shape else input_ids.masked_fill(mask == 0, -100)


def _is_causal_lm(model: nn.Module) -> bool:
    """By the names of classes; also inside of what wraps it."""
    names = {kind.__name__ for module in (model, *model.modules()) for kind in type(module).__mro__}
    has_head = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    forward = getattr(model, "_orig_mod", model).forward
    parameters = inspect.signature(forward).parameters.values()
    return has_head and any(entry.name == "labels" or entry.kind is entry.VAR_KEYWORD for entry in parameters)


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _floating(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _floating(part)


def _check_loss(value: Any, *, counts: bool) -> Finding:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must be a tensor of one number, got {got}")
    if not value.requires_grad:
        return Finding(
            "loss", None, "fail", "it depends on nothing that requires a gradient", "unfreeze what is trained"
        )
    number = float(value.detach())
    if not counts:
        return Finding(
            "loss", None, "fail", f"it is {number:.4g}: no label counts (all are -100, or first of a sequence)",
            "give a batch with labels",
        )  # fmt: skip
    if number - number != 0:
        return Finding("loss", None, "fail", f"it is {number}", "look at the batch, and at the model's parameters")
    return Finding("loss", None, "pass", f"{number:.4g}, finite")


def _as_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    given = [] if optimizer is None else [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    optimizers = []
    for one in given if isinstance(given, Iterable) else [given]:
        while isinstance(inner := getattr(one, "optimizer", None), torch.optim.Optimizer):  # accelerate's wrapper
            one = inner
        if not isinstance(one, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be one torch.optim.Optimizer or several, got {type(one).__name__}")
        optimizers.append(one)
    return optimizers


@torch.no_grad()
def _open_gate(subject: Subject) -> bool:
    """A gate at zero hides everything behind it; whether it was."""
    gate = subject.gate
    if gate is None or bool(gate.any()):
        return False
    gate.fill_(1)
    return True


@contextlib.contextmanager
def _without_lost_tables(subjects: Sequence[Subject]) -> Iterator[None]:
    """A table whose owner is gone raises in backward: it gets no gradient, so that the rest can be looked at."""
    tables = {table: None for subject in subjects for table in subject.tables}
    lost = [table for table in tables if has_lost_owner(table) and table.weight.requires_grad]
    for table in lost:
        table.weight.requires_grad_(False)
    try:
        yield
    finally:
        for table in lost:
            table.weight.requires_grad_(True)
