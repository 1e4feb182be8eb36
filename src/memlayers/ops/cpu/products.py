"""Products of a matrix with few vectors, as in decoding, where the time is that of reading the matrix.

Libraries of dense products read it with one thread, at half the speed of the memory.
"""

import numpy as np

from memlayers.ops.cpu.intrinsics import LANES, add, f32, fill, lane_sum, load, multiply, part

ROWS = 16  # rows of a task


@part
def products(matrix, vectors, bias, outs, first, last, rows, columns, count, stride):
    """outs[t, r] = <row r of [rows, columns], vector t> + bias[r] for rows first to last and `count` vectors.

    stride: floats from one vector to the next; bias: an address, or 0 for none.
    """
    row = first
    while row < last:
        together = 4 if row + 4 <= last else 1
        for t in range(count):
            vector, out = vectors + t * stride * 4, f32(outs + (t * rows + row) * 4)
            if together == 4:
                _four_products(matrix + row * columns * 4, columns * 4, vector, columns, out)
            else:
                out[0] = _one_product(matrix + row * columns * 4, vector, columns)
            if bias != 0:
                for i in range(together):
                    out[i] += f32(bias)[row + i]
        row += together


@part
def _four_products(row, row_bytes, vector, columns, out):
    """out[i] = <row i, vector> for four rows."""
    whole = columns // LANES * LANES
    row1, row2, row3 = row + row_bytes, row + 2 * row_bytes, row + 3 * row_bytes
    sum0 = sum1 = sum2 = sum3 = fill(np.float32(0))
    for v in range(0, whole * 4, LANES * 4):
        values = load(vector + v)
        sum0 = add(sum0, multiply(values, load(row + v)))
        sum1 = add(sum1, multiply(values, load(row1 + v)))
        sum2 = add(sum2, multiply(values, load(row2 + v)))
        sum3 = add(sum3, multiply(values, load(row3 + v)))
    out[0], out[1], out[2], out[3] = lane_sum(sum0), lane_sum(sum1), lane_sum(sum2), lane_sum(sum3)
    for v in range(whole, columns):
        for i in range(4):
            out[i] += f32(row + i * row_bytes)[v] * f32(vector)[v]


@part
def _one_product(row, vector, columns):
    whole = columns // LANES * LANES
    lanes = fill(np.float32(0))
    for v in range(0, whole * 4, LANES * 4):
        lanes = add(lanes, multiply(load(vector + v), load(row + v)))
    total = lane_sum(lanes)
    for v in range(whole, columns):
        total += f32(row)[v] * f32(vector)[v]
    return total
