"""The arithmetic of the GPU's times on paper; what is compiled and counted has tests of its own."""

import importlib
from collections import Counter
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
    given = {"registers": 64, "warps": 2, "shared_bytes": 0, "loops": [range(2, 6)], "instructions": instructions}
    return SimpleNamespace(name=name, **given | values)


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


def test_instructions_are_counted_by_pipe_with_the_trips_of_their_loop(script):
    launch = SimpleNamespace(
        name="_read_kernel", kernel=SimpleNamespace(arg_names=[]), arguments=(), settings={"ROWS": 8}, programs=5
    )
    trips, warps = script.READS / 8, 2 * 5
    assert script.instructions(kernel(), launch) == {
        "issue": (6 + 4 * trips) * warps,
        "loads and stores": (2 + 3 * trips) * warps,
    }
    instructions = ["ISETP.GE.AND", "SEL", "SHFL.BFLY", "MUFU.RSQ", "I2FP.F32.S32", "FFMA", "IMAD.MOV.U32", "UISETP"]
    assert script.instructions(kernel(instructions=instructions, loops=[]), launch) == {
        "issue": 8 * warps,
        "integers": 2 * warps,
        "shuffles": warps,
        "special functions": warps,
    }


@pytest.mark.parametrize(
    ("counted", "clocks", "by"),
    [
        ({"issue": 400}, 100, "issue"),
        ({"issue": 400, "integers": 300}, 150, "integers"),
        ({"issue": 400, "integers": 300, "shuffles": 200}, 200, "shuffles"),
        ({"issue": 400, "special functions": 200}, 400, "special functions"),
        ({"issue": 400, "loads and stores": 50}, 100, "issue"),
    ],
)
def test_the_slowest_pipe_or_the_bytes_bind(script, counted, clocks, by):
    counted = Counter(counted)
    seconds = clocks / (132 * 1.98e9)
    assert script.at_least(0, counted, 1e12) == (pytest.approx(seconds), by)
    assert script.at_least(2 * seconds * 1e12, counted, 1e12) == (pytest.approx(2 * seconds), "bytes")


def test_bytes_in_flight_are_those_of_one_trip(script):
    assert script.bytes_in_flight(kernel()) == (16 + 8 + 2) * 32 * 2 * 16


def test_expected_rows(script):
    assert script.rows_read(1, 2**20) == pytest.approx(script.READS, rel=1e-3)
    assert script.rows_read(10**6, 100) == pytest.approx(100)
