"""The registry says of every operation what runs it, and what it says is what runs."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memlayers import MemoryConfig, MemoryLayer, RowAdam, UsageMeter
from memlayers.after_import import after_import
from memlayers.ops import cpu, gpu, read, registry
from memlayers.ops.cpu import launch
from memlayers.ops.row_step import row_sgd_

NAMES = {
    *("search", "search_backward", "select", "read", "read_row_mode", "dot", "dot_row_mode", "sum_rows", "record_"),
    *("read_low_bits", "dot_low_bits"),
    *("row_norm", "row_adam_", "row_adagrad_", "row_sgd_", "infer"),
}


def test_every_operation_is_in_the_registry():
    for name in NAMES:
        assert getattr(torch.ops.memlayers, name).default.name() == f"memlayers::{name}"
    assert registry.compositions.keys() == {
        "search", "search_backward", "select", "read", "read_row_mode", "dot", "dot_row_mode", "sum_rows",
        "read_low_bits", "dot_low_bits",
    }  # fmt: skip
    assert registry.OPERATIONS.keys() == registry.references.keys() == NAMES


@pytest.mark.parametrize("package", [cpu, gpu], ids=["cpu", "gpu"])
def test_kernels_are_where_the_registry_says(package):
    if package.why_not() is not None:
        pytest.skip(package.why_not())
    for name, operation in registry.OPERATIONS.items():
        if name != "record_" and (package is cpu or operation.gpu):
            module, function = operation.kernels.split(".")
            assert callable(getattr(package.kernels(module), function)), name


def test_what_kernels_do_not_know_is_the_reference_s(monkeypatch):
    class Kernels:
        dot = staticmethod(lambda *_: NotImplemented)

    asked = []
    monkeypatch.setattr(cpu, "kernels", lambda module: asked.append(module) or Kernels)
    monkeypatch.setitem(registry.references, "dot", lambda *given: torch.full((1, 1), 7.0))
    assert read.dot(torch.randn(2, 3), torch.tensor([[1]]), torch.randn(1, 3)).item() == 7
    assert asked == ["read"]


def test_it_says_what_runs(monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "why_not", lambda: "Triton is not installed")
    said = registry.describe()
    assert NAMES - said.keys() == {"record_"}
    assert said["search"] == "Numba on a CPU (float32, bfloat16, float16), PyTorch on a GPU (Triton is not installed)"
    assert said["row_adam_"].startswith(
        "Numba on a CPU (tables in float32, bfloat16, float16; PyTorch for others, over 10 times slower), "
    )


def test_a_slow_reference_is_told_of_once_with_the_remedy(monkeypatch, caplog):
    """One row of many is read; small tables, as in tests, are nobody's loss."""
    monkeypatch.setattr(cpu, "why_not", lambda: None)
    monkeypatch.setattr(registry, "_log_once", functools.cache(registry._log_once.__wrapped__))

    def step(width, dtype=torch.float64):
        row_sgd_(torch.zeros(2**10, width, dtype=dtype), [torch.tensor([[3]])], [torch.ones(1, 1)],
                 [torch.ones(1, width)], lr=1.0)  # fmt: skip

    step(100)
    assert not caplog.records
    step(1025)
    step(1025)
    assert [record.getMessage() for record in caplog.records] == [
        "row_sgd_ runs on its reference, which takes over 10 times as long as its kernel: its kernel takes tables in "
        "float32, bfloat16, float16, all contiguous"
    ]
    monkeypatch.setattr(cpu, "why_not", lambda: "Numba is not installed")
    monkeypatch.setattr(cpu, "kernels", lambda module: None)
    step(1025, torch.float32)
    assert "over 10 times as long as its kernel: Numba is not installed" in caplog.records[-1].getMessage()
    monkeypatch.setenv(cpu.SWITCH, "1")
    registry._log_once.cache_clear()
    step(1025, torch.float32)
    assert len(caplog.records) == 2, "who asks for references is not told"


def test_it_says_when_kernels_do_not_share_pytorch_s_threads(monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: None)
    monkeypatch.setattr(launch, "team", lambda: launch.python_threads)
    assert registry.describe()["threads of a CPU"].startswith("Python's, since PyTorch's OpenMP runtime is not found")
    monkeypatch.setattr(launch, "team", lambda: print)
    assert registry.describe()["threads of a CPU"] == "PyTorch's OpenMP runtime"


T, D, F, H, N, K, M, V = 6, 24, 3 * 14, 3, 12, 5, 3 * 5, 24
QUERY, KEYS, READ = 2 * T * D * F, 2 * T * F * N, 2 * T * M * V


def counted(layer, *, backward=False):
    x = torch.randn(T, D, requires_grad=backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.promise(
    "Export and counting",
    "`torch.utils.flop_counter.FlopCounterMode`",
    "supported",
    "counts query, keys and read, and for backward twice as many; `torch.profiler` and DeepSpeed's profiler, which "
    "know PyTorch's own operators only, count the query alone",
)
def test_the_flop_counter_counts_query_keys_and_read():
    layer = MemoryLayer(MemoryConfig(dim=D, heads=H, topk=K, num_subkeys=N, query_dim=14))
    assert counted(layer, backward=True) == 3 * (QUERY + KEYS + READ)
    optimizer = RowAdam([layer.values])
    assert counted(layer, backward=True) == 3 * (QUERY + KEYS + READ)  # what the step will sum is counted with backward
    optimizer.release()
    layer.eval()
    assert counted(layer) == QUERY + KEYS + READ  # as one operation
    with UsageMeter(layer):
        assert counted(layer) == QUERY + KEYS + READ  # by its parts
    layer.keys.requires_grad_(False)
    assert counted(layer, backward=True) == 3 * (QUERY + READ) + 2 * KEYS


def test_what_is_registered_after_the_counter_is_counted_too():
    def register(counter):
        counter.register_flop_formula(torch.ops.aten.atan)(lambda shape, **_: 7 * len(shape))

    after_import("torch.utils.flop_counter", register)
    with FlopCounterMode(display=False) as counter:
        torch.randn(2, 3).atan()
    assert counter.get_total_flops() == 14
