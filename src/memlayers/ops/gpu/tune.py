"""Block sizes: each kernel's module has a small fixed table; with MEMLAYERS_AUTOTUNE=1 the fastest of a few are taken.

Off unless asked for: the first call of each kind takes seconds then, and block sizes, and with them the last bits of
sums, may differ from run to run.
"""

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import triton.testing

SWITCH = "MEMLAYERS_AUTOTUNE"
Blocks = TypeVar("Blocks")

_fastest: dict[Hashable, Any] = {}  # what was measured in this process


@functools.cache
def is_on() -> bool:
    """Whether tuning is asked for in this process. Where it is not, nothing is to be done for it at each call."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


def choose(
    kind: tuple[Hashable, ...],
    candidates: Sequence[Blocks],
    run: Callable[[Blocks], object],
    device: torch.device,
) -> Blocks:
    """The candidate that runs fastest; the first of them, which is the fixed table's, where that cannot be measured.

    kind: the kernel, and what decides which blocks are good for it. run: the kernel with these blocks; what it writes
    must be the same each time.
    """
    kind = (device, *kind)
    if kind not in _fastest:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():  # no time can be taken in a CUDA graph
                return candidates[0]
            _fastest[kind] = min(candidates, key=lambda blocks: milliseconds(lambda: run(blocks)))
    return _fastest[kind]


def milliseconds(run: Callable[[], object]) -> float:
    """The median of some runs; infinity for blocks that the device has no room for."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median")
    except triton.OutOfResources:
        return float("inf")


def size_class(size: int) -> int:
    """The next power of two: sizes that share their blocks."""
    return triton.next_power_of_2(max(1, size))
