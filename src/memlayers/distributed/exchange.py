"""exchange: the row gradients of all ranks, gathered before a step, so that each rank makes the same one.

Factors cross the wire as they were recorded: 8 bytes an entry and 4 V a token, some 5 KB a token where the summed rows
would take 700. Replicas of a table so stay the same to the bit without ever sending a row. Where the factors of a step
are more bytes than an all-reduce of the table's dense gradient, each rank sums its own, and the sums are reduced.

The gradient is the mean over ranks, as that of `DistributedDataParallel`. Its parts stand in the order of micro-batches
and then of ranks where all ranks that recorded anything ran as many backward passes, else in that of ranks; the first
is the order of one process that runs these micro-batches one after the other.

Letters: T tokens, K rows a token, S slots, V width, N parts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlayers.distributed.agreement import Ranks
from memlayers.ops.precision import wide_dtype
from memlayers.ops.row_gradient_tensor import dense_part
from memlayers.ops.row_sum import Part, dense_sum

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # sent as their place here


class Held(NamedTuple):
    """What one rank has recorded for a table [S, V], in how many backward passes."""

    parts: list[Part]
    passes: int


def exchange(
    ranks: Ranks, held: Sequence[Held], tables: Sequence[Tensor], sent: Tensor, lengths: Sequence[int]
) -> list[list[Part]]:
    """For each table the mean over ranks of what they hold.

    Args:
        ranks: who takes part; each calls this at the same step.
        held: by table, what this rank holds.
        tables: their weights [S, V].
        sent: `packed` of what this rank holds.
        lengths: of what each rank sends.

    Returns:
        The parts of each table, the same on all ranks; none where no rank recorded any.
    """
    if max(lengths) == min(lengths) == 16 * len(tables):  # nobody has a part
        return [[] for _ in tables]
    if (ranks.size - 1) * max(lengths) > sum(map(dense_bytes, tables)) * 2 * (ranks.size - 1) / ranks.size:
        return [_reduced(ranks, one.parts, table) for one, table in zip(held, tables, strict=True)]
    received = [unpacked(data, tables) for data in ranks.gather_uneven(sent, lengths)]
    return [[scaled(part, ranks.size) for part in in_order(by_rank)] for by_rank in zip(*received, strict=True)]


def packed(held: Sequence[Held], tables: Sequence[Tensor]) -> Tensor:
    """The bytes of what a rank holds, by table: numbers of parts and passes, then the sizes and factors of each."""
    device = tables[0].device
    numbers = [number for one in held for number in (len(one.parts), one.passes)]
    pieces: list[Tensor] = []
    for one, table in zip(held, tables, strict=True):
        for part in one.parts:
            numbers += [*part.slots_TK.shape, part.grad_TV.shape[1], *map(_code, part[1:])]
            pieces += [
                as_bytes(part.slots_TK.to(index_dtype(table))),
                as_bytes(part.weights_TK),
                as_bytes(part.grad_TV),
            ]
    return torch.cat([piece.to(device) for piece in (as_bytes(torch.tensor(numbers, dtype=torch.int64)), *pieces)])


def unpacked(data: Tensor, tables: Sequence[Tensor]) -> list[Held]:
    """The opposite of `packed`."""
    numbers, data = cut(data, len(tables) * 2, torch.int64)
    counts = numbers.view(-1, 2).tolist()
    numbers, data = cut(data, sum(count for count, _ in counts) * 5, torch.int64)
    sizes = iter(numbers.view(-1, 5).tolist())
    held: list[Held] = []
    for table, (count, passes) in zip(tables, counts, strict=True):
        parts: list[Part] = []
        for _ in range(count):
            tokens, topk, width, weight_code, grad_code = next(sizes)
            slots, data = cut(data, tokens * topk, index_dtype(table))
            weights, data = cut(data, tokens * topk, _DTYPES[weight_code])
            grads, data = cut(data, tokens * width, _DTYPES[grad_code])
            factors = slots.long().view(tokens, topk), weights.view(tokens, topk), grads.view(tokens, width)
            parts.append(Part(*(factor.to(table.device) for factor in factors)))
        held.append(Held(parts, passes))
    return held


def dense_bytes(table_SV: Tensor) -> int:
    """Of its dense gradient, and of which rows were read."""
    return table_SV.numel() * wide_dtype(table_SV.dtype).itemsize + 4 * len(table_SV)


def in_order(by_rank: Sequence[Held]) -> Iterator[Part]:
    """The parts of all ranks, by micro-batch and then by rank where all have as many."""
    some = [held for held in by_rank if held.parts]
    passes = some[0].passes if some else 0
    if not all(held.passes == passes and passes and len(held.parts) % passes == 0 for held in some):
        passes = 1
    for number in range(passes):
        for held in some:
            count = len(held.parts) // passes
            yield from held.parts[number * count : (number + 1) * count]


def scaled(part: Part, size: int) -> Part:
    """Its share in the mean over as many ranks."""
    return part._replace(weights_TK=part.weights_TK.to(wide_dtype(part.weights_TK.dtype)) * (1 / size))


def _reduced(ranks: Ranks, parts: list[Part], table_SV: Tensor) -> list[Part]:
    """The same as one part of all rows."""
    dtype = wide_dtype(table_SV.dtype)
    grad_SV = torch.zeros(table_SV.shape, dtype=dtype, device=table_SV.device)
    live_S = torch.zeros(len(table_SV), dtype=torch.int32, device=table_SV.device)
    if parts:
        _, mine_S, sums_SV = dense_sum(parts, len(table_SV))
        assert mine_S is not None
        grad_SV, live_S = sums_SV.to(dtype), mine_S.to(torch.int32)
    ranks.reduce_(grad_SV)
    ranks.reduce_(live_S, maximum=True)
    return [scaled(dense_part(grad_SV, live_S != 0), ranks.size)] if bool(live_S.any()) else []


def index_dtype(table_SV: Tensor) -> torch.dtype:
    """That of slots on the wire."""
    return torch.int64 if len(table_SV) > 2**31 else torch.int32


def _code(factor: Tensor) -> int:
    return _DTYPES.index(factor.dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """Its bytes, filled up to a multiple of 8, so that each tensor begins where any dtype may."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % 8))


def cut(data: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first elements of such bytes, and what is behind them."""
    size = count * dtype.itemsize
    return data[:size].view(dtype), data[size + -size % 8 :]
