"""A network with two memories, and batches for it."""

import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer

CONFIG = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8, query_norm="rms")


class Net(nn.Module):
    """Two memories behind each other, of one table or of two."""

    def __init__(self, kind=MemoryLayer, shared=False, config=CONFIG):
        super().__init__()
        torch.manual_seed(0)
        self.first = kind(config)
        self.second = kind(config, values=self.first.values if shared else None)

    def forward(self, x, mask=None):
        x = x + self.first(x, mask)
        return x + self.second(x, mask)


def batches(count=3, tokens=7):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(2, tokens, 16, generator=draw), torch.rand(2, tokens, generator=draw) < 0.7) for _ in range(count)
    ]


@pytest.fixture(scope="session")
def make_net():
    return Net


@pytest.fixture(scope="session")
def make_batches():
    return batches
