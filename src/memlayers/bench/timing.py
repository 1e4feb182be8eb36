"""Interleaved rounds: every contender once a round, in rotating order, so that ratios are fair on a busy machine.

On a GPU a time is the device's, between two events, with nothing of the contender in its cache.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from memlayers.bench.machine import cache_bytes

FEWEST_ROUNDS = 3  # whatever the budget
_WARM_UP_ROUNDS, _WARM_UP_SECONDS = 2, 1.0
_SETTLE_SECONDS = 0.005  # for the threads of one library to fall asleep before another's start
# Of a GPU: what is read to empty its cache, beyond those that do not count as L2, too; and what keeps it busy, some
# 3 ms at 3 TB/s, while the kernels of a call are queued.
_FLUSHED_BYTES, _BUSY_BYTES = 2**29, 2**33

Call = Callable[[], object]
Contenders = Mapping[str, Call]


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """How long and where to measure."""

    device: torch.device
    repeats: int  # rounds that are counted
    budget: float  # seconds after which no further round begins, once there were `FEWEST_ROUNDS`

    def rounds(
        self, contenders: Contenders, *, before: Call | None = None, settle: bool = True, launching: bool = False
    ) -> dict[str, list[float]]:
        """Seconds of each contender in each round; rounds that warm up, and compile, are not counted.

        before: called before each call, not timed. settle: wait a moment before each call. launching: on a GPU, from
        the call on an idle device to its result, launches included, instead of the time that the device is at work.
        """
        is_gpu = self.device.type == "cuda"
        seconds = GpuClock(self.device, launching=launching).seconds if is_gpu else self.seconds
        settle = settle and not is_gpu  # its clocks would go down
        names = list(contenders)
        samples: dict[str, list[float]] = {name: [] for name in names}
        gc.collect()
        start = time.perf_counter()
        warm_up = 0
        while warm_up < _WARM_UP_ROUNDS and (warm_up == 0 or is_gpu or time.perf_counter() - start < _WARM_UP_SECONDS):
            for name in names:
                contenders[name]()
            warm_up += 1
        self.wait()
        start = time.perf_counter()
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
                samples[name].append(seconds(contenders[name]))
        return samples

    def seconds(self, call: Call) -> float:
        """One call, timed by the clock on the wall, until its result is there."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class GpuClock:
    """Times one call on a GPU, with a cache that holds nothing of it.

    The device is given other work first, so that it begins when the kernels of the call are queued: what is measured
    is kernels, not their launches, as far as launching takes no longer than that work. Reading leaves nothing to be
    written back. launching: the call finds an idle device instead, and launches count.
    """

    def __init__(self, device: torch.device, *, launching: bool = False):
        self.device, self.launching = device, launching
        self.buffer = torch.zeros(max(_FLUSHED_BYTES, 4 * cache_bytes(device)) // 4, device=device)

    def seconds(self, call: Call) -> float:
        """One call, timed."""
        if self.launching:
            self.buffer.sum()
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize(self.device)
            return time.perf_counter() - begin
        for _ in range(max(1, _BUSY_BYTES // self.buffer.nbytes)):
            self.buffer.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def capture(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph: launched as one. Raises what the call raises where it cannot be captured."""
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP_ROUNDS):  # what is compiled or allocated once is so before
            call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def summary(samples: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "minimum": min(samples)}


def ratio(samples: list[float], to: list[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(one / other for one, other in zip(samples, to, strict=True))
