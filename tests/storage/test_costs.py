"""What a step moves of a table, from the formula, and from what a step does."""

import pytest
import torch

from memlayers.storage import StepBytes, step_bytes
from memlayers.storage.host import copied_rows


def test_few_tokens_of_a_large_table():
    # 10 tokens of 8 rows each, 80 different ones, in two parts of 40.
    assert step_bytes(slots=1000, width=16, rows=8, tokens=10, parts=2) == StepBytes(
        rows=80,
        at_table=80 * (16 * 12 + 4),
        on_device=40 * 64 + 40 * 8,
        to_device=80 * 64,
        to_host=80 * 12 + 10 * 64 + 80 * 8,
    )


def test_many_tokens_of_a_small_table_in_16_bits():
    # All 20 rows, in each of two parts.
    assert step_bytes(slots=20, width=16, rows=8, tokens=10, parts=2, itemsize=2, moments=4) == StepBytes(
        rows=20,
        at_table=20 * (16 * 6 + 4),
        on_device=20 * 32 + 40 * 8,
        to_device=40 * 32,
        to_host=80 * 12 + 10 * 64 + 40 * 8,
    )


def test_it_is_what_a_call_copies():
    slots_TM = torch.arange(80).view(10, 8)
    rows_UV, places_TM = copied_rows(torch.randn(1000, 16), slots_TM)
    found = step_bytes(slots=1000, width=16, rows=8, tokens=10)
    assert rows_UV.nbytes == found.to_device
    assert rows_UV.nbytes + places_TM.nbytes == found.on_device


@pytest.mark.parametrize("name", ["slots", "width", "rows", "tokens", "parts", "itemsize", "moments"])
def test_numbers_below_1_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        step_bytes(**{"slots": 8, "width": 8, "rows": 8, "tokens": 8, name: 0})
