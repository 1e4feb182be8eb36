"""A rank that is killed at any moment ends the others: none waits for ever, and none goes on alone."""

import os
import random
import signal
import threading

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlayers import MemoryConfig, MemoryLayer
from memlayers.optim import MemoryAdamW


def until_killed(rank, seconds):
    """Rank 1 kills itself; what the other one raises, and how many of its steps were made after that at most."""
    torch.manual_seed(0)
    config = MemoryConfig(dim=16, heads=2, topk=4, num_subkeys=30, query_dim=8, query_norm="rms")
    model = nn.Sequential(nn.Linear(16, 16), MemoryLayer(config))
    optimizer = MemoryAdamW(model)
    replica = DistributedDataParallel(model)
    if rank == 1:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        while True:
            replica(torch.randn(20, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:  # of torch.distributed
        return str(error)


@pytest.mark.slow
@pytest.mark.promise(
    "Several processes", "a rank is killed", "supported", "the others raise an error of `torch.distributed`, and end"
)
@pytest.mark.parametrize("seed", range(5))
def test_the_others_end_when_one_is_killed(seed, tmp_path, start_ranks):
    with start_ranks(tmp_path, 2) as call:
        message, gone = call(until_killed, random.Random(seed).uniform(0.5, 3))
    assert gone == "gone"
    assert message
