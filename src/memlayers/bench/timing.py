"""Interleaved rounds: every contender once a round, in rotating order, so that ratios are fair on a busy machine."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FEWEST_ROUNDS = 3  # whatever the budget
_WARM_UP_ROUNDS, _WARM_UP_SECONDS = 2, 1.0
_SETTLE_SECONDS = 0.005  # for the threads of one library to fall asleep before another's start

Contenders = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """How long and where to measure."""

    device: torch.device
    repeats: int  # rounds that are counted
    budget: float  # seconds after which no further round begins, once there were `FEWEST_ROUNDS`

    def rounds(
        self, contenders: Contenders, *, before: Callable[[], object] | None = None, settle: bool = True
    ) -> dict[str, list[float]]:
        """Seconds of each contender in each round; rounds that warm up are not counted.

        before: called before each call, not timed. settle: wait a moment before each call.
        """
        names = list(contenders)
        samples: dict[str, list[float]] = {name: [] for name in names}
        gc.collect()
        start = time.perf_counter()
        warm_up = 0
        while warm_up < _WARM_UP_ROUNDS and (warm_up == 0 or time.perf_counter() - start < _WARM_UP_SECONDS):
            for name in names:
                contenders[name]()
            warm_up += 1
        for number in range(self.repeats):
            if number >= FEWEST_ROUNDS and time.perf_counter() - start > self.budget:
                break
            for place in range(len(names)):
                name = names[(number + place) % len(names)]
                if before is not None:
                    before()
                elif settle:
                    self.wait()
                    time.sleep(_SETTLE_SECONDS)
                samples[name].append(self.seconds(contenders[name]))
        return samples

    def seconds(self, call: Callable[[], object]) -> float:
        """One call, timed."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def summary(samples: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "minimum": min(samples)}


def ratio(samples: list[float], to: list[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(one / other for one, other in zip(samples, to, strict=True))
