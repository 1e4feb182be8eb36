import json
import os
import signal
import subprocess
import sys
import time

import pytest

import memlayers.experiments.grid as module
from memlayers.checks import CommandFailed
from memlayers.experiments.grid import run_grid
from memlayers.experiments.records import GridFolder, Identity
from memlayers.experiments.scales import changed
from memlayers.signals import Stopped, on_ending_signal, stop

# Stands for the process of a run: says what it was asked for, then does what the test says.
RUN = """
import json, os, pathlib, signal, sys, time
asked = json.loads(sys.stdin.buffer.readline())
attempt = pathlib.Path(asked["result"] + ".attempts")
attempt.write_text(attempt.read_text() + "x" if attempt.exists() else "x")
def finish(*_):
    pathlib.Path(asked["result"]).write_text("{}")
"""


@pytest.fixture
def grid(comparison, corpus, tmp_path, monkeypatch):
    """Runs a grid of three runs whose processes do what the given lines say; returns the attempts of each."""
    folder = GridFolder(tmp_path)
    folder.start(Identity("a", "b", "fp32"))
    runs = {str(seed): changed(comparison.run(), {"training.seed": seed}) for seed in range(3)}
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)

    def run(lines, **settings):
        monkeypatch.setattr(module, "COMMAND", [sys.executable, "-S", "-c", RUN + lines])
        try:
            run_grid(runs, folder, corpus, **{"jobs": 2, "threads": 1, **settings})
        finally:
            run.attempts = {
                key: len(file.read_text()) if file.exists() else 0
                for key in runs
                for file in [folder.results / f"{key}.json.attempts"]
            }

    run.folder = folder
    return run


def test_runs_are_made_once_in_processes_of_few_threads(grid):
    grid('assert os.environ["OMP_NUM_THREADS"] == "1" and asked["threads"] == 1; finish()')
    assert grid.attempts == {"0": 1, "1": 1, "2": 1}
    grid("finish()")
    assert grid.attempts == {"0": 1, "1": 1, "2": 1}
    assert list(grid.folder.runs.iterdir()) == []


def test_a_run_whose_process_was_killed_begins_again(grid):
    said = []
    grid(
        'if asked["key"] == "1" and attempt.read_text() == "x": os.kill(os.getpid(), signal.SIGKILL)\nfinish()',
        say=said.append,
    )
    assert grid.attempts == {"0": 1, "1": 2, "2": 1}
    assert "the process of run 1 was killed: it goes on from its checkpoint" in said


def test_a_run_that_cannot_be_made_keeps_no_other_from_being_made(grid):
    with pytest.raises(CommandFailed, match=r"1 of 3 runs could not be finished, the first is .*0: full disk"):
        grid('if asked["key"] == "0": sys.exit("full disk")\nfinish()')
    assert grid.attempts == {"0": 1, "1": 1, "2": 1}
    assert grid.folder.result("2").is_file()


def test_a_signal_to_the_grid_reaches_its_runs_which_are_waited_for(grid):
    # Each run has its parent ended once it is ready, and takes its time to write.
    lines = (
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), finish(), sys.exit(143)))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()"
    )
    with pytest.raises(Stopped) as stopped, on_ending_signal(stop):
        grid(lines, jobs=1)
    assert stopped.value.code == 143
    assert grid.attempts == {"0": 1, "1": 0, "2": 0}
    assert grid.folder.result("0").is_file()


@pytest.mark.slow
def test_a_run_ends_with_a_checkpoint_when_its_parent_is_gone(comparison, corpus, tmp_path):
    config = changed(comparison.run(), {"training.tokens": 64 * 4000, "training.eval_every_tokens": 64 * 4000})
    request = {"key": "k", "config": config.to_dict(), "folder": str(tmp_path / "run"), "threads": 1}
    request |= {"result": str(tmp_path / "k.json"), "corpus": str(corpus.folder), "keep_models": False}
    process = subprocess.Popen([*module.COMMAND], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    while module.steps_made(tmp_path / "run") == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.stdin.close()
    assert process.wait() == 128 + signal.SIGTERM
    (checkpoint,) = (tmp_path / "run" / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == module.steps_made(tmp_path / "run")
    assert not os.path.exists(tmp_path / "k.json")
