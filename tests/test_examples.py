"""The examples, run as they stand, on the tiny models that they make."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "load_and_generate.py", "retrofit.py", "several_processes.py", "share_a_table.py",
    }  # fmt: skip


def test_retrofit(tmp_path, capsys):
    assert main_of("retrofit.py")(output=str(tmp_path), steps=40) < 4.4  # ln 100 = 4.6
    assert "values" in capsys.readouterr().out
    assert (tmp_path / "memory" / "memory.safetensors").stat().st_size > 64 * 64 * 32 * 4


def test_share_a_table(capsys):
    assert main_of("share_a_table.py")(steps=21) < 4.4
    assert "3 memories, 1 table of [4096, 32]" in capsys.readouterr().out


def test_several_processes_in_one(capsys):
    assert main_of("several_processes.py")(steps=21) < 4.4
    assert "in 1 process(es)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.promise(
    "Several processes",
    "`torchrun` and `accelerate launch`",
    "supported",
    "build the optimizer before `prepare` or in the same call",
)
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_several_processes(launcher):
    command = [sys.executable, "-m", *launcher, str(EXAMPLES / "several_processes.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    losses = [float(line.split("loss ")[1].split()[0]) for line in run.stdout.splitlines() if "2 process" in line]
    assert len(losses) == 4
    assert losses[-1] < 4.0 < losses[0]


@pytest.mark.filterwarnings("error")
def test_load_and_generate():
    first, second = main_of("load_and_generate.py")()
    assert first == second
    assert len(first) > 3
