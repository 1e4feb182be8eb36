"""Products of a matrix with few vectors, as in decoding, where the time is that of reading the matrix.

Libraries of dense products read it with one thread, at half the speed of the memory.
"""

import numpy as np

from memlayers.ops.cpu.compile import part, shared
from memlayers.ops.cpu.intrinsics import (
    LANES,
    add,
    bits_float,
    f32,
    fill,
    float_bits,
    lane_sum,
    load,
    load_bfloat16,
    load_rounded,
    multiply,
    u16,
)
from memlayers.ops.cpu.read import BFLOAT16, FLOAT32, bfloat16

ROWS = 16  # rows of a task
ROUNDED = 3  # beside the kinds of tables


@part
def _load(address, kind):
    return load_bfloat16(address) if kind == BFLOAT16 else load_rounded(address)


@part
def _number(row, v, kind):
    if kind == BFLOAT16:
        return bfloat16(u16(row)[v])
    return f32(row)[v] if kind == FLOAT32 else nearest_bfloat16(f32(row)[v])


@part
def nearest_bfloat16(value):
    """The value, rounded to bfloat16."""
    bits = float_bits(value)
    rounded = bits_float(np.int32((bits + 0x7FFF + ((bits >> np.int32(16)) & 1)) & 0xFFFF0000))
    return rounded if value == value else value


@part
def _four_products(row, row_bytes, vector, columns, out, kind):
    """out[i] = <row i, vector> for four rows."""
    whole = columns // LANES * LANES
    row1, row2, row3 = row + row_bytes, row + 2 * row_bytes, row + 3 * row_bytes
    sum0 = sum1 = sum2 = sum3 = fill(np.float32(0))
    if kind == FLOAT32:
        for v in range(0, whole * 4, LANES * 4):
            values = load(vector + v)
            sum0 = add(sum0, multiply(values, load(row + v)))
            sum1 = add(sum1, multiply(values, load(row1 + v)))
            sum2 = add(sum2, multiply(values, load(row2 + v)))
            sum3 = add(sum3, multiply(values, load(row3 + v)))
    else:
        size = 2 if kind == BFLOAT16 else 4
        for v in range(0, whole, LANES):
            values, at = load(vector + v * 4), v * size
            sum0 = add(sum0, multiply(values, _load(row + at, kind)))
            sum1 = add(sum1, multiply(values, _load(row1 + at, kind)))
            sum2 = add(sum2, multiply(values, _load(row2 + at, kind)))
            sum3 = add(sum3, multiply(values, _load(row3 + at, kind)))
    out[0], out[1], out[2], out[3] = lane_sum(sum0), lane_sum(sum1), lane_sum(sum2), lane_sum(sum3)
    for v in range(whole, columns):
        for i in range(4):
            out[i] += _number(row + i * row_bytes, v, kind) * f32(vector)[v]


@part
def _one_product(row, vector, columns, kind):
    whole = columns // LANES * LANES
    lanes = fill(np.float32(0))
    if kind == FLOAT32:
        for v in range(0, whole * 4, LANES * 4):
            lanes = add(lanes, multiply(load(vector + v), load(row + v)))
    else:
        for v in range(0, whole, LANES):
            at = row + v * (2 if kind == BFLOAT16 else 4)
            lanes = add(lanes, multiply(load(vector + v * 4), _load(at, kind)))
    total = lane_sum(lanes)
    for v in range(whole, columns):
        total += _number(row, v, kind) * f32(vector)[v]
    return total


@shared
def products(matrix, vectors, bias, outs, first, last, rows, columns, count, stride, kind):
    """outs[t, r] = <row r of [rows, columns], vector t> + bias[r] for rows first to last and `count` vectors.

    stride: floats from one vector to the next; bias: an address, or 0 for none; kind: of the matrix, FLOAT32, BFLOAT16
    or ROUNDED, which is float32 that is multiplied as bfloat16; all else is float32.
    """
    row_bytes = columns * (2 if kind == BFLOAT16 else 4)
    row = first
    while row < last:
        together = 4 if row + 4 <= last else 1
        for t in range(count):
            vector, out = vectors + t * stride * 4, f32(outs + (t * rows + row) * 4)
            if together == 4:
                _four_products(matrix + row * row_bytes, row_bytes, vector, columns, out, kind)
            else:
                out[0] = _one_product(matrix + row * row_bytes, vector, columns, kind)
            if bias != 0:
                for i in range(together):
                    out[i] += f32(bias)[row + i]
        row += together
