"""Tests of the GPU's kernels: on a GPU, or anywhere under Triton's interpreter (`make test` runs them so).

TRITON_INTERPRET=1 pytest tests/ops/gpu

The interpreter is chosen when Triton is imported, so these tests need a process that was started with the variable.
There, in `interpreted` tests, the operations themselves run the kernels on tensors of the CPU.
"""

import importlib.util
import os

import pytest
import torch

# Older versions of PyTorch want it for deterministic products on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
HAS_TRITON = importlib.util.find_spec("triton") is not None

if not (HAS_TRITON and (IS_INTERPRETED or torch.cuda.is_available())):
    collect_ignore_glob = ["test_*.py"]

    def pytest_report_header():
        wanted = "TRITON_INTERPRET=1, or a GPU that PyTorch is built for" if HAS_TRITON else "Triton"
        return f"the kernels of a GPU are not tested here: that needs {wanted}"


@pytest.fixture(scope="session", autouse=True)
def _kernels_in_operations():
    """Interpreted, an operation on tensors of the CPU does what it would do on those of a GPU."""
    if not IS_INTERPRETED:
        return
    from memlayers.ops import gpu, registry

    registry.DEVICES["cpu"] = gpu


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` holds NaN (and the greatest integers), so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device():
    """The GPU, or the CPU where kernels are interpreted."""
    return torch.device("cpu" if IS_INTERPRETED else "cuda")
