"""costs: what a training step moves of a table, by where the table is. Calculated.

What ranks send each other of one is in `memlayers.distributed.wire`.

Letters: S slots, V value width, M rows a token reads, T tokens, P parts of a step.
"""

from typing import NamedTuple

from memlayers.checks import require_int

_STEPS = 4  # bytes a row of the count of its steps
_SLOT, _WEIGHT = 8, 4  # bytes


class StepBytes(NamedTuple):
    """At most, of one table in one step."""

    rows: int  # different rows that are read: a number, not bytes
    at_table: int  # of them, with both moments: read, and as many written, where the table is
    on_device: int  # of a table on the host: what a part of the step keeps on the GPU until its backward pass
    to_device: int  # of such a table, from the host to the GPU
    to_host: int  # of such a table, back


def step_bytes(
    *, slots: int, width: int, rows: int, tokens: int, parts: int = 1, itemsize: int = 4, moments: int = 8
) -> StepBytes:
    """Of a table [slots, width] that `RowAdam` trains.

        rows       min(S, T M)
        at_table   rows (V (itemsize + moments) + 4)
        on_device  min(S, T M / P) V itemsize + 8 T M / P
        to_device  P min(S, T M / P) V itemsize
        to_host    12 T M + 4 T V + 8 P min(S, T M / P)

    Args:
        slots: S.
        width: V.
        rows: M, heads times rows a head reads.
        tokens: T, of a step; for a table that several memories share, of all of them.
        parts: P, the passes of a step: micro-batches, times the memories that share the table.
        itemsize: bytes of an element of the table.
        moments: bytes that both moments of an element have: 8, or 4 of ``RowAdam(moments="bfloat16")``.

    Raises:
        ValueError: a number below 1.
    """
    given = {"slots": slots, "width": width, "rows": rows, "tokens": tokens, "parts": parts}
    for name, value in {**given, "itemsize": itemsize, "moments": moments}.items():
        require_int(name, value, least=1)
    reads = tokens * rows
    different, of_part = min(slots, reads), min(slots, reads // parts)
    return StepBytes(
        rows=different,
        at_table=different * (width * (itemsize + moments) + _STEPS),
        on_device=of_part * width * itemsize + reads // parts * _SLOT,
        to_device=parts * of_part * width * itemsize,
        to_host=reads * (_SLOT + _WEIGHT) + tokens * width * 4 + parts * of_part * _SLOT,
    )
