"""Result: what was measured of the contenders of one case at one shape."""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from memlayers.bench.shapes import Shape
from memlayers.bench.timing import ratio, summary

OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Samples of each contender, in the order of the rounds; none where the case was skipped, and a note says why."""

    case: str
    shape: Shape
    part: str = ""  # what of the case, where it has several parts
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    unit: Literal["s", "bytes"] = "s"
    work: Mapping[str, tuple[float, str]] = field(default_factory=dict)  # of a call: how much, of what
    limit: str = ""  # whose rate is the most that there is, so that the others' are a share of it
    notes: tuple[str, ...] = ()

    def ratio(self, name: str) -> float | None:
        """Median over the rounds of a contender's figure to ours; None if ours was not measured, or of other work."""
        ours = self.samples.get(OURS)
        return None if ours is None or name == self.limit else ratio(self.samples[name], ours)

    def rate(self, name: str) -> tuple[float, str] | None:
        """Work a second, in 10^9."""
        if name not in self.work:
            return None
        amount, what = self.work[name]
        return amount / statistics.median(self.samples[name]) / 1e9, what

    def share(self, name: str) -> float | None:
        """Median over the rounds of a contender's rate to the limit's; None where there is no limit, or it is it."""
        if name == self.limit or not {name, self.limit} <= self.work.keys():
            return None
        return ratio(self.samples[self.limit], self.samples[name]) * self.work[name][0] / self.work[self.limit][0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: all samples, and what is made of them."""
        contenders = {
            name: {
                **summary(samples),
                "ratio_to_ours": self.ratio(name),
                "rate": self.rate(name),
                "share_of_limit": self.share(name),
                "samples": samples,
            }
            for name, samples in self.samples.items()
        }
        return {
            "case": self.case,
            "part": self.part,
            "shape": dataclasses.asdict(self.shape),
            "unit": self.unit,
            "limit": self.limit,
            "contenders": contenders,
            "notes": list(self.notes),
        }


def fold(samples: dict[str, list[float]], ways: Mapping[str, object], name: str) -> str:
    """Of several ways to do one thing keep the one with the lowest median, as `name`; returns which it was."""
    best = min(ways, key=lambda way: statistics.median(samples[way]))
    kept = samples[best]
    for way in ways:
        del samples[way]
    samples[name] = kept
    return best
