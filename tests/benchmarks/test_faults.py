"""The scripts that kill and damage, in short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def output(script, *arguments, seconds=300):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_runs_that_are_killed_and_resumed_lose_nothing():
    found = output("kill_and_resume.py", "--kills", "4", "--steps", "25")
    assert "kills              4\n" in found
    assert "differing          0\n" in found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_rank_that_is_killed_under_torchrun_ends_the_others_and_the_training_goes_on_bit_for_bit():
    found = output("kill_ranks.py", "--kills", "5", "--steps", "40", seconds=1200)
    lines = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    kills = [line for line in lines if "kill" in line]
    assert [line["kill"] for line in kills] == [1, 2, 3, 4, 5]
    assert all(line["right"] and line["status"] == 1 and line["ended_s"] < 60 and not line["left"] for line in kills)
    assert {line["script"] for line in lines if line.get("equal")} == {"train", "loop"}
    assert not any(line.get("equal") is False for line in lines)


@pytest.mark.slow
def test_files_that_are_damaged_are_refused_by_name():
    assert "15 files damaged, 15 refused by name" in output("corruption.py", "--files", "15")
