"""wire: the bytes that a rank holds of a table and receives in a step, by how ranks hold it. Calculated.

`traffic` compares the ways to send a gradient; `layouts` are those of a mesh, and `choice` is one of them.

Letters: S slots, V value width, M rows a token reads, T tokens of a rank, R ranks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from memlayers.checks import require_int

LEAST_COLUMNS = 32  # of a rank: shorter rows are slow to read


class Traffic(NamedTuple):
    """Bytes that each rank receives in a step."""

    dense: float  # a ring's all-reduce of the gradient of all rows, as DDP makes of a plain parameter's
    sparse: float  # torch's sparse gradients, gathered: the sums of the rows that were read
    rows: float  # what row optimizers exchange: the factors, or the sums of all rows where those are less
    columns: float  # of a table in columns: slots and weights, what was read of them, and the gradients of both


class Layout(NamedTuple):
    """How ranks hold tables, and the bytes of each."""

    replicas: int  # ranks that hold the same columns
    columns: int  # ranks that hold different ones; 1: each holds whole tables
    held: float  # of its part of the tables, and of RowAdam's state of it
    passes: float  # received in forward and backward passes, from the ranks of the other columns
    step: float  # received at the optimizer's step, from the replicas

    @property
    def received(self) -> float:
        """In a step and its passes."""
        return self.passes + self.step

    @property
    def needed(self) -> float:
        """At the step, where what was received is still there."""
        return self.held + self.received

    def __str__(self) -> str:
        if self.columns == 1:
            return "replicas"
        return "columns" if self.replicas == 1 else f"{self.replicas} replicas x {self.columns} columns"


def traffic(*, slots: int, width: int, rows: int, tokens: int, ranks: int, itemsize: int = 4) -> Traffic:
    """Of a table [slots, width] in a step.

    Args:
        slots: S.
        width: V.
        rows: M, heads times rows a head reads.
        tokens: T, of one rank in one step, over all of its micro-batches; for a table that several memories share, of
            all of them.
        ranks: R.
        itemsize: bytes of an element of gradients.

    Raises:
        ValueError: a number below 1.
    """
    _require(slots=slots, width=width, rows=rows, tokens=tokens, ranks=ranks, itemsize=itemsize)
    read = slots * -math.expm1(-tokens * rows / slots)  # distinct rows, were they drawn at random
    table = {"slots": slots, "width": width, "rows": rows, "tokens": tokens, "itemsize": itemsize}
    return Traffic(
        _all_reduced(slots * width * itemsize, ranks),
        (ranks - 1) * read * (width * itemsize + 8),
        _received(replicas=ranks, columns=1, **table)[1],
        _received(replicas=1, columns=ranks, **table)[0],
    )


def layouts(
    *,
    slots: int,
    width: int,
    rows: int,
    tokens: int,
    mesh: Sequence[int],
    itemsize: int = 4,
    moments: int = 8,
) -> list[Layout]:
    """Those of a table [slots, width]: replicas, columns over all ranks, and on two dimensions replicas of columns.

    Left out is what leaves a rank fewer than 32 columns.

    Args:
        slots: as all others in `traffic`.
        width: also.
        rows: also.
        tokens: also.
        mesh: ranks, or (nodes, ranks of a node), as for `shard_tables`.
        itemsize: bytes of an element of the table and of gradients.
        moments: bytes that both moments of an element have: 8, or 4 of ``RowAdam(moments="bfloat16")``.

    Raises:
        ValueError: a number below 1, or a mesh of other than one or two dimensions.
    """
    size = require_mesh(mesh)
    _require(slots=slots, width=width, rows=rows, tokens=tokens, itemsize=itemsize, moments=moments)
    table = {"slots": slots, "width": width, "rows": rows, "tokens": tokens, "itemsize": itemsize}
    found = []
    for replicas, columns in dict.fromkeys([(size, 1), (1, size), *([(mesh[0], mesh[1])] if len(mesh) == 2 else [])]):
        if columns == 1 or width >= LEAST_COLUMNS * columns:
            held = slots * (-(-width // columns) * (itemsize + moments) + 4)
            found.append(Layout(replicas, columns, held, *_received(replicas=replicas, columns=columns, **table)))
    return found


def choice(found: Sequence[Layout], room: float) -> Layout:
    """The layout that receives least of those that need at most `room` bytes; where none does, that which needs least.

    The first one of several.
    """
    fitting = [layout for layout in found if layout.needed <= room]
    return min(fitting, key=lambda one: one.received) if fitting else min(found, key=lambda one: one.needed)


def require_mesh(mesh: Sequence[int]) -> int:
    """The number of its ranks. Raises `ValueError` where it has other than one or two dimensions."""
    if len(mesh) not in (1, 2):
        raise ValueError(f"mesh must have 1 or 2 numbers (ranks, or nodes and ranks of a node), got {len(mesh)}")
    for ranks in mesh:
        require_int("mesh", ranks, least=1)
    return math.prod(mesh)


def _received(
    *, slots: int, width: int, rows: int, tokens: int, replicas: int, columns: int, itemsize: int
) -> tuple[float, float]:
    """In passes and at the step: a rank records the tokens of all ranks that have other columns of its replica."""
    passes = (columns - 1) * tokens * (rows * (4 + 2 * itemsize) + 2 * width / columns * itemsize)
    factors = columns * tokens * (rows * (4 + itemsize) + width / columns * itemsize)
    # Sums of rows are in float32 at least, and say which rows were read.
    sums = _all_reduced(slots * (width / columns * max(4, itemsize) + 4), replicas)
    return passes, min((replicas - 1) * factors, sums)


def _all_reduced(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def _require(**numbers: int) -> None:
    for name, value in numbers.items():
        require_int(name, value, least=1)
