"""The examples, run as they stand, on the tiny models that they make."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "load_and_generate.py", "retrofit.py", "share_a_table.py",
    }  # fmt: skip


def test_retrofit(tmp_path, capsys):
    assert main_of("retrofit.py")(output=str(tmp_path), steps=40) < 4.4  # ln 100 = 4.6
    assert "values" in capsys.readouterr().out
    assert (tmp_path / "memory" / "memory.safetensors").stat().st_size > 64 * 64 * 32 * 4


def test_share_a_table(capsys):
    assert main_of("share_a_table.py")(steps=21) < 4.4
    assert "3 memories, 1 table of [4096, 32]" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_load_and_generate():
    first, second = main_of("load_and_generate.py")()
    assert first == second
    assert len(first) > 3
