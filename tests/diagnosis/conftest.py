import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer
from memlayers.models.wrappers import ParallelMemory


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """x + mlp(tanh(a x)), where mlp is a memory, or one beside a network."""

    def __init__(self, *, parallel=False, layer=MemoryLayer, **fields):
        super().__init__()
        sizes = {"dim": 16, "heads": 2, "topk": 3, "num_subkeys": 8, "query_dim": 8, **fields}
        memory = layer(MemoryConfig(**sizes))
        self.inner = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.BatchNorm1d(16)
        self.mlp = ParallelMemory(nn.Linear(16, 16), memory) if parallel else memory
        self.outer = nn.Linear(16, 16)

    @property
    def memory(self):
        return self.mlp.memory if isinstance(self.mlp, ParallelMemory) else self.mlp

    def forward(self, x):
        hidden = torch.tanh(self.inner(self.dropout(x)))
        hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden)
        return self.outer(x + self.mlp(hidden))


@pytest.fixture
def make_block():
    return Block


@pytest.fixture
def block():
    return Block()


@pytest.fixture
def batch():
    return torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(1))


def _found(report, check):
    (finding,) = [finding for finding in report.findings if finding.check == check]
    return finding


@pytest.fixture
def found():
    return _found


def _fails(report, check, says):
    """The check failed, says so in these words, and names the memory."""
    finding = _found(report, check)
    assert finding.state == "fail", report
    assert says in finding.message
    assert finding.memory in ("mlp", "mlp.memory")
    assert finding.advice
    assert not report.ok
    return finding


@pytest.fixture
def fails():
    return _fails


def _only(report, *checks):
    assert {finding.check for finding in report.failures} == set(checks), report


@pytest.fixture
def only():
    return _only
