"""wire: the bytes that a rank receives in a step for one table, by how its gradient is sent. Calculated.

Letters: S slots, V value width, M rows a token reads, T tokens of a rank, R ranks.
"""

import math
from typing import NamedTuple

from memlayers.checks import require_int


class Traffic(NamedTuple):
    """Bytes that each rank receives in a step."""

    dense: float  # a ring's all-reduce of the gradient of all rows, as DDP makes of a plain parameter's
    sparse: float  # torch's sparse gradients, gathered: the sums of the rows that were read
    rows: float  # what row optimizers exchange: the factors, or the sums of all rows where those are less
    columns: float  # of a table in columns: slots and weights, what was read of them, and the gradients of both


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
    numbers = {"slots": slots, "width": width, "rows": rows, "tokens": tokens, "ranks": ranks, "itemsize": itemsize}
    for name, value in numbers.items():
        require_int(name, value, least=1)
    dense = 2 * (ranks - 1) / ranks * slots * width * itemsize
    read = slots * -math.expm1(-tokens * rows / slots)  # distinct rows, were they drawn at random
    factors = tokens * (rows * (4 + itemsize) + width * itemsize)
    in_columns = tokens * (rows * (4 + 2 * itemsize) + 2 * width / ranks * itemsize)
    return Traffic(
        dense,
        (ranks - 1) * read * (width * itemsize + 8),
        min((ranks - 1) * factors, dense),
        (ranks - 1) * in_columns,
    )
