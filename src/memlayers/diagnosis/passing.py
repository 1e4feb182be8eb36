"""Checks of one pass through the model: what reached each memory, what it did, and what came back to it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from memlayers.diagnosis.collapse import LEAST_TOKENS, judge, spread
from memlayers.diagnosis.report import Finding, State
from memlayers.diagnosis.subjects import has_lost_owner
from memlayers.diagnosis.watch import Watch
from memlayers.query import MaskedBatchNorm

# A memory's output beside its input, or a network's. Random memories of widths 16 to 256 have 0.01 to 0.5 of their
# input, trained ones had 0.07 to 3.4.
LEAST_RATIO, MOST_RATIO = 1e-3, 1e2
NO_WEIGHT = 1e-12  # of the largest weight of a head: no gradient that arrives there is seen beside those of others


def check_pass(watch: Watch, *, nudged: bool) -> Iterator[Finding]:
    """All findings of the pass for one memory; nudged: its gate was zero and was opened for the check."""
    yield reached(watch, nudged=nudged)
    yield neighbours(watch)
    yield usage(watch)
    yield output(watch)
    yield gradients(watch)
    yield frozen(watch, nudged=nudged)


def reached(watch: Watch, *, nudged: bool) -> Finding:
    """The model calls the memory, and its loss depends on what comes out."""
    if not watch.calls:
        return _finding(
            watch, "reached", "fail",
            "the memory was bypassed: the model never called it",
            "see that the block calls the module under which the memory stands",
        )  # fmt: skip
    calls = f"{watch.calls} call{'s' * (watch.calls != 1)}, {watch.tokens:,} tokens"
    if not watch.can_have_gradient:
        return _finding(
            watch, "reached", "fail",
            f"{calls}, but outside of any gradient (torch.no_grad, or everything before and in it is frozen)",
            "let the memory's parameters require gradients, and call it where gradients are recorded",
        )  # fmt: skip
    if not watch.has_gradient:
        return _finding(
            watch, "reached", "fail",
            f"{calls}, but its output is dropped: the loss does not depend on it (its gradient is zero)",
            "see that the block adds the memory's output to what it returns, and detaches nothing on the way",
        )  # fmt: skip
    gate = "; its gate is still zero, and was opened for this check" if nudged else ""
    return _finding(watch, "reached", "pass", f"{calls}; the loss depends on its output{gate}")


def neighbours(watch: Watch) -> Finding:
    """K as asked: K distinct hits a head, and all of them arrive at the table with a weight."""
    config, layer = watch.subject.layer.config, watch.subject.layer
    heads, topk = config.heads, config.topk
    if not watch.tokens:
        return _not_reached(watch, "neighbours")
    wrong = []
    asked = getattr(layer.keys, "topk", topk)
    if asked != topk:
        wrong.append(f"its keys search {asked} slots, the configuration says topk = {topk}")
    for slots_THK in watch.slots_THK:
        if slots_THK.shape[1:] != (heads, topk):
            wrong.append(
                f"a search finds {slots_THK.shape[1]} x {slots_THK.shape[2]} slots instead of {heads} x {topk}"
            )
        elif topk > 1:
            sorted_THK = slots_THK.sort(-1).values
            repeated = float((sorted_THK[..., 1:] == sorted_THK[..., :-1]).float().mean())
            if repeated > 0:
                wrong.append(f"a head finds the same slot twice ({repeated:.1%} of neighbours)")
    arrived = []
    for number, (read, mask_T) in enumerate(zip(watch.reads, watch.masks_T, strict=True)):
        if read.slots_TK.shape[-1] != heads * topk:
            wrong.append(f"{read.slots_TK.shape[-1]} rows a token are read instead of {heads} x {topk}")
            continue
        is_padded = mask_T is not None and len(mask_T) == len(read.slots_TK)
        slots_TK, weights_TK = (one[mask_T] if is_padded else one for one in (read.slots_TK, read.weights_TK))
        arrived.append(weights_TK.unflatten(-1, (heads, topk)))
        if len(watch.reads) == len(watch.slots_THK) and len(slots_TK) == len(watch.slots_THK[number]):
            found, got = (_distinct_slots(one.flatten(1)) for one in (watch.slots_THK[number], slots_TK))
            if got < found:
                wrong.append(f"{got:.3g} distinct rows a token are read where the search found {found:.3g}")
    if not watch.reads:
        wrong.append("no row of the table is read")
    zero = _zeros(watch.weights_THK if watch.reads_otherwise else arrived)
    if zero > 0.05:
        wrong.append(f"{zero:.1%} of the weights of neighbours are zero")
    if wrong:
        return _finding(
            watch, "neighbours", "fail",
            f"K is ignored: {'; '.join(dict.fromkeys(wrong))}",
            "see what lies between config.topk and the read of the table",
        )  # fmt: skip
    if zero:
        return _finding(
            watch, "neighbours", "warn",
            f"{heads} x {topk} distinct slots a token, but {zero:.2%} of their weights are zero: scores are too far "
            "apart",
            "lower the learning rate of query and keys, or normalise the query",
        )  # fmt: skip
    if watch.reads_otherwise and (zero := _zeros(arrived)) > 0.05:
        return _finding(
            watch, "neighbours", "warn",
            f"{heads} x {topk} distinct slots a token with a weight, {zero:.1%} of which `read` sets to zero",
            "nothing to do if that is meant, as where a relu chooses experts",
        )  # fmt: skip
    return _finding(watch, "neighbours", "pass", f"{heads} x {topk} distinct slots a token, all with a weight")


def usage(watch: Watch) -> Finding:
    """The slots that are read are as many as the number of distinct tokens allows."""
    if not watch.tokens:
        return _not_reached(watch, "usage")
    slots_THK = torch.cat(watch.slots_THK) if len({part.shape[1:] for part in watch.slots_THK}) == 1 else None
    x_TD = torch.cat(watch.inputs_TD)
    if slots_THK is None or len(slots_THK) != len(x_TD):
        return _finding(watch, "usage", "skip", "the searches do not fit the tokens")
    tokens_of = _distinct(x_TD)
    distinct = len(tokens_of)
    if distinct < LEAST_TOKENS:
        return _finding(
            watch, "usage", "skip", f"{distinct} distinct tokens say nothing; give a batch of at least {LEAST_TOKENS}"
        )
    config = watch.subject.layer.config
    num_slots = config.slots
    slots_THK = slots_THK[tokens_of]
    used, best = len(slots_THK.unique()), len(slots_THK[..., 0].unique())
    found = spread(slots_THK, num_slots)
    said, has_collapsed = judge(slots_THK, num_slots, config.num_subkeys if config.keys == "product" else None)
    if said:
        what = "the query has collapsed: " if has_collapsed else "reads are narrow: "
        return _finding(
            watch, "usage", "fail" if has_collapsed else "warn",
            f"{what}{distinct:,} distinct tokens read {used:,} of {num_slots:,} slots ({best:,} as the best); "
            f"{'; '.join(said)}",
            "lower the learning rate of query and keys, or look for inputs that hardly differ"
            if config.query_norm == "batch" else
            "use query_norm='batch', which takes off what all inputs have in common (hidden states of pretrained "
            "models have much); or lower the learning rate, or look for inputs that hardly differ",
        )  # fmt: skip
    return _finding(
        watch, "usage", "pass",
        f"{distinct:,} distinct tokens read {used:,} of {num_slots:,} slots ({best:,} as the best): {found.usage:.0%} "
        f"of what uniform reads would, {found.effective:.0%} by KL",
    )  # fmt: skip


def output(watch: Watch) -> Finding:
    """The size of its output, beside that of a feed-forward network or of its input."""
    if not watch.tokens:
        return _not_reached(watch, "output")
    rms = watch.output.rms
    if rms == 0 or rms - rms != 0:
        what = "zero" if rms == 0 else "not finite"
        return _finding(
            watch, "output", "fail", f"its output is {what}",
            "look at the table and at what comes in: something there is" + f" {what}, too",
        )  # fmt: skip
    others = sorted(squares.rms for squares in watch.beside if squares.count)
    network = "the network beside it" if watch.subject.is_parallel else "other blocks' networks"
    beside = {"its input": _rms(watch.inputs_TD)} | ({network: others[len(others) // 2]} if others else {})
    ratios = {what: rms / other for what, other in beside.items() if other > 0}
    said = f"root mean square {rms:.3g}" + "".join(
        f", {ratio:.3g} times that of {what}" for what, ratio in ratios.items()
    )
    if far_off(list(ratios.values())):
        return _finding(
            watch, "output", "warn", said,
            f"expected is {LEAST_RATIO:g} to {MOST_RATIO:g}: look at the scale of table and output projection",
        )  # fmt: skip
    return _finding(watch, "output", "pass", said)


def far_off(ratios: list[float]) -> bool:
    """Beside everything that it is compared with: a network with small random weights says little alone."""
    return bool(ratios) and not any(LEAST_RATIO <= ratio <= MOST_RATIO for ratio in ratios)


def gradients(watch: Watch) -> Finding:
    """After the backward pass every trainable parameter has a gradient that is finite and not zero."""
    subject = watch.subject
    if not watch.has_gradient:
        return _not_reached(watch, "gradients")
    none, bad, zero, both, fine = [], [], [], [], 0
    tables = {table.weight: table for table in subject.tables}
    for name, parameter in subject.parameters():
        table = tables.get(parameter)
        if not parameter.requires_grad or (table is not None and has_lost_owner(table)):
            continue
        if table is not None and table.row_gradient is not None:
            rows = table.row_gradient
            if parameter.grad is not None:
                both.append(name)
            is_there, is_finite, is_zero = not rows.is_empty, bool(rows.is_finite()), not bool(rows.norm() > 0)
        else:
            grad = parameter.grad
            is_there = grad is not None
            is_finite = grad is not None and bool(torch.isfinite(grad).all())
            is_zero = grad is not None and not bool(grad.any())
        if not is_there:
            none.append(name)
        elif not is_finite:
            bad.append(name)
        elif is_zero and not _may_be_zero(watch, name, parameter):
            zero.append(name)
        else:
            fine += 1
    stuck = [name for name in zero if subject.layer.config.topk == 1 and name.startswith(("query.", "keys."))]
    wrong = [(bad, "not finite"), (none, "missing"), ([name for name in zero if name not in stuck], "zero")]
    if said := [f"of {', '.join(names)} it is {what}" for names, what in wrong if names]:
        return _finding(
            watch, "gradients", "fail", f"the gradient is wrong: {'; '.join(said)}",
            "see whether something detaches, freezes or overflows on the way to the loss",
        )  # fmt: skip
    if both:
        return _finding(
            watch, "gradients", "fail",
            f"{', '.join(both)} has a dense gradient beside that of its rows, which its row optimizer does not see",
            "let the loss not use the table itself, as a penalty on its rows does; or train it with dense gradients",
        )  # fmt: skip
    if stuck:
        return _finding(
            watch, "gradients", "warn",
            f"of {', '.join(stuck)} it is zero: the weight of a single neighbour is always 1",
            "use a topk of at least 2, or query and keys are never trained",
        )  # fmt: skip
    if not fine:
        return _finding(watch, "gradients", "skip", "not checked: nothing in it is trainable")
    return _finding(watch, "gradients", "pass", f"finite and not zero for all {fine} trainable parameters")


def frozen(watch: Watch, *, nudged: bool) -> Finding:
    """The table is trainable, and a gate that is zero; other parameters may be frozen, which is said."""
    subject = watch.subject
    if nudged and subject.gate is not None and not subject.gate.requires_grad:
        return _finding(
            watch, "frozen", "fail", "the gate is zero and frozen: nothing of the memory ever reaches the model",
            "call requires_grad_(True) on the gate; with PEFT, do so after get_peft_model",
        )  # fmt: skip
    if not subject.table.weight.requires_grad:
        return _finding(
            watch, "frozen", "fail", "the table is frozen (requires_grad is False): no row is ever written",
            "call requires_grad_(True) on values.weight; with PEFT, do so after get_peft_model",
        )  # fmt: skip
    names = [name for name, parameter in subject.parameters() if not parameter.requires_grad]
    if names:
        return _finding(
            watch, "frozen", "warn", f"{', '.join(names)} will not be trained (requires_grad is False)",
            "call requires_grad_(True) on what is to be trained",
        )  # fmt: skip
    return _finding(watch, "frozen", "pass", "nothing is")


def _may_be_zero(watch: Watch, name: str, parameter: nn.Parameter) -> bool:
    """A bias before BatchNorm changes nothing; LoRA's first matrix has no gradient before the second moves."""
    query = watch.subject.layer.query
    last = getattr(query.projections[-1], "bias", None) if hasattr(query, "projections") else None
    is_bias_before_norm = parameter is last and isinstance(getattr(query, "norm", None), MaskedBatchNorm)
    return is_bias_before_norm or "lora_" in name


def _distinct_slots(slots_TM: Tensor) -> float:
    """How many a token has, on average."""
    sorted_TM = slots_TM.sort(-1).values
    return 1 + float((sorted_TM[:, 1:] != sorted_TM[:, :-1]).sum(-1).double().mean()) if len(slots_TM) else 0.0


def _zeros(weights_THK: list[Tensor]) -> float:
    """Share of the weights that are zero, or as good as that beside the largest of their head."""
    sizes_THK = [weights.abs().double() for weights in weights_THK]
    zero = sum(int((size <= NO_WEIGHT * size.amax(-1, keepdim=True)).sum()) for size in sizes_THK)
    return zero / max(1, sum(size.numel() for size in sizes_THK))


def _distinct(x_TD: Tensor) -> Tensor:
    """The places of the first of each group of equal tokens."""
    _, group_T = torch.unique(x_TD, dim=0, return_inverse=True)
    order = torch.arange(len(x_TD), device=x_TD.device)
    first = torch.full((int(group_T.max()) + 1,), len(x_TD), device=x_TD.device)
    return first.scatter_reduce_(0, group_T, order, "amin")


def _rms(parts: list[Tensor]) -> float:
    total = sum(float(part.double().square().sum()) for part in parts)
    return (total / sum(part.numel() for part in parts)) ** 0.5


def _finding(watch: Watch, check: str, state: State, message: str, advice: str = "") -> Finding:
    return Finding(check, watch.subject.name, state, message, advice)


def _not_reached(watch: Watch, check: str) -> Finding:
    return _finding(watch, check, "skip", "not checked: the memory is not reached")
