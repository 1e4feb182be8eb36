"""Are slots used: as many as the number of distinct tokens allows, or has the query collapsed?

A few tokens cannot use a million slots, so figures are compared with those of as many reads drawn uniformly. Letters:
T tokens, D model width, H heads, K rows a head reads, S slots, N sub-keys a codebook, n reads, P coordinates of a
fingerprint.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memlayers.diagnosis.findings import NOT_REACHED, Answer, fails, passed, warns
from memlayers.diagnosis.watch import Watch

LEAST_TOKENS = 8  # fewer distinct tokens say nothing
LEAST_SUBKEYS = 8  # with fewer, a head or a codebook with random keys alone may have a slot or two that win


class Spread(NamedTuple):
    """How the reads of T distinct tokens are spread over the slots; 1 is as uniform reads are, but for `overlap`."""

    usage: float  # distinct slots
    effective: float  # exp(entropy) of the reads, that is S * exp(-KL)
    top1: float  # distinct slots that were the best of a head
    overlap: float  # share of its slots that a token has in common with another, beyond chance: 1 is all


# (warn, fail). On 256 to 16,384 tokens a memory with random weights has 0.75 to 1 of each share; trained ones had as
# little as 0.19, 0.10 and 0.08, with an overlap of 0.03; collapsed ones 0.01, 0.004 and 0.003, with one of 0.7.
LIMITS = {"usage": (0.10, 0.03), "effective": (0.05, 0.02), "top1": (0.05, 0.015), "overlap": (0.3, 0.5)}
# How often two tokens have the same best sub-key in a codebook, beyond chance: 0.3 at most with random weights, 0.2 in
# memories that were trained, 0.5 in one after a few steps.
AGREEMENT_LIMITS = (0.6, 0.8)
_OF_A_HEAD = ("overlap", "top1", "usage")  # by KL, heads that were trained differ too much
_WORDS = {
    "usage": "they use {:.1%} of the slots that as many uniform reads would",
    "effective": "by KL they spread over {:.1%} of what uniform reads would",
    "top1": "their best slots are {:.1%} of what uniform ones would be",
    "overlap": "two tokens share {:.0%} of their slots",
}


def usage(watch: Watch) -> Answer:
    """The slots that are read are as many as the number of distinct tokens allows."""
    if not watch.tokens:
        return NOT_REACHED
    config, x_TD = watch.subject.layer.config, torch.cat(watch.inputs_TD)
    is_alike = len({part.shape[1:] for part in watch.slots_THK}) == 1
    if not is_alike or sum(map(len, watch.slots_THK)) != len(x_TD):
        return Answer("skip", "the searches do not fit the tokens")
    slots_THK = torch.cat(watch.slots_THK)[_distinct(x_TD)]
    if len(slots_THK) < LEAST_TOKENS:
        return Answer("skip", f"{len(slots_THK)} distinct tokens say nothing; give a batch of at least {LEAST_TOKENS}")
    found = spread(slots_THK, config.slots)
    read = (
        f"{len(slots_THK):,} distinct tokens read {len(slots_THK.unique()):,} of {config.slots:,} slots "
        f"({len(slots_THK[..., 0].unique()):,} as the best)"
    )
    said, has_collapsed = judge(slots_THK, config.slots, config.num_subkeys if config.keys == "product" else None)
    if not said:
        return passed(f"{read}: {found.usage:.0%} of what uniform reads would, {found.effective:.0%} by KL")
    advice = "lower the learning rate of query and keys, or look for inputs that hardly differ"
    if config.query_norm != "batch":
        advice = (
            "use query_norm='batch', which takes off what all inputs have in common (hidden states of pretrained "
            f"models have much); or {advice.replace(' of query and keys', '')}"
        )
    if has_collapsed:
        return fails(f"the query has collapsed: {read}; {'; '.join(said)}", advice)
    return warns(f"reads are narrow: {read}; {'; '.join(said)}", advice)


def spread(slots_THK: Tensor, num_slots: int) -> Spread:
    """Of tokens that differ; at least two. Waits for the device."""
    tokens, heads, topk = slots_THK.shape
    # Of what was read only: there may be millions of slots.
    of_heads = [slots_THK[:, head].unique(return_counts=True)[1].double() for head in range(heads)]
    counts = slots_THK.unique(return_counts=True)[1].double()
    reads = tokens * heads * topk
    share = counts / reads
    entropy = -float(torch.special.xlogy(share, share).sum())
    pairs = sum(float((each * (each - 1)).sum()) for each in of_heads) / (heads * topk * tokens * (tokens - 1))
    chance = topk / num_slots
    return Spread(
        usage=len(counts) / expected_usage(num_slots, reads),
        effective=math.exp(entropy) / expected_effective(num_slots, reads),
        top1=len(slots_THK[..., 0].unique()) / expected_usage(num_slots, tokens * heads),
        overlap=max(0.0, (pairs - chance) / (1 - chance)) if chance < 0.5 else 0.0,
    )


def complaints(found: Spread) -> tuple[list[str], bool]:
    """What is out of its limits, in words, and whether any of it is a collapse."""
    past = [name for name in LIMITS if _is_past(found, name, of="warn")]
    said = [_WORDS[name].format(getattr(found, name)) for name in past]
    return said, any(_is_past(found, name, of="fail") for name in past)


def judge(slots_THK: Tensor, num_slots: int, num_subkeys: int | None) -> tuple[list[str], bool]:
    """`complaints` of all heads, of the worst head alone, and of its codebooks (None: the keys are no product)."""
    said, has_collapsed = complaints(spread(slots_THK, num_slots))
    if has_collapsed or num_slots < LEAST_SUBKEYS**2:
        return said, has_collapsed  # of each head the same would be said
    heads = slots_THK.shape[1]
    alone = [spread(slots_THK[:, [head]], num_slots) for head in range(heads)]
    worst = max(range(heads), key=lambda head: alone[head].overlap)
    for head in dict.fromkeys((worst, *range(heads))) if heads > 1 else ():
        if past := [name for name in _OF_A_HEAD if _is_past(alone[head], name, of="fail")]:
            words = "; ".join(_WORDS[name].format(getattr(alone[head], name)) for name in past)
            return [*said, f"of head {head} alone: {words}"], True
    if num_subkeys is not None and num_subkeys >= LEAST_SUBKEYS:
        warn, fail = AGREEMENT_LIMITS
        share, codebook, head = max(
            (_agreement(part_TH[:, head], num_subkeys), codebook, head)
            for codebook, part_TH in (
                ("first", slots_THK[..., 0] // num_subkeys),
                ("second", slots_THK[..., 0] % num_subkeys),
            )
            for head in range(heads)
        )
        if share > warn:
            said = [
                *said,
                f"in the {codebook} codebook of head {head} two tokens have one best sub-key in {share:.0%} of cases",
            ]
            has_collapsed = share > fail
    return said, has_collapsed


def _is_past(found: Spread, name: str, *, of: str) -> bool:
    value, limit = getattr(found, name), LIMITS[name][of == "fail"]
    return value > limit if name == "overlap" else value < limit


def _agreement(best_T: Tensor, num_subkeys: int) -> float:
    """How often two tokens have the same best sub-key, beyond chance."""
    counts = best_T.bincount(minlength=num_subkeys).double()
    pairs = float((counts * (counts - 1)).sum()) / (len(best_T) * (len(best_T) - 1))
    return (pairs - 1 / num_subkeys) / (1 - 1 / num_subkeys)


def first_of_alike(points_TP: Tensor, *, alike: float = 0.5) -> Tensor:
    """Places [T] (bool) of the tokens that no earlier one is like: nearer than `alike` of their distance from the mean.

    A sequence that comes again in training comes with hidden states that have moved a little, each time.
    """
    points_TP = points_TP - points_TP.mean(0)
    size_T = points_TP.square().sum(-1)
    is_first_T = torch.ones(len(points_TP), dtype=torch.bool, device=points_TP.device)
    step = max(1, 2**22 // max(1, len(points_TP)))  # so that a wide window needs no large matrix
    for start in range(0, len(points_TP), step):
        rows, size = points_TP[start : start + step], size_T[start : start + step, None]
        before = points_TP[: start + len(rows)]
        distance = size + size_T[: len(before)] - 2 * rows @ before.T
        is_alike = distance <= alike**2 * torch.minimum(size, size_T[: len(before)])
        is_first_T[start : start + len(rows)] = ~is_alike.tril(start - 1).any(-1)
    return is_first_T


def expected_usage(num_slots: int, reads: int) -> float:
    """Distinct slots among uniform reads."""
    return -num_slots * math.expm1(reads * math.log1p(-1 / num_slots)) if num_slots > 1 else 1.0


def expected_effective(num_slots: int, reads: int) -> float:
    """exp(entropy) of uniform reads, from the Poisson distribution of the count c of a slot.

    Entropy = ln n - (S / n) * E[c ln c].
    """
    mean = reads / num_slots
    if mean > 1000:  # counts hardly differ
        return num_slots * math.exp(-0.5 / mean)
    most = int(mean + 12 * math.sqrt(mean) + 30)
    inner = sum(
        math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) * count * math.log(count)
        for count in range(2, most)
    )
    return math.exp(math.log(reads) - inner / mean)


def _distinct(x_TD: Tensor) -> Tensor:
    """The places of the first of each group of equal tokens."""
    _, group_T = torch.unique(x_TD, dim=0, return_inverse=True)
    order = torch.arange(len(x_TD), device=x_TD.device)
    first = torch.full((int(group_T.max()) + 1,), len(x_TD), device=x_TD.device)
    return first.scatter_reduce_(0, group_T, order, "amin")
