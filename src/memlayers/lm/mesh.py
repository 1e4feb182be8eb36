"""mesh: what each of several processes holds and receives in a step of a run, by how they hold tables. Calculated."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch

from memlayers.available import available_memory
from memlayers.distributed.wire import LEAST_COLUMNS, Layout, choice, layouts, require_mesh, traffic
from memlayers.experts import Experts
from memlayers.layer import memory_layers
from memlayers.lm.build import build_model
from memlayers.lm.config import RunConfig
from memlayers.lm.evaluate import ComputePrecision
from memlayers.lm.footprint import footprint
from memlayers.lm.share import share_of
from memlayers.presentation import Lines
from memlayers.sizes import nominal_bytes, size_text
from memlayers.values import value_tables


def share_on(config: RunConfig, mesh: Sequence[int]) -> RunConfig:
    """The configuration of one process of a mesh.

    Raises `ValueError` for what is no mesh, for a run without memories, and where the batch cannot be shared.
    """
    size = require_mesh(mesh)
    if not config.memory_layers:
        raise ValueError("mesh is for a model with memories, whose tables it compares: memory_layers names no block")
    return share_of(config, size)


def mesh_lines(
    config: RunConfig, mesh: Sequence[int], *, vocab_size: int, precision: ComputePrecision, device: torch.device
) -> Lines:
    """For people: what a process of a mesh holds, receives and needs, and which layout of the tables to choose.

    Args:
        config: of all processes.
        mesh: processes, or (machines, processes of a machine).
        vocab_size: of the model.
        precision: that it is trained in.
        device: like those of the processes.

    Raises:
        ValueError: as `share_on` does.
    """
    share, size = share_on(config, mesh), require_mesh(mesh)
    share = dataclasses.replace(share, memory_values="memory")  # where the layouts have their tables
    model = build_model(config, vocab_size=vocab_size, eot_id=0, device="meta")
    memories = memory_layers(model).values()
    reads = Counter(table for memory in memories for table in value_tables(memory.values))  # one may be shared
    tables = [
        {
            "slots": len(table.weight),
            "width": table.weight.shape[1],
            "rows": config.memory.heads * config.memory.topk,
            "tokens": share.training.batch_tokens * times,
        }
        for table, times in reads.items()
    ]
    found = _of_all([layouts(**table, mesh=mesh) for table in tables])
    why_not = (
        "" if any(one.columns == size for one in found) else f"fewer than {LEAST_COLUMNS} columns for each of {size:,}"
    )
    if any(isinstance(memory, Experts) for memory in memories):
        found, why_not = found[:1], "tables of Experts stay whole"
    weights = nominal_bytes(table.weight for table in reads)
    # Of the share of a process: replicas, the first of the layouts, hold whole tables.
    others = footprint(share, vocab_size=vocab_size, precision=precision, device=device.type).total - found[0].held
    room = available_memory(device) // (mesh[-1] if device.type == "cpu" else 1)
    best = choice(found, room - others)
    dense = sum(traffic(**table, ranks=size).dense for table in tables)
    return [
        (f"on {size:,} processes", _cells("tables, moments", "received a step", "needed about")),
        *((f"  {one}", _cells(*map(_size, (one.held, one.received, others + one.needed)))) for one in found),
        # A weight, its gradient and its two moments.
        ("  dense gradients", _cells(_size(4 * weights), _size(dense))),
        ("choose", _reason(found, best, others, room) + (f"; {why_not}" if why_not else "")),
    ]


def _size(size: float) -> str:
    return size_text(round(size))


def _cells(*texts: str) -> str:
    return "".join(f"{text:<17}" for text in texts).rstrip()


def _of_all(by_table: Sequence[Sequence[Layout]]) -> list[Layout]:
    """The layouts that each table has, with the bytes of all of them."""
    found = []
    for first in by_table[0]:
        alike = [one for layouts in by_table for one in layouts if one[:2] == first[:2]]
        if len(alike) == len(by_table):
            sums = (sum(bytes) for bytes in zip(*(one[2:] for one in alike), strict=True))
            found.append(Layout(first.replicas, first.columns, *sums))
    return found


def _reason(found: Sequence[Layout], best: Layout, others: float, room: int) -> str:
    """Which layout to choose, and why, in bytes."""
    apart = [one for one in found if one is not best]
    said = f"{best}: {_size(best.received)} received a step for tables"
    said += "".join(f", {_size(one.received)} with {one}" for one in apart)
    said += f"; {_size(best.held)} of tables and moments held" + "".join(
        f", {_size(one.held)} with {one}" for one in apart
    )
    if unfit := [str(one) for one in found if others + one.needed > room]:
        said += f"; {_size(room)} are available for a process here, too little for {' and for '.join(unfit)}"
    if best.columns > 1:
        said += "; columns are for a loop of your own (memlayers.distributed.shard_tables)"
    return said
