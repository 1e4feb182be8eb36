"""Whether the slots that a memory reads are as many as the number of tokens allows.

A few tokens cannot use a million slots, so figures are compared with those of as many reads drawn uniformly. Letters:
T tokens, H heads, K neighbours, S slots, n reads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_TOKENS = 8  # fewer distinct tokens say nothing


class Spread(NamedTuple):
    """How the reads of T distinct tokens are spread over the slots; 1 is as uniform reads are, but for `overlap`."""

    usage: float  # distinct slots
    effective: float  # exp(entropy) of the reads, that is S * exp(-KL)
    top1: float  # distinct slots that were the best of a head
    overlap: float  # share of its slots that a token has in common with another, beyond chance: 1 is all


# (warn, fail). On 256 to 16,384 tokens a memory with random weights has 0.75 to 1 of each share; trained ones had as
# little as 0.19, 0.10 and 0.08, with an overlap of 0.03; collapsed ones 0.01, 0.004 and 0.003, with one of 0.7.
LIMITS = {"usage": (0.10, 0.03), "effective": (0.05, 0.02), "top1": (0.05, 0.015), "overlap": (0.3, 0.5)}
_WORDS = {
    "usage": "they use {:.1%} of the slots that as many uniform reads would",
    "effective": "by KL they spread over {:.1%} of what uniform reads would",
    "top1": "their best slots are {:.1%} of what uniform ones would be",
    "overlap": "two tokens share {:.0%} of their slots",
}


def spread(slots_THK: Tensor, num_slots: int) -> Spread:
    """Of tokens that differ; at least two. Waits for the device."""
    tokens, heads, topk = slots_THK.shape
    counts_HS = torch.stack([slots_THK[:, head].flatten().bincount(minlength=num_slots) for head in range(heads)])
    counts_HS = counts_HS.double()
    counts_S = counts_HS.sum(0)
    reads = tokens * heads * topk
    share_S = counts_S / reads
    entropy = -float(torch.special.xlogy(share_S, share_S).sum())
    pairs = float((counts_HS * (counts_HS - 1)).sum()) / (heads * topk * tokens * (tokens - 1))
    chance = topk / num_slots
    return Spread(
        usage=float((counts_S > 0).sum()) / expected_usage(num_slots, reads),
        effective=math.exp(entropy) / expected_effective(num_slots, reads),
        top1=len(slots_THK[..., 0].unique()) / expected_usage(num_slots, tokens * heads),
        overlap=max(0.0, (pairs - chance) / (1 - chance)) if chance < 0.5 else 0.0,
    )


def complaints(found: Spread) -> tuple[list[str], bool]:
    """What is out of its limits, in words, and whether any of it is a collapse."""
    said, has_failed = [], False
    for name, (warn, fail) in LIMITS.items():
        value = getattr(found, name)
        is_past = (
            (lambda limit, value=value: value > limit)
            if name == "overlap"
            else (lambda limit, value=value: value < limit)
        )
        if is_past(warn):
            said.append(_WORDS[name].format(value))
            has_failed |= is_past(fail)
    return said, has_failed


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
