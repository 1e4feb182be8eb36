"""The arithmetic of the GPU's times on paper; what is compiled and counted has tests of its own."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("gpu_roofline")


def kernel(name="_read_kernel", **values):
    """Ten instructions, [2, 6) of them a loop."""
    instructions = ["S2R", "MOV", "LDG.E.128", "LDG.E.64", "LDG.E.U16", "BRA", "LDG.E", "FADD", "STG.E", "EXIT"]
    given = {"registers": 64, "warps": 2, "shared_bytes": 0, "jumps": ((5, 2),), "loops": [range(2, 6)]}
    return SimpleNamespace(name=name, instructions=instructions, **given | values)


@pytest.mark.parametrize(
    ("values", "programs"),
    [
        ({}, 16),
        ({"registers": 65}, 14),
        ({"registers": 16, "warps": 1}, 32),
        ({"registers": 32, "warps": 8}, 8),
        ({"shared_bytes": 100_000}, 2),
    ],
    ids=["registers", "in eights", "programs", "warps", "shared memory"],
)
def test_how_many_programs_fit_an_sm(script, values, programs):
    assert script.programs_of_sm(kernel(**values)) == programs


def test_instructions_are_counted_with_the_trips_of_their_loop(script):
    launch = SimpleNamespace(
        name="_read_kernel", kernel=SimpleNamespace(arg_names=[]), arguments=(), settings={"ROWS": 8}, programs=5
    )
    assert script.instructions(kernel(), launch) == (6 + 4 * script.READS / 8) * 2 * 5


def test_what_is_rarely_run_does_not_count(script):
    """A loop that is jumped over."""
    rare = kernel("_select", jumps=((1, 7), (5, 2)))
    assert script.usual_places(rare) == ([0, 1, 7, 8, 9], set())
    assert script.usual_places(kernel(jumps=((1, 7), (5, 2))))[1] == {2, 3, 4, 5}


def test_bytes_in_flight_are_those_of_one_trip(script):
    assert script.bytes_in_flight(kernel()) == (16 + 8 + 2) * 32 * 2 * 16


def test_expected_rows(script):
    assert script.rows_read(1, 2**20) == pytest.approx(script.READS, rel=1e-3)
    assert script.rows_read(10**6, 100) == pytest.approx(100)
