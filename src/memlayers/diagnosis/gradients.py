"""Do its parameters get gradients, and is everything that must be trained trainable?"""

import torch
from torch import nn

from memlayers.diagnosis.findings import NOT_REACHED, Answer, fails, not_checked, passed, warns
from memlayers.diagnosis.subjects import has_lost_owner
from memlayers.diagnosis.watch import Watch
from memlayers.query import MaskedBatchNorm
from memlayers.values import ValueTable


def gradients(watch: Watch) -> Answer:
    """After the backward pass every trainable parameter has a gradient that is finite and not zero."""
    if not watch.has_gradient:
        return NOT_REACHED
    subject = watch.subject
    tables = {table.weight: table for table in subject.tables}
    both: list[str] = []
    names: dict[str, list[str]] = {"not finite": [], "missing": [], "zero": [], "fine": []}
    for name, parameter in subject.parameters():
        table = tables.get(parameter)
        if not parameter.requires_grad or (table is not None and has_lost_owner(table)):
            continue
        if table is not None and table.row_gradient is not None and parameter.grad is not None:
            both.append(name)
        found = _gradient(parameter, table)
        names["fine" if found == "zero" and _may_be_zero(watch, name, parameter) else found].append(name)
    fine, zero = len(names.pop("fine")), names["zero"]
    stuck = [name for name in zero if subject.layer.config.topk == 1 and name.startswith(("query.", "keys."))]
    names["zero"] = [name for name in zero if name not in stuck]
    if said := [f"of {', '.join(of)} it is {what}" for what, of in names.items() if of]:
        return fails(
            f"the gradient is wrong: {'; '.join(said)}",
            "see whether something detaches, freezes or overflows on the way to the loss",
        )
    if both:
        return fails(
            f"{', '.join(both)} has a dense gradient beside that of its rows: a step writes wherever it is not 0",
            "let the loss not use the table itself, as a penalty on its rows does; or train it with dense gradients",
        )
    if stuck:
        return warns(
            f"of {', '.join(stuck)} it is zero: the weight of a single neighbour is always 1",
            "use a topk of at least 2, or query and keys are never trained",
        )
    if not fine:
        return not_checked("nothing in it is trainable")
    return passed(f"finite and not zero for all {fine} trainable parameters")


def frozen(watch: Watch) -> Answer:
    """The table is trainable, and a gate that is zero; other parameters may be frozen, which is said."""
    subject = watch.subject
    if watch.gate_was_zero and subject.gate is not None and not subject.gate.requires_grad:
        return fails(
            "the gate is zero and frozen: nothing of the memory ever reaches the model",
            "call requires_grad_(True) on the gate; with PEFT, do so after get_peft_model",
        )
    if not subject.table.weight.requires_grad:
        return fails(
            "the table is frozen (requires_grad is False): no row is ever written",
            "call requires_grad_(True) on values.weight; with PEFT, do so after get_peft_model",
        )
    if names := [name for name, parameter in subject.parameters() if not parameter.requires_grad]:
        return warns(
            f"{', '.join(names)} will not be trained (requires_grad is False)",
            "call requires_grad_(True) on what is to be trained",
        )
    return passed("nothing is")


def _gradient(parameter: nn.Parameter, table: ValueTable | None) -> str:
    """What the gradient is: missing, not finite, zero or fine."""
    if table is not None and table.row_gradient is not None:
        rows = table.row_gradient
        if rows.is_empty:
            return "missing"
        return "not finite" if not bool(rows.is_finite()) else "fine" if bool(rows.norm() > 0) else "zero"
    if parameter.grad is None:
        return "missing"
    is_finite = bool(torch.isfinite(parameter.grad).all())
    return "not finite" if not is_finite else "fine" if bool(parameter.grad.any()) else "zero"


def _may_be_zero(watch: Watch, name: str, parameter: nn.Parameter) -> bool:
    """A bias before BatchNorm changes nothing; LoRA's first matrix has no gradient before the second moves."""
    query = watch.subject.layer.query
    last = getattr(query.projections[-1], "bias", None) if hasattr(query, "projections") else None
    is_bias_before_norm = parameter is last and isinstance(getattr(query, "norm", None), MaskedBatchNorm)
    return is_bias_before_norm or "lora_" in name
