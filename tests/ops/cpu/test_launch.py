"""Kernels on threads: as many as PyTorch has, from several Python threads at once, after a fork, in a next process."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from memlayers import MemoryConfig, MemoryLayer
from memlayers.ops import cpu
from memlayers.ops.cpu import launch as launching
from memlayers.ops.read import read, read_reference
from memlayers.optim import RowAdam

ARGUMENTS = torch.randn(100, 64), torch.randint(100, (300, 16)), torch.randn(300, 16)


def test_as_many_threads_as_torch_has(monkeypatch):
    seen = []
    monkeypatch.setattr(launching, "team", lambda: lambda function, argument, threads: seen.append(threads))
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        read(*ARGUMENTS)
    read(ARGUMENTS[0], ARGUMENTS[1][:1], ARGUMENTS[2][:1])  # one task
    torch.set_num_threads(before)
    assert seen == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ...}, "'table', 'tokens', 'topk'.* got .*'table', 'topk'"),
        ({"token": 4}, "'table', 'tokens', 'topk'.* got .*'table', 'token', 'tokens', 'topk'"),
        ({"next_task": 1}, "got .*'next_task'"),
        ({"tokens": 4.0}, "int"),
    ],
    ids=["missing", "unknown", "a counter", "float for int"],
)
def test_a_kernel_is_not_run_with_other_arguments_than_it_names(monkeypatch, change, message):
    from memlayers.ops.cpu.read import _read

    table, slots, weights = ARGUMENTS
    given = {"table": table, "slots": slots, "weights": weights, "outputs": torch.empty(300, 64)}
    given |= {"num_tokens": 300, "topk": 16, "num_slots": 100, "width": 64, "kind": 0, "tokens": 4, "columns": 64}
    seen = []
    monkeypatch.setattr(launching, "team", lambda: lambda function, argument, threads: seen.append(threads))
    launching.launch(_read, 1, **given)
    wrong = {name: value for name, value in {**given, **change}.items() if value is not ...}
    with pytest.raises(TypeError, match=message):
        launching.launch(_read, 1, **wrong)
    assert seen == [1]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_python_s_threads_where_there_is_no_openmp(monkeypatch, threads):
    monkeypatch.setattr(launching, "team", lambda: launching.python_threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y = read(*ARGUMENTS)
    torch.set_num_threads(before)
    torch.testing.assert_close(y, read_reference(*ARGUMENTS), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch brings OpenMP's interface on Linux")
def test_the_threads_are_those_of_torch():
    launching.team.cache_clear()
    assert launching.team() is not launching.python_threads


def test_python_threads_may_train_layers_at_once():
    errors = []

    def train(seed):
        try:
            torch.manual_seed(seed)
            layer = MemoryLayer(MemoryConfig(dim=32, heads=2, topk=8, num_subkeys=16, query_dim=16))
            optimizer = RowAdam(layer)
            for _ in range(20):
                layer(torch.randn(40, 32)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert layer.values.weight.isfinite().all()
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert not errors


def run(code, **environment):
    """Standard output of a Python of its own, which is stopped if it hangs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=90, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forked_processes_go_on_and_workers_of_a_data_loader_may_call_a_layer():
    code = """
import os, torch
from memlayers import MemoryConfig, MemoryLayer
from memlayers.ops.read import read
arguments = torch.randn(100, 64), torch.randint(100, (300, 16)), torch.randn(300, 16)
expected = read(*arguments)  # OpenMP's threads exist from here on
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(read(*arguments), expected) else 1)
print(os.waitpid(child, 0)[1])

layer = MemoryLayer(MemoryConfig(dim=32, heads=2, topk=8, num_subkeys=16, query_dim=16)).eval()
with torch.no_grad():
    layer(torch.randn(40, 32))

class Features(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        with torch.no_grad():
            return layer(torch.full((40, 32), float(index)))

loader = torch.utils.data.DataLoader(Features(), num_workers=2, multiprocessing_context="fork")
print(sum(len(batch) for batch in loader))
"""
    assert run(code).split() == ["0", "8"]


@pytest.mark.slow
def test_kernels_are_kept_on_disk_for_the_next_process(tmp_path):
    code = "from memlayers.ops.cpu import read; print(read._read.cache_hits, read._dot.cache_hits)"
    outputs = [run(code, NUMBA_CACHE_DIR=str(tmp_path)).split() for _ in range(2)]
    assert outputs == [["0", "0"], ["1", "1"]]


def test_without_numba_everything_works_and_says_why():
    code = """
import sys
sys.modules["numba"] = None
import torch
from memlayers import MemoryConfig, MemoryLayer, RowAdam
from memlayers.ops import cpu
layer = MemoryLayer(MemoryConfig(dim=32, heads=2, topk=8, num_subkeys=16, query_dim=16))
optimizer = RowAdam(layer)
layer(torch.randn(40, 32)).square().sum().backward()
optimizer.step()
layer.eval()
with torch.no_grad():
    layer(torch.randn(1, 32))
print(cpu.why_not())
"""
    assert "Numba" in run(code)
    assert cpu.why_not() is None


@pytest.mark.parametrize("value", ["1", "yes"])
def test_the_switch_has_the_references_run(monkeypatch, value):
    used = []
    monkeypatch.setenv("MEMLAYERS_REFERENCE", value)
    monkeypatch.setattr(launching, "team", lambda: used.append)
    monkeypatch.setattr(cpu, "why_not", cpu.why_not.__wrapped__)  # which is asked once a process
    torch.testing.assert_close(read(*ARGUMENTS), read_reference(*ARGUMENTS), rtol=0, atol=0)
    assert cpu.why_not() == "MEMLAYERS_REFERENCE is set"
    assert used == []
