"""What stands in for instructions that not every processor has."""

import torch

from memlayers.ops.cpu import intrinsics
from memlayers.ops.cpu.compile import kernel
from memlayers.ops.cpu.intrinsics import LANES, load, load_float16, store, store_float16
from memlayers.ops.cpu.launch import launch


def same(one, other):
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return ((one.view(bits) == other.view(bits)) | (one.isnan() & other.isnan())).all()


def test_without_instructions_for_float16_integers_give_the_same(monkeypatch):
    """All float16 numbers widened; float32 numbers rounded: ties, subnormal, too large, infinite, NaN."""
    monkeypatch.setattr(intrinsics, "converts_halves", lambda: False)

    @kernel
    def halves_by_integers(counters, halves, wide, numbers, rounded, count):
        for at in range(0, count, LANES):
            store(wide + at * 4, load_float16(halves + at * 2))
            store_float16(rounded + at * 2, load(numbers + at * 4))

    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    exact = halves.float()
    # Halfway to the next number: half of 2**(e - 10), or of 2**-24 among the subnormal ones.
    ties = exact + torch.exp2((torch.frexp(exact).exponent - 12).clamp(min=-25).float())
    edges = torch.tensor([65519.99, 65520.0, 1e38, torch.inf, 2.0**-25, 2.0**-25 * 1.001, 1e-45, torch.nan])
    numbers = torch.cat([ties, edges.repeat(8), -edges.repeat(8)])[-(2**16) :]
    wide, rounded = torch.empty(2**16), torch.empty(2**16, dtype=torch.float16)
    launch(halves_by_integers, 1, halves=halves, wide=wide, numbers=numbers, rounded=rounded, count=2**16)
    assert same(wide, exact)
    assert same(rounded, numbers.half())
