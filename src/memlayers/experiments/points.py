"""Runs become points: the mean over seeds with its standard error, and differences that are larger than it."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memlayers.experiments.records import Record


@dataclass(frozen=True, kw_only=True)
class Point:
    """The runs of one row, which differ in their seeds."""

    runs: int  # that are finished with a result
    asked: int
    failed: tuple[str, ...] = ()  # why others have none
    perplexity: float | None = None  # on validation text, the mean
    error: float | None = None  # standard error of the mean
    usage: float | None = None  # %, mean over the runs and their memories
    count_usage: float | None = None
    top1_usage: float | None = None
    kl: float | None = None
    usage_tokens: int | None = None
    slots: int | None = None
    parameters: int | None = None
    value_parameters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON types."""
        return {**asdict(self), "failed": list(self.failed)}


Points = Mapping[str, Point]


def point(records: Sequence[Record | None], noise: float | None) -> Point:
    """The point of some runs, of which those that are not finished are None.

    Args:
        noise: Standard deviation of a run's perplexity over seeds, as a share of it, where it is known from other
            runs: the least that a run of this point may have, for two seeds that agree say little.
    """
    found = [record for record in records if record is not None]
    done = [record for record in found if record["failed"] is None]
    failed = tuple(sorted({record["failed"] for record in found} - {None}))
    if not done:
        return Point(runs=0, asked=len(records), failed=failed)
    losses = [record["validation"]["perplexity"] for record in done]
    mean = statistics.fmean(losses)
    deviations = [] if noise is None else [noise * mean]
    if len(losses) > 1:
        deviations.append(statistics.stdev(losses))
    error = max(deviations) / math.sqrt(len(losses)) if deviations else None
    memories = [usage for record in done for usage in record["validation"]["usage"].values()]
    names = ("usage", "count_usage", "top1_usage", "kl")
    figures = {name: statistics.fmean(memory["overall"][name] for memory in memories) for name in names if memories}
    return Point(
        runs=len(done),
        asked=len(records),
        failed=failed,
        perplexity=mean,
        error=error,
        usage_tokens=memories[0]["tokens"] if memories else None,
        slots=memories[0]["slots"] if memories else None,
        parameters=done[0]["parameters"]["total"],
        value_parameters=done[0]["parameters"]["values"],
        **figures,
    )


def pooled_noise(groups: Sequence[Sequence[Record | None]]) -> float | None:
    """Standard deviation of perplexity over seeds as a share of it, pooled over groups of seeds; None if unknown."""
    squares, freedom = 0.0, 0
    for records in groups:
        values = [record["validation"]["perplexity"] for record in records if record and record["failed"] is None]
        if len(values) > 1:
            squares += sum((value / statistics.fmean(values) - 1) ** 2 for value in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else None


def best_of(perplexities: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest perplexity; None as long as one is None, and where all are those of failed runs (inf)."""
    known = {rate: perplexity for rate, perplexity in perplexities.items() if perplexity is not None}
    if len(known) < len(perplexities) or min(known.values()) == math.inf:
        return None
    return min(known, key=known.__getitem__)


def is_below(one: Point | None, other: Point | None) -> bool | None:
    """Whether a perplexity is below another by more than two standard errors of their difference.

    False: it is above by as much. None: the difference is smaller, or something is not known yet.
    """
    if one is None or other is None or one.perplexity is None or other.perplexity is None:
        return None
    if one.error is None or other.error is None:
        return None
    difference = other.perplexity - one.perplexity
    if abs(difference) <= 2 * math.hypot(one.error, other.error):
        return None
    return difference > 0


def versus(one: Point | None, other: Point | None) -> str:
    """How far a perplexity is from another, with the standard error of the difference: ``-3.1 % ± 0.4``."""
    if one is None or other is None or one.perplexity is None or other.perplexity is None:
        return "not known yet"
    text = f"{100 * (one.perplexity / other.perplexity - 1):+.1f} %"
    if one.error is None or other.error is None:
        return text
    return f"{text} ± {100 * math.hypot(one.error, other.error) / other.perplexity:.1f}"


def loss_at_time(curve: Sequence[Mapping[str, float]], seconds: float) -> float | None:
    """Validation loss after `seconds` of training, on the line between the evaluations before and after.

    None before the first evaluation; the last one's after the end.
    """
    if not curve or seconds < curve[0]["seconds"]:
        return None
    for before, after in itertools.pairwise(curve):
        if seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["loss"] + share * (after["loss"] - before["loss"])
    return curve[-1]["loss"]
