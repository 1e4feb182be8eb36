"""What the bench does on a GPU, in processes without one: fake tensors know where they are, and stand-ins keep time."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from memlayers.bench import cases, gate, limits, machine, run, timing, training
from memlayers.bench.run import BenchConfig
from memlayers.bench.shapes import AXES, shape
from memlayers.bench.training import DENSE, OURS, REFERENCE, make_steps

GPU = torch.device("cuda:0")
MILLISECONDS = 7.0


class Event:
    """Of `torch.cuda.Event` what a clock uses."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        told.append("event")

    def synchronize(self):
        told.append("wait")

    def elapsed_time(self, end):
        return MILLISECONDS


told = []


class WithoutSwitching(TorchFunctionMode):
    """Without the GPU that `tensor[...]`, `copy_` and `contiguous` switch to before they look at fake tensors."""

    def __torch_function__(self, function, types, arguments=(), settings=None):
        if function is torch.Tensor.copy_:
            tensor, source = arguments
            assert source.expand(tensor.shape).device == tensor.device
            return tensor
        if function is torch.Tensor.contiguous:
            return arguments[0].clone(memory_format=torch.contiguous_format)
        if function is not torch.Tensor.__getitem__:
            return function(*arguments, **(settings or {}))
        tensor, index = arguments
        if isinstance(index, torch.Tensor):
            return torch.ops.aten.index(tensor, [index])
        place = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")[index]
        return tensor.as_strided(place.shape, place.stride(), tensor.storage_offset() + place.storage_offset())


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU with a cache of 50 MB, as far as a clock asks for one; `told` is what it was told."""
    told.clear()
    properties = SimpleNamespace(
        name="a GPU", total_memory=80 * 2**30, multi_processor_count=132, L2_cache_size=50 * 2**20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: told.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty cache"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cases, "available_memory", lambda _: 80 * 10**9)
    monkeypatch.setattr(cases, "capture", lambda call, device: call)
    # They look for the device.
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor)


def only_looks_where_tensors_are(_, *given):
    """In place of a check: operations of ours on fake tensors would take them from anywhere."""
    for one in given:
        if isinstance(one, tuple):
            only_looks_where_tensors_are(None, *one)
        elif isinstance(one, torch.nn.Module):
            only_looks_where_tensors_are(None, *one.parameters(), *one.buffers())
        elif isinstance(one, torch.Tensor):
            assert one.device == GPU


@pytest.fixture
def values_unseen(monkeypatch):
    """Whoever looks at values is answered without, for fake tensors have none: the gate, and counts of rows."""
    for name in ("check_selection", "check_read", "check_outputs", "check_update"):
        monkeypatch.setattr(gate, name, only_looks_where_tensors_are)
    monkeypatch.setattr(gate, "draw_tokens", lambda one, textbook: torch.empty(one.tokens, one.dim, device=GPU))
    monkeypatch.setattr(torch.Tensor, "unique", lambda tensor: tensor.flatten())
    monkeypatch.setattr(cases, "measure_peak", lambda *_: (1000, ""))
    # A backward pass has threads of its own for each GPU that there is, and BatchNorm asks for its version of cuDNN.
    forward = torch.no_grad()(lambda module, x_TD: module.eval()(x_TD))
    monkeypatch.setattr(training, "_step", lambda module, _, x_TD, __, **___: lambda: forward(module, x_TD))


def results_of(name, one, repeats=3):
    (case,) = (case for case in run.registry() if case.name == name)
    with FakeTensorMode(), WithoutSwitching():
        bench = cases.Bench.on(timing.Stopwatch(device=GPU, repeats=repeats, budget=60.0))
        return list(run._results(case, bench, one))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in AXES else []) for name in run.case_names()],
)
def test_every_case_keeps_to_the_gpu(name, fake_gpu, values_unseen, monkeypatch, tiny):
    monkeypatch.setattr(limits, "_STREAM_BYTES", 2**16)
    results = results_of(name, tiny)
    assert results
    assert told.count("empty cache") >= 1
    for result in results:
        assert result.samples, result.notes
        assert (REFERENCE in result.samples) == (training.REFERENCE_ON_GPU in result.notes)
        assert not [note for note in result.notes if "skipped" in note or "not captured" in note]
        if result.unit == "s" and result.part != "launches included":
            assert all(
                set(samples) <= {MILLISECONDS / 1e3, 3 * MILLISECONDS / 1e3} for samples in result.samples.values()
            )


def test_limits_on_a_gpu_are_of_one_pass(fake_gpu, values_unseen, monkeypatch, tiny):
    monkeypatch.setattr(limits, "_STREAM_BYTES", 2**16)
    of_floats, of_few_bits, *others = results_of("read", tiny)
    assert list(of_few_bits.samples) == ["ours", "8 bits", "4 bits"]
    for result in (of_floats, *others):
        assert list(result.samples) == ["ours", "F.embedding_bag", "copy (limit)", "as many bytes in order (limit)"]
        assert result.work["copy (limit)"] == (2 * 4 * 2**16, "GB/s")
        assert result.share("ours") == pytest.approx(result.work["ours"][0] / (2 * 4 * 2**16))
    (of_machine,) = results_of("machine", tiny)
    assert "copy" in of_machine.samples
    assert not [name for name in of_machine.samples if "three tables" in name]
    parts = [result.part for result in results_of("decode", tiny)]
    assert parts == ["launches included", "as CUDA graphs"]


def test_reading_in_order_covers_as_many_rows():
    table_SV = torch.arange(12.0).view(6, 2)
    read = []
    total = torch.Tensor.sum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "sum", lambda tensor: read.append(len(tensor)) or total(tensor))
        limits.read_in_order(table_SV, 15)()
    assert read == [6, 6, 3]


def test_a_call_is_timed_between_events_behind_other_work(fake_gpu):
    with FakeTensorMode():
        clock = timing.GpuClock(GPU)
        assert clock.buffer.nbytes == 2**29  # more than four times its cache
        busy = []
        clock.buffer = SimpleNamespace(nbytes=2**29, sum=lambda: busy.append(told.append("busy")))
        assert clock.seconds(lambda: told.append("call")) == MILLISECONDS / 1e3
    assert len(busy) == 16
    assert told == ["busy"] * 16 + ["event", "call", "event", "wait"]


def test_a_launched_call_is_timed_from_an_idle_device(fake_gpu):
    with FakeTensorMode():
        clock = timing.GpuClock(GPU, launching=True)
        clock.buffer = SimpleNamespace(sum=lambda: told.append("flush"))
        seconds = clock.seconds(lambda: told.append(time.sleep(0.01) or "call"))
    assert 0.01 <= seconds < 1
    assert told == ["flush", "synchronize", "call", "synchronize"]


def test_what_cannot_be_captured_is_left_out(fake_gpu, values_unseen, monkeypatch, tiny):
    def capture(call, device):
        if len(told_names) == 1:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        told_names.append(call)
        return call

    told_names = []
    monkeypatch.setattr(cases, "capture", capture)
    _, graphs = results_of("decode", tiny)
    assert list(graphs.samples) == ["ours"]
    assert "textbook: not captured: RuntimeError: operation not permitted when stream is capturing" in graphs.notes


def test_memory_that_runs_out_ends_one_case(fake_gpu, tiny):
    def case(bench, one):
        yield cases.Result(case="read", part="first", shape=one)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    found = list(run._results(run.Case("read", case), SimpleNamespace(lacks=lambda _: None), tiny))
    assert [result.part for result in found] == ["first", ""]
    assert found[1].notes == ("stopped: CUDA out of memory. Tried to allocate",)


def test_a_gpu_is_given_tokens_that_fill_it(monkeypatch):
    assert {one.tokens for _, one in BenchConfig(shapes=("512x512",), device="cpu").pairs()} == {2048}
    monkeypatch.setattr(run, "device_of", lambda _: GPU)
    tokens = {case.name: one.tokens for case, one in BenchConfig(shapes=("512x512",)).pairs()}
    assert (tokens["select"], tokens["read"], tokens["update"], tokens["train"]) == (16384, 16384, 2048, 2048)
    assert 4 * tokens["select"] == 65_536
    assert {one.tokens for _, one in BenchConfig(shapes=("512x512",), tokens=9).pairs()} == {9}


def test_an_80_gb_card_has_room_for_the_bars():
    from memlayers.bench.training import TRAINED, contender_bytes

    for case in run.registry():
        for name in case.shapes:
            one = shape(name)
            assert case.tables * one.table_bytes + one.workspace_bytes < 70e9, (case.name, name)
            for contender in (*TRAINED, REFERENCE) if case.name in ("train", "memory") else ():
                assert contender_bytes(contender, one) < 70e9, (contender, name)


def test_the_gpu_and_its_driver(fake_gpu, monkeypatch, tmp_path):
    file = tmp_path / "version"
    monkeypatch.setattr(machine, "_DRIVER_FILE", file)
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="550.54.15\n550.54.15\n"))
    found = machine.gpu_of(GPU)
    assert (found["name"], found["gigabytes"], found["cache_megabytes"]) == ("a GPU", 80.0, 50)
    assert found["driver"] == "550.54.15"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12"
    )
    assert machine.gpu_of(GPU)["driver"] == "580.65.06"
    file.unlink()
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        machine.gpu_of(GPU)

    def absent(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.gpu_of(GPU)["driver"] is None


def test_products_are_in_full_precision_within():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with contextlib.suppress(ValueError), machine.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            raise ValueError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_references_within(tiny, monkeypatch):
    from memlayers.ops import cpu, gpu

    before = cpu.why_not, gpu.why_not
    with machine.references():
        assert cpu.kernels("read") is None
        assert gpu.kernels("read") is None
        assert machine.kernels_on(GPU) == "no kernels (the reference is measured)"
    assert (cpu.why_not, gpu.why_not) == before

    used = []
    kernels = cpu.kernels
    monkeypatch.setattr(cpu, "kernels", lambda name: used.append((name, kernels(name))) or used[-1][1])
    steps, _ = make_steps((OURS, REFERENCE, DENSE), tiny, torch.device("cpu"))
    steps[REFERENCE]()
    assert {name for name, _ in used} >= {"search", "read", "rows"}
    assert all(module is None for _, module in used)
    used.clear()
    steps[OURS]()
    if cpu.why_not() is None:
        assert all(module is not None for _, module in used)
