"""What the measurement of facts trains on and what its tables say, without the runs."""

import importlib
import json
import lzma
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("facts")


def test_the_held_out_sentence_is_never_a_trained_one(script, tmp_path):
    """Also of a relation that has a sentence twice; one with a single sentence is left out."""
    templates = {
        "twice": {"templates": ["[X] speaks [Y].", "[X] talks in [Y].", "[X] speaks [Y]."]},
        "single": {"templates": ["[X] is [Y].", "[X] is [Y]."]},
    }
    (tmp_path / "templates.json").write_text(json.dumps(templates))
    with lzma.open(tmp_path / "facts.xz", "wt") as lines:
        for relation in ("twice", "single"):
            lines.writelines(json.dumps({"rel": relation, "sub": f"A{n}", "obj": "B"}) + "\n" for n in range(3))
    found = script.sample(str(tmp_path / "facts.xz"), str(tmp_path / "templates.json"), 3, 0)
    assert {(len(fact.prompts), fact.prompts[0][3:], fact.held_out[3:]) for fact in found} == {
        (1, "speaks", "talks in")
    }


def test_the_frontier_has_the_best_point_within_each_limit_of_forgetting(script):
    def run(rate, *points):
        names = ("exposures", "trained", "held_out", "old_validation_perplexity", "old_test_perplexity")
        return {
            "method": "full",
            "seed": 0,
            "rate": rate,
            "curve": [dict(zip(names, one, strict=True)) for one in points],
        }

    runs = [
        run(1, (0, 0, 0, 100, 200), (1, 0.2, 0.1, 100.9, 204), (2, 0.9, 0.5, 300, 900)),
        run(2, (0, 0, 0, 100, 200), (1, 0.4, 0.3, 109, 220)),
    ]
    *_, row = script.frontier(runs).splitlines()
    assert row == (
        "| full | 0 | 10.0% (20.0%), test +2.0% | 30.0% (40.0%), test +10.0% | 30.0% (40.0%), test +10.0% "
        "| 50.0% (90.0%), test +350.0% |"
    )
