"""When the GPU's kernels are used, in processes without a GPU."""

import os
import subprocess
import sys

import pytest

from memlayers.info import operations


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    ).stdout.strip()


@pytest.mark.parametrize(
    ("prelude", "reason"),
    [
        ("import os; os.environ['MEMLAYERS_REFERENCE'] = '1'", "MEMLAYERS_REFERENCE is set"),
        ("import sys; sys.modules['triton'] = None", "Triton is not installed"),
    ],
    ids=["switched off", "not installed"],
)
def test_without_triton_it_says_why(prelude, reason):
    code = f"{prelude}\nfrom memlayers.ops import gpu\nprint(gpu.kernels('read'), gpu.why_not())"
    kernels, said = run(code).split(" ", 1)
    assert kernels == "None"
    assert said.startswith(reason)


def test_a_triton_that_does_not_import_is_done_without(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('made for another system')")
    said = run("from memlayers.ops import gpu; print(gpu.why_not())", PYTHONPATH=str(tmp_path))
    assert said == "Triton does not import: made for another system"


def test_importing_does_not_load_triton():
    assert run("import sys, memlayers, memlayers.ops.read; print('triton' in sys.modules)") == "False"


def test_info_names_both_devices():
    for name, text in operations().items():
        if name == "threads of a CPU":
            continue
        assert "on a CPU (" in text
        assert "on a GPU (" in text


def test_the_footprint_knows_the_blocks_of_the_kernels():
    from memlayers.lm.footprint import _GPU_ASIDE
    from memlayers.ops.gpu import rows

    for count in (1, 2**15, 2**21 + 1, 2**27):
        assert count / rows.block_length(count) <= _GPU_ASIDE
