"""Fresh rows on a CPU: the bits of Philox 4x64-10 choose values of a table, a row's counter holds its slot.

The generator: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); numpy's `Philox` has its bits,
too, but must be set up for each row anew.
"""

import numpy as np
from llvmlite import ir
from numba import types

from memlayers.ops.cpu.compile import kernel, lowered, part
from memlayers.ops.cpu.intrinsics import f32, i64, next_task
from memlayers.ops.cpu.launch import launch, threads_for

_WIDE = ir.IntType(128)
# As int64: what is signed here is never compared nor divided.
_FACTOR0, _FACTOR1 = (np.uint64(number).astype(np.int64) for number in (0xD2E7470EE14C6C93, 0xCA5A826395121157))
_STEP0, _STEP1 = (np.uint64(number).astype(np.int64) for number in (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B))
_ROUNDS = 10


def draw(rows: np.ndarray, slots: np.ndarray, values: np.ndarray, seed: int) -> None:
    """Fills float32 rows [R, V] with values [65536], chosen by seed and the slot of each row."""
    launch(
        _draw,
        threads_for(len(rows)),
        rows=rows.ctypes.data,
        slots=slots.ctypes.data,
        values=values.ctypes.data,
        count=len(rows),
        width=rows.shape[1],
        seed=seed,
    )


@lowered(types.int64(types.int64, types.int64))
def _upper(builder, one, other):
    """The upper 64 bits of the product of two numbers without signs."""
    product = builder.mul(builder.zext(one, _WIDE), builder.zext(other, _WIDE))
    return builder.trunc(builder.lshr(product, ir.Constant(_WIDE, 64)), one.type)


@part
def _philox(block, slot, key0):
    """The four words of a block of the slot's counter."""
    word0, word1 = block, slot
    word2 = word3 = key1 = np.int64(0)
    for _ in range(_ROUNDS):
        upper0, upper1 = _upper(_FACTOR0, word0), _upper(_FACTOR1, word2)
        word0, word1, word2, word3 = upper1 ^ word1 ^ key0, _FACTOR1 * word2, upper0 ^ word3 ^ key1, _FACTOR0 * word0
        key0 += _STEP0
        key1 += _STEP1
    return word0, word1, word2, word3


@part
def _choose(out, start, end, word, values):
    """Values for the columns of one word, 16 bits each."""
    for v in range(start, min(start + 4, end)):
        out[v] = values[word & 0xFFFF]
        word >>= 16


@kernel
def _draw(counters, rows, slots, values, count, width, seed):
    slot, value = i64(slots), f32(values)
    while True:
        row = next_task(counters)
        if row >= count:
            return
        out = f32(rows + row * width * 4)
        for first in range(0, width, 16):
            word0, word1, word2, word3 = _philox(first // 16 + 1, slot[row], seed)  # numpy counts from 1
            _choose(out, first, width, word0, value)
            _choose(out, first + 4, width, word1, value)
            _choose(out, first + 8, width, word2, value)
            _choose(out, first + 12, width, word3, value)
