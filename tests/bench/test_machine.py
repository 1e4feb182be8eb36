import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memlayers.bench import machine, peak
from memlayers.bench.training import OURS

CPU = torch.device("cpu")


def test_devices():
    assert machine.device_of("cpu") == CPU
    assert machine.device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device must be one of auto, cpu.*, got 'tpu'"):
        machine.device_of("tpu")


def test_cuda_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be one of auto, cpu on this machine, got 'cuda'"):
        machine.device_of("cuda")


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with machine.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with machine.threads(None):
        assert torch.get_num_threads() == before


def test_memory():
    assert 2**18 <= machine.cache_bytes(CPU) < 2**34


def test_the_benchmark_needs_no_transformers():
    script = "import sys, memlayers.bench.run; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


SCRIPT = """
import torch
from memlayers.hardware import peak_bytes
before = peak_bytes(torch.device("cpu"))
torch.ones(2**26)
print(peak_bytes(torch.device("cpu")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_the_peak_is_that_of_the_process():
    filler = torch.ones(2**27)  # half a gigabyte here must not count there
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert 0.9 * 2**28 < int(done.stdout) < 1.3 * 2**28
    del filler


@pytest.mark.slow
def test_peak_of_a_step(tiny):
    bytes_, note = peak.measure(OURS, tiny, CPU)
    assert note == ""
    assert 3 * tiny.table_bytes < bytes_ < 2**30


def test_a_process_that_fails_says_so(tiny, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert peak.measure(OURS, tiny, CPU) == (None, "ours: ended with status 1")


def test_commit():
    found = machine.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)


def test_no_commit_of_somebody_elses_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "--message", "theirs")
    package = tmp_path / "venv" / "lib" / "site-packages" / "memlayers" / "bench" / "machine.py"
    package.parent.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(package))
    assert machine.commit() is None
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "src" / "memlayers" / "bench" / "machine.py"))
    assert re.fullmatch(r"[0-9a-f]{40}", machine.commit())
