"""select_slots: the slots that new text reads and old text does not. slot_rates: how far each row may move.

Letters: S slots, R slots that are chosen.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from memlayers.checks import require_choice, require_int, require_number
from memlayers.finetuning.counts import SlotCounts, sizes_text
from memlayers.finetuning.names import layers_by_table
from memlayers.layer import MemoryLayer
from memlayers.values import ValueTable, value_tables

Method = Literal["tfidf", "kl", "all"]


def select_slots(
    model: nn.Module,
    counts: SlotCounts | None,
    batch: Mapping[str, Any] | Tensor | SlotCounts,
    *,
    method: Method = "tfidf",
    slots: int | None = None,
) -> dict[ValueTable, Tensor]:
    """The slots of each table that are most specific to some text, for `choose_rows` of an optimizer.

    Of the slots that the text reads, those with the best scores are taken; of equal scores, those that it reads more
    often. With c(i) the reads of slot i in the text, C(i) those in the background, B the batches of the background, and
    b(i) those of them that read slot i, the score is (Lin et al. 2025, arXiv 2510.15103)

        "tfidf"   c(i) / (sum of c) * log((B + 1) / (b(i) + 1))
        "kl"      p(i) * log(p(i) / q(i)),  p(i) = c(i) / (sum of c),  q(i) = (C(i) + 1) / (sum of C + S)

    and "all" takes every slot that the text reads. One is added to each C(i), so that a slot which the background never
    reads has a score.

    Args:
        model: with memories; a memory alone. It is called once, in eval mode, without gradients.
        counts: of the background; None only for "all".
        batch: the arguments of the model by name, or its first one; or the `SlotCounts` of a whole set of texts, or of
            what was read in training: then the model is not called.
        method: of the scores.
        slots: how many to take of each table at most; None only for "all", which takes no number.

    Returns:
        By table, slots in ascending order. Those of `Experts` have two tables with the same slots.

    Raises:
        ValueError: `slots` or `counts` that do not go with the method; counts of other tables, or of nothing.
    """
    require_method(method, slots, counts)
    if not isinstance(batch, SlotCounts) and counts is not None and counts.is_listening:
        raise ValueError("counts must not listen while the model is called with new text, which is no background")
    new = batch if isinstance(batch, SlotCounts) else _counted(model, batch)
    own = layers_by_table(model)
    for what, given in (("counts", counts), ("batch", new)):
        if given is not None:
            _require_counts_of(own, what, given)
    chosen = {
        name: reads_S.nonzero().squeeze(1)
        if counts is None or method == "all"
        else best(scores(method, reads_S, counts, name), reads_S, slots or 0)
        for name, reads_S in new.reads.items()
    }
    return _by_table(own, chosen)


def slot_rates(model: nn.Module, counts: SlotCounts, *, floor: float = 0.1) -> dict[ValueTable, Tensor]:
    """How far each row of each table may move, by how rarely old text reads it, for `choose_rows` of `RowSGD`.

    With f(i) the reads of slot i in the background over the mean of all slots, the rate is floor / (f(i) + floor): 1
    for a slot that is never read, 1/2 for one that is read `floor` times as often as the mean, small for one that is
    read often. Of all changes d(i) of rows that change the output at the new text alike, where row i is read with
    weight w(i), those with the least sum of f(i) d(i)^2, about what they do to the background, are proportional to
    w(i) / f(i): a step of plain gradient descent by these rates. A choice of some slots is the coarse form of it.

    Args:
        model: with memories; a memory alone. It is not called.
        counts: of the background.
        floor: above 0; the less, the more the rarest rows alone move.

    Returns:
        By table, the rate of each slot [S] in float32, in (0, 1]; multiplied with ``lr`` by the optimizer.

    Raises:
        ValueError: a floor that is not above 0; counts of other tables, or of nothing.
    """
    require_number("floor", floor, above=0.0)
    own = layers_by_table(model)
    _require_counts_of(own, "counts", counts)
    mean = {name: max(float(reads_S.double().mean()), 1e-300) for name, reads_S in counts.reads.items()}
    return _by_table(
        own, {name: (floor / (one.double() / mean[name] + floor)).float() for name, one in counts.reads.items()}
    )


def _require_counts_of(own: Mapping[str, list[MemoryLayer]], what: str, given: SlotCounts) -> None:
    """Raises `ValueError` for counts of other tables, or of nothing."""
    sizes = {name: layers[0].config.slots for name, layers in own.items()}
    counted = {name: len(one) for name, one in given.reads.items()}
    if counted != sizes:
        raise ValueError(f"{what} must count the slots of {sizes_text(sizes)}, got those of {sizes_text(counted)}")
    if not given.batches:
        raise ValueError(f"{what} must be of text that memories read, got {what} of which no slot was read")


def _by_table(own: Mapping[str, list[MemoryLayer]], found: Mapping[str, Tensor]) -> dict[ValueTable, Tensor]:
    """What was found by name, by table; those of `Experts` have two with the same slots."""
    return {
        table: found[name]
        for name, layers in own.items()
        for layer in layers
        for table in value_tables(layer)
        if table.shape[0] == layers[0].config.slots
    }


def require_method(method: str, slots: int | None, counts: SlotCounts | None) -> None:
    """Raises `ValueError` unless slots and counts go with the method."""
    require_choice("method", method, get_args(Method))
    if method == "all":
        if slots is not None:
            raise ValueError(f"slots must be None with method='all', which takes every slot that is read, got {slots}")
    else:
        require_int("slots", slots, least=1)
        if counts is None:
            raise ValueError(f"counts must be those of background text with method={method!r}, got None")


def scores(method: Method, reads_S: Tensor, counts: SlotCounts, name: str) -> Tensor:
    """The score [S] of each slot, in float64, as in `select_slots`."""
    share_S = reads_S.double() / reads_S.sum().clamp(min=1)
    background_S, with_S = (one[name].to(reads_S.device).double() for one in (counts.reads, counts.batches_with))
    if method == "tfidf":
        return share_S * ((counts.batches + 1) / (with_S + 1)).log()
    before_S = (background_S + 1) / (background_S.sum() + len(background_S))
    return torch.special.xlogy(share_S, share_S / before_S)


def best(score_S: Tensor, reads_S: Tensor, slots: int) -> Tensor:
    """Of the slots that are read, those with the best scores; ascending."""
    order_R = reads_S.nonzero().squeeze(1)  # few of a large table, so that a choice at each step costs little
    for key_S in (reads_S, score_S):
        order_R = order_R[torch.argsort(key_S[order_R], descending=True, stable=True)]
    return order_R[:slots].sort().values


@torch.no_grad()
def _counted(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> SlotCounts:
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        with SlotCounts(model) as new:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    return new
