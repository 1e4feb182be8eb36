"""Several processes: a dense table trains under DistributedDataParallel, a row optimizer is refused."""

import socket

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlayers import MemoryConfig, MemoryLayer, RowAdam


def make():
    torch.manual_seed(0)
    return MemoryLayer(MemoryConfig(dim=6, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms"))


def worker(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    try:
        RowAdam(make())
        refusal = None
    except ValueError as error:
        refusal = str(error)
    model = DistributedDataParallel(make())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    model(x[4 * rank : 4 * rank + 4]).square().mean().backward()
    optimizer.step()
    queue.put((rank, refusal, {name: value.numpy() for name, value in model.module.state_dict().items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.promise(
    "Trainers",
    "`DistributedDataParallel`",
    "supported",
    "with dense gradients; a row optimizer in several processes is refused",
)
def test_dense_mode_trains_replicas_as_one_and_row_mode_is_refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted((queue.get(timeout=120) for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join()
    alone = make()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    alone(x).square().mean().backward()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    for _, refusal, state in results:
        assert "world size of 2, allowed is 1" in refusal
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), value, msg=name)


def test_a_process_group_that_appears_later_is_refused_at_the_step(monkeypatch):
    table = make().values
    optimizer = RowAdam(nn.ModuleList([table]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="world size of 4, allowed is 1"):
        optimizer.step()
