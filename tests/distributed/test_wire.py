"""Bytes on the wire, calculated; the page about several processes shows them."""

import re
from pathlib import Path

import pytest

from memlayers.distributed import Layout, layouts, traffic
from memlayers.distributed.wire import choice

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
    assert dense == 100 * 8 * 4
    assert rows == 100 * 8 * 4 + 100 * 4  # sums, and which rows were read


def test_sums_of_rows_in_16_bits_are_sent_in_32():
    dense, _, rows, _ = traffic(slots=100, width=8, rows=4, tokens=1000, ranks=2, itemsize=2)
    assert (dense, rows) == (100 * 8 * 2, 100 * 8 * 4 + 100 * 4)


def test_layouts_of_a_mesh_are_replicas_columns_and_replicas_of_columns():
    replicas, columns, both = layouts(slots=10**6, width=256, rows=8, tokens=10, mesh=(2, 4))
    assert (str(replicas), str(columns), str(both)) == ("replicas", "columns", "2 replicas x 4 columns")
    # A row of 256 elements and its two moments in float32, and how often it was read.
    assert replicas == (8, 1, 10**6 * (12 * 256 + 4), 0, 7 * 10 * (8 * 8 + 4 * 256))
    assert columns == (1, 8, 10**6 * (12 * 32 + 4), 7 * 10 * (12 * 8 + 8 * 32), 0)
    # At the step a rank receives from its replica the columns that it recorded for the tokens of 4 ranks.
    assert both == (2, 4, 10**6 * (12 * 64 + 4), 3 * 10 * (12 * 8 + 8 * 64), 4 * 10 * (8 * 8 + 4 * 64))
    assert both.received == 3 * 10 * (12 * 8 + 8 * 64) + 4 * 10 * (8 * 8 + 4 * 64)


def test_layouts_on_one_dimension_are_those_of_traffic():
    table = {"slots": 2**20, "width": 1024, "rows": 128, "tokens": 2048}
    replicas, columns = layouts(**table, mesh=[8])
    found = traffic(**table, ranks=8)
    assert (replicas.received, columns.received) == (found.rows, found.columns)


def test_layouts_leave_out_columns_that_are_too_narrow():
    table = {"slots": 100, "width": 64, "rows": 4, "tokens": 10}
    assert [one[:2] for one in layouts(**table, mesh=(2,))] == [(2, 1), (1, 2)]
    assert [one[:2] for one in layouts(**table, mesh=(2, 2))] == [(4, 1), (2, 2)]
    assert [one[:2] for one in layouts(**table, mesh=(4,))] == [(4, 1)]
    assert [one[:2] for one in layouts(**table, mesh=(1, 2))] == [(2, 1), (1, 2)]  # each once


def test_moments_in_16_bits_take_half_the_bytes():
    (one,) = layouts(slots=100, width=8, rows=4, tokens=10, mesh=(1,), itemsize=2, moments=4)
    assert one.held == 100 * (8 * 6 + 4)


def test_the_choice_receives_least_of_what_fits():
    whole, parts = Layout(2, 1, 100, 0, 10), Layout(1, 2, 50, 20, 0)
    assert choice([whole, parts], 110) is whole
    assert choice([whole, parts], 109) is parts
    assert choice([whole, parts], 60) is parts  # neither fits


@pytest.mark.parametrize("mesh", [(), (2, 2, 2)])
def test_a_mesh_of_other_dimensions_is_refused(mesh):
    with pytest.raises(ValueError, match=f"mesh must have 1 or 2 numbers .* got {len(mesh)}"):
        layouts(slots=100, width=8, rows=4, tokens=10, mesh=mesh)


def test_a_mesh_without_ranks_is_refused():
    with pytest.raises(ValueError, match="mesh must be an integer of at least 1, got 0"):
        layouts(slots=100, width=8, rows=4, tokens=10, mesh=(2, 0))


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


def test_the_page_shows_512_gpus_as_they_are_calculated():
    text = PAGE.read_text()
    call = "layouts(slots=16 * 1024**2, width=1024, rows=128, tokens=8192, mesh=(64, 8), itemsize=2, moments=4)"
    assert f"`memlayers.distributed.{call}`" in text
    dense = traffic(slots=16 * 1024**2, width=1024, rows=128, tokens=8192, ranks=512, itemsize=2).dense
    # A weight, its gradient and its moments in 16 bits.
    expected = {"dense all-reduce, 512 replicas": (16 * 1024**3 * 8, 0, dense)}
    for one in eval(call):
        expected[f"512 {one}" if one.columns == 1 else str(one)] = one.held, one.passes, one.step
    assert list(expected)[1:] == ["512 replicas", "64 replicas x 8 columns"]
    shown = {
        cells[0]: cells[1:]
        for cells in re.findall(r"^\| (.*) \| (.*) \| (.*) \| (.*) \| (.*) ms \|$", text, re.MULTILINE)
    }
    assert list(shown) == list(expected)
    for name, (held, passes, step) in expected.items():
        sizes = [float(cell.removesuffix(" GB")) for cell in shown[name][:3]]
        assert sizes == pytest.approx([held / 1e9, passes / 1e9, step / 1e9], rel=0.01), name
        milliseconds = passes / 450e6 + step / 50e6
        assert float(shown[name][3].replace(",", "")) == pytest.approx(milliseconds, rel=0.005), name


def test_a_number_below_1_is_refused():
    with pytest.raises(ValueError, match="ranks must be"):
        traffic(slots=100, width=8, rows=4, tokens=10, ranks=0)
