"""Bytes on the wire, calculated; the page about several processes shows them."""

import re
from pathlib import Path

import pytest

from memlayers.distributed import traffic

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "distributed.md"


def test_a_million_rows_on_eight_ranks():
    dense, sparse, rows, columns = traffic(slots=1024**2, width=1024, rows=128, tokens=2048, ranks=8)
    assert dense == 2 * 7 / 8 * 4 * 1024**3
    assert rows == 7 * 2048 * 5120
    assert 6.6e9 < sparse < 6.7e9
    assert columns == 7 * 2048 * (3 * 4 * 128 + 2 * 4 * 128)


def test_sums_of_rows_are_sent_where_factors_are_more():
    assert traffic(slots=100, width=8, rows=4, tokens=10, ranks=2).rows == 10 * (4 * 8 + 8 * 4)
    dense, _, rows, _ = traffic(slots=100, width=8, rows=4, tokens=1000, ranks=2)
    assert rows == dense == 100 * 8 * 4


def test_the_page_shows_what_is_calculated():
    lines = re.findall(r"^\| ([\d.]+)M \| (\d+) \| ([\d,]+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 4
    for slots, ranks, tokens, shown in lines:
        found = traffic(
            slots=int(float(slots) * 1024**2),
            width=1024,
            rows=128,
            tokens=int(tokens.replace(",", "")),
            ranks=int(ranks),
        )
        for figure, text in zip(found, shown.split(" | "), strict=True):
            assert float(text.removesuffix(" GB")) == pytest.approx(figure / 1e9, rel=0.05)


def test_a_number_below_1_is_refused():
    with pytest.raises(ValueError, match="ranks must be"):
        traffic(slots=100, width=8, rows=4, tokens=10, ranks=0)
