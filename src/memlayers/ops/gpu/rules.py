"""The rules of the row step on a row that a program holds (`memlayers.ops.row_step` has them in PyTorch)."""

import math

import triton
import triton.language as tl

from memlayers.ops.rounding import FACTORS

# The rules, by their places in `memlayers.ops.row_step.RULES`; the last one only measures.
ADAM, ADAGRAD, ROW_ADAGRAD, SGD, SQUARES = (tl.constexpr(number) for number in range(5))
# Of the random bits of each stream.
STEP0, STEP1, STEP2 = (tl.constexpr(step) for step in FACTORS)


def log_of(beta: float) -> float:
    """The logarithm of a decay rate in [0, 1)."""
    return math.log(beta) if beta > 0 else -math.inf


def signed32(seed: int) -> int:
    """The same lower 32 bits, which are all that count, as an int that is always passed as an int32."""
    return (seed + 2**31) % 2**32 - 2**31


@triton.jit
def apply_rule(
    grad, target, first, second, row, first_row, second_row, times, key, column, inside,
    width, seed, first_column, lr, keep1, beta2, keep2, log1, log2, eps,
    RULE: tl.constexpr, IS_STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Store what the rule makes of a row and of its states.

    grad: its summed, scaled gradient. times: how often the row was read, this time included.
    """
    at = key.to(tl.int64) * width + column
    if RULE == ADAM:
        first_row += keep1 * (grad - first_row)
        second_row = beta2 * second_row + keep2 * grad * grad
        root = 1.0 / tl.sqrt(_correction(log2, times))
        row -= (lr / _correction(log1, times)) * (first_row / (tl.sqrt(second_row) * root + eps))
    elif RULE == ADAGRAD:
        first_row += grad * grad
        row -= lr * grad / (tl.sqrt(first_row) + eps)
    elif RULE == ROW_ADAGRAD:
        first_row += tl.sum(grad * grad) / width
        row -= grad * (lr / (tl.sqrt(first_row) + eps))
    else:
        row -= lr * grad
    random = key.to(tl.uint32)
    number = column + first_column
    if IS_STOCHASTIC:
        random = hash32(random + hash32(seed.to(tl.uint32)))
    _store_rounded(target + at, row, inside, random, number, STEP0, IS_STOCHASTIC)
    if RULE == ROW_ADAGRAD:
        tl.store(first + key, first_row)
    elif RULE != SGD:
        _store_rounded(first + at, first_row, inside, _stream(random, 1), number, STEP1, IS_STOCHASTIC)
        if RULE == ADAM:
            _store_rounded(second + at, second_row, inside, _stream(random, 2), number, STEP2, IS_STOCHASTIC)


@triton.jit
def _correction(log, times):
    """1 - beta^t of log(beta); by its series where the plain difference would lose digits."""
    x = times.to(tl.float32) * log
    small = tl.maximum(x, -0.5)
    series = 1.0 + small * (1.0 / 8)
    series = 1.0 + small * (1.0 / 7) * series
    series = 1.0 + small * (1.0 / 6) * series
    series = 1.0 + small * (1.0 / 5) * series
    series = 1.0 + small * (1.0 / 4) * series
    series = 1.0 + small * (1.0 / 3) * series
    series = 1.0 + small * (1.0 / 2) * series
    return tl.where(x > -0.5, -small * series, 1.0 - tl.exp(x))


@triton.jit
def _store_rounded(place, values, mask, random, number, STEP: tl.constexpr, IS_STOCHASTIC: tl.constexpr):
    """Store to the nearest, or, where it is bfloat16 and asked for, stochastically (`memlayers.ops.rounding`)."""
    if IS_STOCHASTIC and place.dtype.element_ty == tl.bfloat16:
        noise = ((random + number.to(tl.uint32)) * STEP) >> 16
        bits = values.to(tl.uint32, bitcast=True)
        is_special = (bits & 0x7F800000) == 0x7F800000  # nothing may be carried into or out of them
        quiet = tl.where((bits & 0x7FFFFF) == 0, bits, bits | 0x400000)
        bits = tl.where(is_special, quiet, bits + noise)
        tl.store(place, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(place, values.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _stream(random, NUMBER: tl.constexpr):
    """The random bits of another stream for the same row."""
    return hash32(random + NUMBER)


@triton.jit
def hash32(bits):
    """Well mixed 32 bits of a uint32 (`memlayers.ops.rounding`)."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)
