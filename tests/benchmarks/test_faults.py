"""The scripts that kill and damage, in short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def output(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_runs_that_are_killed_and_resumed_lose_nothing():
    found = output("kill_and_resume.py", "--kills", "4", "--steps", "25")
    assert "kills              4\n" in found
    assert "differing          0\n" in found


@pytest.mark.slow
def test_files_that_are_damaged_are_refused_by_name():
    assert "15 files damaged, 15 refused by name" in output("corruption.py", "--files", "15")
