"""When the GPU's kernels are used, in processes without a GPU."""

import os
import subprocess
import sys

import pytest

from memlayers.info import operations
from memlayers.ops import gpu


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    ).stdout.strip()


def test_a_triton_that_does_not_import_is_done_without(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('made for another system')")
    code = """
import sys, memlayers, memlayers.ops.read
from memlayers.ops import gpu
print('triton' in sys.modules)  # importing does not load it
print(gpu.kernels('read'))
print(gpu.why_not())
"""
    said = run(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert said.splitlines() == ["False", "None", "Triton does not import: made for another system"]


@pytest.mark.parametrize(
    ("switch", "reason"),
    [("1", "MEMLAYERS_REFERENCE is set"), ("", "Triton is not installed")],
    ids=["switched off", "not installed"],
)
def test_without_triton_it_says_why(monkeypatch, switch, reason):
    monkeypatch.setenv("MEMLAYERS_REFERENCE", switch)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(gpu, "why_not", gpu.why_not.__wrapped__)  # which is asked once a process
    assert gpu.kernels("read") is None
    assert gpu.why_not() == reason


def test_info_names_both_devices():
    for name, text in operations().items():
        if name in ("threads of a CPU", "kernels for a CPU"):
            continue
        assert "on a CPU (" in text
        assert "on a GPU (" in text


def test_the_footprint_knows_the_blocks_of_the_kernels():
    from memlayers.lm.footprint import _GPU_ASIDE
    from memlayers.ops.gpu import rows

    for count in (1, 2**15, 2**21 + 1, 2**27):
        assert count / rows.block_length(count) <= _GPU_ASIDE
