"""Fresh rows of tables in files: the same bits by the kernel, by numpy, on every machine."""

import numpy as np
import pytest

from memlayers.ops import cpu
from memlayers.storage import draw
from memlayers.storage.draw import draw_reference, draw_rows

NUMBERS = np.arange(2**16, dtype=np.float32)
WAYS = [
    pytest.param(lambda *given: cpu.kernels("draw").draw(*given), id="kernel"),
    pytest.param(draw_reference, id="numpy"),
]
if cpu.why_not():
    del WAYS[0]


@pytest.mark.parametrize("fill", WAYS)
@pytest.mark.parametrize("seed", [0, 12_345, 2**63 - 2])
@pytest.mark.parametrize("width", [1, 4, 15, 16, 17, 90, 1024])
def test_the_bits_are_those_of_philox_at_a_counter_that_holds_the_slot(fill, seed, width):
    slots = np.array([7, 0, 2**40 + 1, 7, 2**31])
    rows = np.full((5, width), np.nan, np.float32)
    fill(rows, slots, NUMBERS, seed)
    for row, slot in zip(rows, slots, strict=True):
        words = np.random.Philox(key=seed, counter=[0, slot, 0, 0]).random_raw(256).astype("<u8")
        assert np.array_equal(row, words.view("<u2")[:width].astype(np.float32))


@pytest.mark.parametrize("fill", WAYS)
def test_no_rows(fill):
    fill(np.empty((0, 8), np.float32), np.empty(0, np.int64), NUMBERS, 1)


@pytest.mark.parametrize("kernels", [cpu.kernels, lambda _: None], ids=["as here", "without Numba"])
def test_rows_are_these_wherever_they_are_drawn(monkeypatch, kernels):
    monkeypatch.setattr(draw.cpu, "kernels", kernels)
    rows = draw_rows(2026, np.array([3, 1_000_000]), 1024, 0.5)
    assert rows[:, [0, 1, 511, 1023]].tolist() == [
        [0.2761367857456207, -0.9421590566635132, 0.5317928194999695, 0.5132055282592773],
        [-0.6277039647102356, 0.562955379486084, 0.328737735748291, 0.3044326603412628],
    ]
    assert rows.std() == pytest.approx(0.5, rel=0.05)
    assert not draw_rows(2026, np.array([3]), 8, 0.0).any()
