"""What the scripts that kill and damage count, without the runs."""

import importlib
import os
import random
import shutil
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_half_written_checkpoint_is_counted_for_the_kill_that_left_it_alone(script, tmp_path, monkeypatch):
    module = script("kill_and_resume")
    partial = tmp_path / "run-0" / "checkpoints" / ".step-00000007.abcd.partial"
    lives = iter(("writes", "is killed before it cleans up", "finishes"))

    def fork(folder, work):
        life = next(lives)
        if life == "writes":
            partial.mkdir(parents=True)
        program = shutil.which("true" if life == "finishes" else "sleep")
        return os.posix_spawn(program, [program, "60"], os.environ)

    def aim(child, run, seconds):
        raise AssertionError

    monkeypatch.setattr(module, "_fork", fork)
    monkeypatch.setattr(module, "_aim", aim)
    monkeypatch.setattr(module, "_must_finish", lambda folder, work: None)
    monkeypatch.setattr(module, "fingerprint", lambda run: None)
    # The first life writes its checkpoint once it is forked, so what was there before is looked at earlier.
    found = module.run_kills(tmp_path, kills=2, config=module.small_run())
    assert (found.kills, found.in_checkpoints, found.runs) == (2, 1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_run_that_fails_ends_the_kills_with_the_tail_of_its_log(script, tmp_path):
    module = script("kill_and_resume")
    (tmp_path / "log.txt").write_text("Traceback\nValueError: what went wrong")
    program = shutil.which("false")
    child = os.posix_spawn(program, [program], os.environ)
    with pytest.raises(RuntimeError, match="failed instead of going on:\nTraceback\nValueError: what went wrong"):
        module._sleep(child, tmp_path, 60)


def test_what_was_done_is_what_is_counted(script, tmp_path):
    damage = script("corruption").damage
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    draw = random.Random(0)
    assert damage(one, "swapped", [two], draw) == ("swapped", {one: b"one", two: b"two"})
    assert (one.read_bytes(), two.read_bytes()) == (b"two", b"one")
    assert damage(one, "swapped", [], draw) == ("bit flipped", {one: b"two"})
    assert one.read_bytes() != b"two"
    assert damage(two, "missing", [], draw) == ("missing", {two: b"one"})


def test_a_swap_without_a_twin_is_reported_as_a_flipped_bit(script, tmp_path, monkeypatch):
    module = script("corruption")
    alone = tmp_path / "corpus" / "alone.bin"

    class Scene:
        def __init__(self, folder):
            alone.parent.mkdir()
            alone.write_bytes(b"alone")

        def files(self):
            return {alone: self.read}

        def read(self):
            if not alone.is_file() or alone.read_bytes() != b"alone":
                raise ValueError(f"{alone} is damaged")

    monkeypatch.setattr(module, "Scene", Scene)
    met, wrong = module.run_damages(tmp_path, files=5)
    assert met == {
        ("corpus", kind): count for kind, count in (("cut off", 1), ("bit flipped", 2), ("grown", 1), ("missing", 1))
    }
    assert wrong == []
