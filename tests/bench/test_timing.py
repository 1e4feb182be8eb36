import time

import pytest
import torch

from memlayers.bench.timing import FEWEST_ROUNDS, Stopwatch, ratio, summary


def watch(**settings):
    return Stopwatch(**{"device": torch.device("cpu"), "repeats": 4, "budget": 60.0, **settings})


def test_everyone_runs_once_a_round_in_rotating_order():
    order = []
    samples = watch().rounds({name: lambda name=name: order.append(name) for name in "abc"})
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4, "c": 4}
    counted = "".join(order[-12:])
    assert counted == "abc" + "bca" + "cab" + "abc"
    assert "".join(order[:-12]) == "abc" * 2  # to warm up, not counted


def test_samples_are_the_seconds_of_each_call():
    naps = {"long": 0.02, "short": 0.002}
    samples = watch().rounds({name: lambda nap=nap: time.sleep(nap) for name, nap in naps.items()})
    assert all(seconds >= 0.02 for seconds in samples["long"])
    assert 0.002 <= min(samples["short"]) < 0.02


def test_what_comes_before_is_not_timed():
    before = []
    samples = watch().rounds({"a": lambda: None}, before=lambda: before.append(time.sleep(0.02)))
    assert len(before) == 4
    assert min(samples["a"]) < 0.02


def test_the_budget_ends_a_case_but_not_before_three_rounds():
    samples = watch(repeats=100, budget=1e-9).rounds({"a": lambda: None, "b": lambda: None})
    assert [len(found) for found in samples.values()] == [FEWEST_ROUNDS] * 2


def test_summary_and_ratio():
    assert summary([4.0, 1.0, 2.0, 3.0, 10.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
        "minimum": 1.0,
    }
    assert summary([5.0])["upper_quartile"] == 5.0
    # Of each round, not of the medians: those are 2 and 2 here.
    assert ratio([3.0, 2.0, 1.0], [1.0, 2.0, 4.0]) == 1.0
    assert ratio([30.0, 2.0, 2.0], [10.0, 1.0, 2.0]) == pytest.approx(2.0)
