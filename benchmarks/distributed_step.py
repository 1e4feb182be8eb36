"""A training step of one memory in several processes over gloo: its time, its memory, and its bytes on the wire.

    python benchmarks/distributed_step.py [--ranks 2] [--slots 262144] [--tokens 2048] [--rounds 3]

Ways to train the same layer, each in processes of its own with one thread a rank, one after the other in rounds:

dense            `DistributedDataParallel`: the table is a plain parameter
dense, in place  the same with `gradient_as_bucket_view=True`, which saves a copy of the gradients
replicas         `RowAdam` for the table, then `DistributedDataParallel`
columns          `shard_tables`, then the same

Fused Adam trains all else. Printed are the median of a rank's steps over all rounds, the peak of its resident memory
less that before the model was built, and the bytes that it receives in a step for a token of another rank: counted at
the calls of `torch.distributed`, without what DDP reduces of itself, which it does not send by way of Python.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from memlayers import MemoryConfig, MemoryLayer
from memlayers.distributed import shard_tables
from memlayers.hardware import hardware, peak_bytes
from memlayers.optim import RowAdam

DENSE, IN_PLACE, REPLICAS, COLUMNS = "dense", "dense, in place", "replicas", "columns"
WAYS = (DENSE, IN_PLACE, REPLICAS, COLUMNS)
WARM_UP = 2


class Wire:
    """Counts the bytes that this rank receives from others."""

    def __init__(self) -> None:
        self.received = 0.0

    def count(self) -> None:
        """From here on."""
        share = (dist.get_world_size() - 1) / dist.get_world_size()
        sizes: dict[str, Callable[..., float]] = {
            "all_gather": lambda out, *_: share * sum(one.nbytes for one in out),
            "all_to_all_single": lambda out, _, mine, *__: out.nbytes - mine[dist.get_rank()] * out.itemsize,
            "all_reduce": lambda one, *_: 2 * share * one.nbytes,
        }
        for name, size in sizes.items():
            setattr(dist, name, self._counted(getattr(dist, name), size))

    def _counted(self, call: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self.received += size(*given)
            return call(*given, **named)

        return counted


def rank_main(way: str, num_subkeys: int, dim: int, tokens: int, steps: int) -> dict[str, Any]:
    """In one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, wire, device = dist.get_rank(), Wire(), torch.device("cpu")
    dist.all_reduce(torch.zeros(1))
    before = peak_bytes(device)
    torch.manual_seed(0)
    layer: torch.nn.Module = MemoryLayer(MemoryConfig(dim=dim, num_subkeys=num_subkeys))
    if way == COLUMNS:
        shard_tables(layer, init_device_mesh("cpu", (dist.get_world_size(),)))
    rows: list[torch.optim.Optimizer] = [RowAdam(layer, lr=1e-4)] if way in (REPLICAS, COLUMNS) else []
    rest = [one for name, one in layer.named_parameters() if not (rows and name.startswith("values."))]
    optimizers = [*rows, torch.optim.Adam(rest, lr=1e-4, fused=True)]
    model = DistributedDataParallel(layer, gradient_as_bucket_view=way == IN_PLACE)
    torch.manual_seed(1 + rank)
    seconds = []
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            wire.count()
        x_TD, grad_TD = torch.randn(tokens, dim), torch.randn(tokens, dim)
        dist.barrier()
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x_TD).backward(grad_TD)
        for optimizer in optimizers:
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    received = wire.received / steps / tokens / (dist.get_world_size() - 1)
    dist.destroy_process_group()
    return {"seconds": seconds[WARM_UP:], "peak": peak_bytes(device) - before, "token_bytes": received}


def launch(arguments: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """What each rank has found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--rank_arguments", json.dumps(arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(
    ranks: int = 2,
    slots: int = 2**18,
    dim: int = 1024,
    tokens: int = 2048,
    rounds: int = 3,
    steps: int = 5,
    rank_arguments: str | None = None,
) -> None:
    """Prints a line of JSON for each launch, and a table.

    Args:
        ranks: processes on this machine.
        slots: of the table; a square.
        dim: width of the model and of a value.
        tokens: of each rank in a step.
        rounds: of all ways.
        steps: that are measured in each.
        rank_arguments: is used by this script itself.
    """
    if rank_arguments is not None:
        sys.stdout.write(json.dumps(rank_main(**json.loads(rank_arguments))) + "\n")
        return
    num_subkeys = round(slots**0.5)
    if num_subkeys**2 != slots:
        raise SystemExit(f"slots must be a square, got {slots}")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, of_ranks in found.items():
            given = {"way": way, "num_subkeys": num_subkeys, "dim": dim, "tokens": tokens, "steps": steps}
            of_ranks += (now := launch(given, ranks))
            print(json.dumps({"way": way, "ranks": now}), flush=True)
    step = {way: statistics.median(s for one in many for s in one["seconds"]) for way, many in found.items()}
    peak = {way: max(one["peak"] for one in many) for way, many in found.items()}
    print(f"\n{ranks} ranks x {tokens} tokens, {slots} x {dim}, {hardware()}\n")
    print(
        "| way | step | times as fast as dense | peak of a rank | of dense | bytes a token |\n|---|--:|--:|--:|--:|--:|"
    )
    for way, many in found.items():
        print(
            f"| {way} | {step[way]:.2f} s | {step[DENSE] / step[way]:.2f} | {peak[way] / 1e9:.2f} GB "
            f"| {peak[way] / peak[DENSE]:.2f} | {many[0]['token_bytes']:,.0f} |"
        )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
