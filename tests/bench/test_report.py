import dataclasses

import pytest

from memlayers.bench import report
from memlayers.bench.result import OURS, Result, fold
from memlayers.bench.shapes import sweep


def content(**changes):
    found = {
        "command": "memlayers bench",
        "device": "cpu",
        "commit": "c0ffee",
        "hardware": {"cpu": "a CPU", "cpu_cores": 2, "threads": 2, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "gpu": None,
        "kernels": "kernels in Numba",
    }
    return {**found, **changes}


@pytest.fixture
def result(tiny):
    samples = {OURS: [0.002, 0.001, 0.004], "textbook": [0.004, 0.003, 0.004], "limit": [0.001, 0.0005, 0.001]}
    return Result(
        case="read", part="float32 table", shape=tiny, samples=samples, work={OURS: (4e6, "GB/s")}, notes=("a note",)
    )


def test_ratios_are_medians_of_rounds_and_rates_are_work_by_time(result):
    assert result.ratio("textbook") == pytest.approx(2.0)  # of 2, 3 and 1
    assert result.ratio("limit") == pytest.approx(0.5)
    assert result.rate(OURS) == (pytest.approx(2.0), "GB/s")
    assert result.rate("textbook") is None
    assert dataclasses.replace(result, samples={"textbook": [1.0]}).ratio("textbook") is None


def test_the_table(result):
    table = report.markdown(content(), [result])
    assert "`memlayers bench`" in table
    assert "a CPU, 2 of 2 cores; torch 2.13.0; kernels in Numba; commit c0ffee." in table
    assert "### read, float32 table: tiny" in table
    assert "| contender | median (ms) | quartiles | minimum | of ours | rate |" in table
    assert "| ours | 2.000 | 1.500 to 3.000 | 1.000 | 1.00 | 2.0 GB/s |" in table
    assert "| textbook | 4.000 | 3.500 to 4.000 | 3.000 | 2.00 |  |" in table
    assert "3 rounds. a note." in table


def test_a_share_is_of_the_rate_of_the_limit_in_the_same_round(tiny):
    # Twice the work in the time of the copy, in half of it, and in twice.
    result = Result(
        case="read",
        shape=tiny,
        samples={OURS: [1.0, 1.0, 4.0], "other": [1.0, 1.0, 1.0], "copy (limit)": [1.0, 2.0, 2.0]},
        work={OURS: (2e9, "GB/s"), "copy (limit)": (8e9, "GB/s")},
        limit="copy (limit)",
    )
    assert result.share(OURS) == pytest.approx(0.25)
    assert result.share("other") is None
    assert result.share("copy (limit)") is None
    assert result.ratio("copy (limit)") is None  # it does other work
    assert result.to_dict()["contenders"][OURS]["share_of_limit"] == pytest.approx(0.25)
    table = report.markdown(content(), [result])
    assert "| of ours | rate | of copy |" in table
    assert "| 1.00 | 2.0 GB/s | 25 % |" in table
    assert "ours 1,000 ms = 2.0 GB/s, 25 % of copy (limit)" in report.lines(result)


def test_the_table_names_the_gpu_and_how_it_was_timed(result):
    gpu = {
        "name": "a GPU",
        "gigabytes": 79.1,
        "multiprocessors": 132,
        "cache_megabytes": 50,
        "driver": None,
        "runtime": "CUDA 13.0",
    }
    table = report.markdown(content(device="cuda:1", gpu=gpu, kernels="no kernels (for a reason)"), [result])
    assert (
        "cuda:1: a GPU (79.1 GiB, 132 multiprocessors, 50 MB of L2), driver unknown, CUDA 13.0; beside a CPU" in table
    )
    assert "no kernels (for a reason)" in table
    assert "Times are the device's" in table
    assert "Times are the device's" not in report.markdown(content(), [result])


def test_memory_is_in_bytes(tiny):
    result = Result(case="memory", shape=tiny, samples={OURS: [2e9], "textbook": [3e9]}, unit="bytes")
    table = report.markdown(content(), [result])
    assert "| contender | peak (GB) | of ours |" in table
    assert "| textbook | 3.00 | 1.50 |" in table


def test_what_was_skipped_is_said(tiny):
    skipped = Result(case="train", shape=tiny, notes=("skipped: needs 17 GB, 12 GB are free",))
    assert "skipped: needs 17 GB, 12 GB are free" in report.markdown(content(), [skipped])
    assert report.lines(skipped) == ["skipped: needs 17 GB, 12 GB are free"]


def test_a_sweep_is_one_table_and_one_plot(tiny, tmp_path):
    results = [
        Result(case="slots", part="forward", shape=one, samples={OURS: [0.001], "textbook": [0.002 * number]})
        for number, one in enumerate(sweep("slots", tiny), 1)
    ]
    narrow = dataclasses.replace(results[-1].shape, value_dim=8)
    results[-1] = dataclasses.replace(results[-1], shape=narrow, notes=("values of width 8",))
    table = report.markdown(content(), results)
    assert "| slots | forward: ours (ms) | forward: textbook (ms) | of ours |" in table
    assert "| 64 | 1.000 | 4.000 | 4.00 |" in table
    assert "4,096, forward: values of width 8." in table
    report.plot("slots", results, tmp_path / "slots.png")
    assert (tmp_path / "slots.png").read_bytes().startswith(b"\x89PNG")
    report.plot("topk", [], tmp_path / "topk.png")
    assert [file.name for file in tmp_path.iterdir()] == ["slots.png"]


def test_fold_keeps_the_best_way():
    samples = {"a": [3.0, 3.0], "b": [1.0, 4.0], "c": [2.0, 2.0]}
    assert fold(samples, {"b": None, "c": None}, "best") == "c"
    assert samples == {"a": [3.0, 3.0], "best": [2.0, 2.0]}
