"""read and dot on a CPU: weighted sums of table rows, and products of rows with outputs, straight from the table.

Random rows come as fast as memory gives them, when sixteen are read side by side, a cache line of each in turn: that
many streams the processor's own prefetcher follows. Rows of 16 bits end before it has run ahead, so the next sixteen
are asked for meanwhile; they are widened in registers. Nothing is gathered.

Letters: T tokens, K rows a token, S slots, V width.
"""

import numpy as np
import torch
from torch import Tensor

from memlayers.ops.cpu.compile import kernel, part
from memlayers.ops.cpu.intrinsics import (
    LANES,
    add_products,
    add_products_bfloat16,
    add_products_float16,
    add_scaled,
    bits_float,
    f32,
    fail,
    fill,
    i64,
    lane_sum,
    load,
    load_bfloat16,
    load_float16,
    multiply,
    next_task,
    prefetch,
    store,
    u16,
)
from memlayers.ops.cpu.launch import launch, threads_for

# The tables that the kernels read, by the number that stands for their dtype in a kernel.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_TOKENS = 4  # tokens of a task
_MANY = 64  # tokens from which on a task takes whole rows
_COLUMNS = 256  # columns of a task otherwise
_ROWS = 16  # rows read side by side


def read(table_SV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The operation, for contiguous tables that are not float64."""
    if not _takes(table_SV):
        return NotImplemented
    y_TV = torch.empty(slots_TK.shape[0], table_SV.shape[1], dtype=torch.float32)
    launch_tokens(_read, table_SV, slots_TK, weights_TK.float().contiguous(), y_TV, kind=KINDS[table_SV.dtype])
    return y_TV


def dot(table_SV: Tensor, slots_TK: Tensor, outputs_TV: Tensor) -> Tensor:
    """The operation, for contiguous tables that are not float64."""
    if not _takes(table_SV):
        return NotImplemented
    d_TK = torch.empty(slots_TK.shape, dtype=torch.float32)
    launch_tokens(_dot, table_SV, slots_TK, d_TK, outputs_TV.float().contiguous(), kind=KINDS[table_SV.dtype])
    return d_TK


def _takes(table_SV: Tensor) -> bool:
    return table_SV.dtype in KINDS and table_SV.is_contiguous() and table_SV.numel() > 0


def launch_tokens(
    function, table_SV: Tensor, slots_TK: Tensor, weights_TK: Tensor, outputs_TV: Tensor, **more: Tensor | int
) -> None:
    """Runs a kernel whose tasks are tokens, or some columns of one. Raises `IndexError` for what is no slot."""
    slots_TK = slots_TK.long().contiguous()
    num_tokens, topk = slots_TK.shape
    num_slots, width = len(table_SV), outputs_TV.shape[1]
    # A few tokens are shared out by columns, and many by tokens.
    tokens, columns = (_TOKENS, width) if num_tokens >= _MANY else (1, _COLUMNS)
    error = launch(
        function,
        threads_for((num_tokens + tokens - 1) // tokens * ((width + columns - 1) // columns)),
        table=table_SV,
        slots=slots_TK,
        weights=weights_TK,
        outputs=outputs_TV,
        num_tokens=num_tokens,
        topk=topk,
        num_slots=num_slots,
        width=width,
        tokens=tokens,
        columns=columns,
        **more,
    )
    if error:
        raise IndexError(f"slots must be in [0, {num_slots}), got {int(slots_TK.min())} to {int(slots_TK.max())}")


@part
def bfloat16(bits):
    """The float32 of a bfloat16's bits."""
    return bits_float(np.int32(np.uint32(bits) << np.uint32(16)))


@part
def float16(bits):
    """The float32 of a float16's bits (see `intrinsics.load_float16`)."""
    wide = np.uint32(bits)
    magnitude = (wide & np.uint32(0x7FFF)) << np.uint32(13)
    value = bits_float(np.int32(magnitude)) * np.float32(2.0**112)
    if magnitude >= np.uint32(0x7C00 << 13):
        value = bits_float(np.int32(magnitude | np.uint32(0x7F800000)))
    return -value if wide >= np.uint32(0x8000) else value


@part
def number(row, v, kind):
    """Element v of a row."""
    if kind == FLOAT32:
        return f32(row)[v]
    return bfloat16(u16(row)[v]) if kind == BFLOAT16 else float16(u16(row)[v])


@part
def are_slots(slot, start, end, num_slots):
    """Whether entries start to end are rows of the table."""
    bad = 0
    for k in range(start, end):
        bad += (slot[k] < 0) | (slot[k] >= num_slots)
    return bad == 0


@part
def add_rows(table, slot, weight, start, end, known, out, first, last, width, kind):
    """out += the weighted sum of columns first to last of the rows of entries start to end.

    known: the entry behind the last one that follows; rows of the next ones are asked for.
    """
    whole = first + (last - first) // LANES * LANES
    size = 4 if kind == FLOAT32 else 2
    at = _add_pairs(table, slot, weight, start, end, known, out, first, whole, width, kind)
    for v in range(at, whole, LANES):
        total = load(out + v * 4)
        if kind == FLOAT32:
            for k in range(start, end):
                total = add_scaled(total, weight[k], load(table + (slot[k] * width + v) * 4))
        else:
            for k in range(start, end):
                total = add_scaled(total, weight[k], _load_16_bits(table + (slot[k] * width + v) * 2, kind))
        store(out + v * 4, total)
    for v in range(whole, last):
        tail = f32(out)[v]
        for k in range(start, end):
            tail += weight[k] * number(table + slot[k] * width * size, v, kind)
        f32(out)[v] = tail


@part
def _add_pairs(table, slot, weight, start, end, known, out, first, whole, width, kind):
    """The same for pairs of vectors, a cache line of 16-bit numbers or two of others; returns where none are left."""
    pairs = first + (whole - first) // (2 * LANES) * 2 * LANES
    for v in range(first, pairs, 2 * LANES):
        total1, total2 = load(out + v * 4), load(out + (v + LANES) * 4)
        if kind == FLOAT32:
            for k in range(start, end):
                at = table + (slot[k] * width + v) * 4
                total1 = add_scaled(total1, weight[k], load(at))
                total2 = add_scaled(total2, weight[k], load(at + LANES * 4))
        elif kind == BFLOAT16:
            for k in range(start, end):
                _ask_for_next(table, slot, k, known, v, width)
                at = table + (slot[k] * width + v) * 2
                total1 = add_scaled(total1, weight[k], load_bfloat16(at))
                total2 = add_scaled(total2, weight[k], load_bfloat16(at + LANES * 2))
        else:
            for k in range(start, end):
                _ask_for_next(table, slot, k, known, v, width)
                at = table + (slot[k] * width + v) * 2
                total1 = add_scaled(total1, weight[k], load_float16(at))
                total2 = add_scaled(total2, weight[k], load_float16(at + LANES * 2))
        store(out + v * 4, total1)
        store(out + (v + LANES) * 4, total2)
    return pairs


@part
def _ask_for_next(table, slot, k, known, v, width):
    """Ask for 16-bit column v of the row that comes a group of rows later."""
    prefetch(table + (slot[min(k + _ROWS, known - 1)] * width + v) * 2)


@part
def _load_16_bits(address, kind):
    return load_bfloat16(address) if kind == BFLOAT16 else load_float16(address)


@part
def _products(table, slots, products, start, end, known, output, width, kind):
    """products[k] = <row of entry k, output> for entries start to end.

    known: the entry behind the last one that follows; rows of the next ones are asked for.
    """
    slot, product = i64(slots), f32(products)
    whole = width // LANES * LANES
    size = 4 if kind == FLOAT32 else 2
    if end - start == LANES:
        _add_products_of_16(
            table, slot, slots + start * 8, start, known, output, products + start * 4, whole, width, kind
        )
    else:
        for k in range(start, end):
            product[k] = np.float32(0)
        for v in range(0, whole, LANES):
            values = load(output + v * 4)
            for k in range(start, end):
                at = table + (slot[k] * width + v) * size
                row = load(at) if kind == FLOAT32 else _load_16_bits(at, kind)
                product[k] += lane_sum(multiply(values, row))
    for v in range(whole, width):
        for k in range(start, end):
            product[k] += number(table + slot[k] * width * size, v, kind) * f32(output)[v]


@part
def _add_products_of_16(table, slot, slots, start, known, output, products, whole, width, kind):
    """Those of 16 rows, whole vectors of them."""
    total = fill(np.float32(0))
    for v in range(0, whole, LANES):
        values, at = load(output + v * 4), table + v * 2
        if kind == FLOAT32:
            total = add_products(total, values, table + v * 4, slots, width * 4)
            continue
        if v % (2 * LANES) == 0:
            for k in range(start, start + LANES):
                _ask_for_next(table, slot, k, known, v, width)
        if kind == BFLOAT16:
            total = add_products_bfloat16(total, values, at, slots, width * 2)
        else:
            total = add_products_float16(total, values, at, slots, width * 2)
    store(products, total)


@kernel
def _read(counters, table, slots, weights, outputs, num_tokens, topk, num_slots, width, kind, tokens, columns):
    slot, weight = i64(slots), f32(weights)
    blocks = (width + columns - 1) // columns
    while True:
        task = next_task(counters)
        first, column = task // blocks * tokens, task % blocks * columns
        if first >= num_tokens:
            return
        last = min(width, column + columns)
        stop = min(num_tokens, first + tokens)
        for token in range(first, stop):
            start, end = token * topk, (token + 1) * topk
            if not are_slots(slot, start, end, num_slots):
                fail(counters)
                return
            out = outputs + token * width * 4
            for v in range(column, last):
                f32(out)[v] = np.float32(0)
            for k in range(start, end, _ROWS):
                add_rows(table, slot, weight, k, min(k + _ROWS, end), stop * topk, out, column, last, width, kind)


@kernel
def _dot(counters, table, slots, weights, outputs, num_tokens, topk, num_slots, width, kind, tokens, columns):
    slot = i64(slots)
    while True:
        first = next_task(counters) * tokens
        if first >= num_tokens:
            return
        stop = min(num_tokens, first + tokens)
        for token in range(first, stop):
            start, end = token * topk, (token + 1) * topk
            if not are_slots(slot, start, end, num_slots):
                fail(counters)
                return
            output = outputs + token * width * 4
            for k in range(start, end, _ROWS):
                _products(table, slots, weights, k, min(k + _ROWS, end), stop * topk, output, width, kind)
