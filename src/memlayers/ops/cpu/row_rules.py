"""The rules of a row step on a CPU, on 32 elements at a time; what is stored in 16 bits is computed in float32.

Where all is bfloat16, Adam's square root and quotient take longer than the memory. On processors with AVX-512 they are
approximate there, to 2**-12 of the step; states are exact, and so is all else.
"""

import numpy as np

from memlayers.ops.cpu.compile import part
from memlayers.ops.cpu.intrinsics import (
    LANES,
    about_reciprocal,
    about_reciprocal_root,
    add,
    add_scaled,
    add_scaled_last,
    are_finite,
    divide,
    fill,
    load,
    load_bfloat16,
    load_even,
    load_float16,
    load_odd,
    maximum,
    multiply,
    prefetch,
    scaled,
    square_root,
    store,
    store_alternate,
    store_bfloat16,
    store_float16,
    subtract,
    widen_even,
    widen_odd,
)
from memlayers.ops.cpu.processor import approximates
from memlayers.ops.cpu.read import BFLOAT16, FLOAT32
from memlayers.ops.rounding import FACTORS

# The rules, by the number that stands for them in a kernel: their places in `memlayers.ops.row_step.RULES`.
ADAM, ADAGRAD, ROW_ADAGRAD, SGD = 0, 1, 2, 3
STRIDE = 2 * LANES  # elements of a row that a rule is applied to at a time

_APPROXIMATES = approximates()
_TINY = np.float32(2.0**-126)  # in place of 0 under a root; less has no reciprocal where subnormal numbers are flushed


@part
def update(
    rule, kind, state_kind, row, first, second, next_row, next_first, next_second, source, factor, count, is_stochastic,
    noise, noise1, noise2, numbers,
):  # fmt: skip
    """The rule on `count` elements, whose summed gradient is factor * source; meanwhile the next row is asked for.

    A call with constants for rule and kinds becomes a loop without branches.
    """
    size, state_size = 4 if kind == FLOAT32 else 2, 4 if state_kind == FLOAT32 else 2
    for v in range(0, count, STRIDE):
        _ask_for(next_row + v * size, size)
        if rule <= ADAGRAD:
            _ask_for(next_first + v * state_size, state_size)
        if rule == ADAM:
            _ask_for(next_second + v * state_size, state_size)
        at, at1, at2, grads = row + v * size, first + v * state_size, second + v * state_size, source + v * 4
        noise_v = noise1_v = noise2_v = np.int64(-1)
        if is_stochastic:
            noise_v, noise1_v, noise2_v = noise + v, noise1 + v, noise2 + v
        is_done = False
        if _APPROXIMATES and rule == ADAM and kind == BFLOAT16 and state_kind == BFLOAT16:
            is_done = _apply_about(at, at1, at2, grads, factor, noise_v, noise1_v, noise2_v, numbers)
        if not is_done:
            change, change_b = scaled(load(grads), factor), scaled(load(grads + LANES * 4), factor)
            _apply(rule, at, at1, at2, change, change_b, kind, state_kind, noise_v, noise1_v, noise2_v, numbers)


@part
def _apply(rule, row, first, second, change, change_b, kind, state_kind, noise, noise1, noise2, numbers):
    """The rule on 32 elements of a row, of its states and of its summed gradient: row -= length * change.

    All is loaded before anything is stored: to the processor a load from the same place in another page depends on the
    store before it, and rows and states often lie so.
    """
    keep1, beta2, keep2, length, root, eps = numbers
    beside, beside1 = LANES * (4 if kind == FLOAT32 else 2), LANES * (4 if state_kind == FLOAT32 else 2)
    w, w_b = _widened(row, kind), _widened(row + beside, kind)
    m = m_b = v = v_b = fill(np.float32(0))
    if rule == ADAM:
        m, m_b = _widened(first, state_kind), _widened(first + beside1, state_kind)
        v, v_b = _widened(second, state_kind), _widened(second + beside1, state_kind)
        m, v, change = _adam(change, m, v, keep1, beta2, keep2, root, eps)
        m_b, v_b, change_b = _adam(change_b, m_b, v_b, keep1, beta2, keep2, root, eps)
    elif rule == ADAGRAD:
        m, m_b = _widened(first, state_kind), _widened(first + beside1, state_kind)
        m, change = _adagrad(change, m, eps)
        m_b, change_b = _adagrad(change_b, m_b, eps)
    w, w_b = add_scaled_last(w, -length, change), add_scaled_last(w_b, -length, change_b)
    is_finite = are_finite(add(add(add(w, w_b), add(m, m_b)), add(v, v_b)))  # or their sum is not
    _store_rounded(row, w, w_b, kind, noise, FACTORS[0], is_finite)
    if rule <= ADAGRAD:
        _store_rounded(first, m, m_b, state_kind, noise1, FACTORS[1], is_finite)
    if rule == ADAM:
        _store_rounded(second, v, v_b, state_kind, noise2, FACTORS[2], is_finite)


@part
def _about_adam(m, v, eps):
    """m / (sqrt(v) + eps), approximately; v must be finite."""
    root = multiply(v, about_reciprocal_root(maximum(v, fill(_TINY))))
    return multiply(m, about_reciprocal(add(root, fill(eps))))


@part
def _apply_about(row, first, second, source, factor, noise, noise1, noise2, numbers):
    """`_apply` for Adam in bfloat16, with an approximate step; False, and nothing is done, where moments overflow."""
    keep1, beta2, keep2, length, root, eps = numbers
    g, g_b = scaled(load_even(source), factor), scaled(load_odd(source), factor)
    m, v = _moments(g, widen_even(first), widen_even(second), keep1, beta2, keep2)
    m_b, v_b = _moments(g_b, widen_odd(first), widen_odd(second), keep1, beta2, keep2)
    if not are_finite(add(add(m, m_b), add(v, v_b))):
        return False
    w = add_scaled(widen_even(row), -length / root, _about_adam(m, v, eps / root))
    w_b = add_scaled(widen_odd(row), -length / root, _about_adam(m_b, v_b, eps / root))
    store_alternate(row, w, w_b, noise, FACTORS[0])
    store_alternate(first, m, m_b, noise1, FACTORS[1])
    store_alternate(second, v, v_b, noise2, FACTORS[2])
    return True


@part
def _moments(g, m, v, keep1, beta2, keep2):
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2; returns them."""
    m = add_scaled(m, keep1, subtract(g, m))
    return m, add_scaled(multiply(v, fill(beta2)), keep2, multiply(g, g))


@part
def _adam(g, m, v, keep1, beta2, keep2, root, eps):
    """The moments, and m / (sqrt(v) * root + eps)."""
    m, v = _moments(g, m, v, keep1, beta2, keep2)
    return m, v, divide(m, add_scaled(fill(eps), root, square_root(v)))


@part
def _adagrad(g, s, eps):
    """s += g^2; returns it and g / (sqrt(s) + eps)."""
    s = add(s, multiply(g, g))
    return s, divide(g, add(square_root(s), fill(eps)))


@part
def _widened(address, kind):
    """16 elements of a row or of a state."""
    if kind == FLOAT32:
        return load(address)
    return load_bfloat16(address) if kind == BFLOAT16 else load_float16(address)


@part
def _store_rounded(address, one, other, kind, noise, factor, are_all_finite):
    """Store 32 elements."""
    if kind == FLOAT32:
        store(address, one)
        store(address + LANES * 4, other)
    elif kind == BFLOAT16:
        store_bfloat16(address, one, other, noise, factor, are_all_finite)
    else:
        store_float16(address, one)
        store_float16(address + LANES * 2, other)


@part
def _ask_for(address, size):
    for line in range(0, STRIDE * size, 64):
        prefetch(address + line)
