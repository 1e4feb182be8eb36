"""Fresh rows by slot: each a function of the table's seed and its slot alone.

So a row that nobody has written needs no storage, and is the same whatever the order in which rows are first read. The
bits are Philox's (numpy), a counter-based generator, at a counter that holds the slot; 16 of them choose one of 65,536
equally likely values of the normal distribution. A table keeps the bits for itself, so no version of a library, nor a
processor's logarithm, changes them.
"""

import functools
from statistics import NormalDist

import numpy as np

from memlayers.ops import cpu

_LEVELS = 2**16


@functools.cache
def _normal_values() -> np.ndarray:
    """The middles of 65,536 equally likely stretches of the normal distribution, of variance 1."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((_LEVELS // 2 + number + 0.5) / _LEVELS) for number in range(_LEVELS // 2)])
    values = np.concatenate((-upper[::-1], upper))
    return values / np.sqrt(np.square(values).mean())


def draw_rows(seed: int, slots: np.ndarray, width: int, std: float) -> np.ndarray:
    """Fresh rows [len(slots), width] of float32, normal with standard deviation `std`."""
    rows = np.empty((len(slots), width), np.float32)
    if std == 0:
        rows[:] = 0
        return rows
    values = (_normal_values() * std).astype(np.float32)
    kernels = cpu.kernels("draw")
    (draw_reference if kernels is None else kernels.draw)(rows, np.ascontiguousarray(slots, np.int64), values, seed)
    return rows


def draw_reference(rows: np.ndarray, slots: np.ndarray, values: np.ndarray, seed: int) -> None:
    """Fills float32 rows with values [65536], chosen by seed and the slot of each row."""
    width = rows.shape[1]
    bits = np.random.Philox(key=seed)
    state = bits.state
    counter = state["state"]["counter"]
    words = -(-width // 4)  # of 64 bits
    for row, slot in zip(rows, slots.tolist(), strict=True):
        counter[:] = (0, slot, 0, 0)
        bits.state = state
        drawn = bits.random_raw(words).astype("<u8", copy=False).view("<u2")
        values.take(drawn[:width], out=row)
