"""The row step on a CPU: from factored row gradients to updated rows, one pass over each row that was read.

Entries (slot, weight, token) are sorted by slot (radix sort, stable); each thread takes a stretch of them, and for each
row sums its gradient 32 elements at a time and applies it at once, while the next row and its states are on their way
from memory. No summed gradients are stored; a row is summed by one thread in the order of its entries, so the result is
the same each time. What is stored in 16 bits is computed in float32 and rounded once. The rules are in `row_rules`.

Letters: M entries, S slots, V width.
"""

import math

import numpy as np
import torch
from torch import Tensor

from memlayers.ops.cpu.compile import kernel, part
from memlayers.ops.cpu.intrinsics import (
    LANES,
    add,
    add_scaled,
    f32,
    f64,
    fail,
    fill,
    i32,
    i64,
    lane_sum,
    load,
    multiply,
    next_task,
    prefetch,
    scaled,
    store,
    this_thread,
    u16,
)
from memlayers.ops.cpu.launch import launch, threads_for
from memlayers.ops.cpu.read import BFLOAT16, FLOAT32, KINDS
from memlayers.ops.cpu.row_rules import ADAGRAD, ADAM, ROW_ADAGRAD, SGD, STRIDE, update
from memlayers.ops.row_step import RULES, Step, adam
from memlayers.ops.row_sum import Part, clipping_scale, parts_of

_ENTRIES = 256  # entries of a task
_DIGIT = 11  # bits of a slot that a pass of the sort looks at


class SortedEntries:
    """The entries of several parts that are reads (their weight is not 0), by slot."""

    def __init__(self, parts: list[Part], num_slots: int):
        parts = [
            Part(slots_TK.long().contiguous(), weights_TK.float().contiguous(), grad_TV.float().contiguous())
            for slots_TK, weights_TK, grad_TV in parts
        ]
        most = sum(slots_TK.numel() for slots_TK, _, _ in parts)
        if num_slots > 2**32 or most > 2**32:
            raise ValueError(f"at most 2**32 slots and entries are sorted, got {num_slots} and {most}")
        passes = max(1, math.ceil((num_slots - 1).bit_length() / _DIGIT))
        self.width = parts[0][2].shape[1]
        self._parts = parts  # their memory is pointed to
        described = [
            number
            for slots_TK, weights_TK, grad_TV in parts
            for number in (slots_TK.data_ptr(), weights_TK.data_ptr(), grad_TV.data_ptr(), *slots_TK.shape)
        ]
        described_P5 = torch.tensor(described, dtype=torch.int64)
        # Slot in the upper and number of the entry in the lower half; sorted from one array into the other.
        self._sorted_2M = torch.empty(2, max(1, most), dtype=torch.int64)
        self._weight_M = torch.empty(most, dtype=torch.float32)
        self._gradient_M = torch.empty(most, dtype=torch.int64)  # addresses
        counted = torch.zeros(1, dtype=torch.int64)
        places = torch.empty(2**_DIGIT, dtype=torch.int64)
        error = launch(
            _sort,
            1,
            described=described_P5,
            parts=len(parts),
            source=self._sorted_2M[passes % 2],
            target=self._sorted_2M[(passes + 1) % 2],
            weights=self._weight_M,
            gradients=self._gradient_M,
            counted=counted,
            num_slots=num_slots,
            passes=passes,
            width=self.width,
            places=places,
        )
        if error:
            slots = torch.cat([slots_TK[weights_TK != 0] for slots_TK, weights_TK, _ in parts])
            raise IndexError(f"slots must be in [0, {num_slots}), got {int(slots.min())} to {int(slots.max())}")
        self.count = int(counted)

    def arguments(self) -> dict[str, Tensor | int]:
        """What a kernel needs of them."""
        arrays = {"entries": self._sorted_2M, "weights": self._weight_M, "gradients": self._gradient_M}
        return {**arrays, "count": self.count, "width": self.width}


def step_(step: Step) -> None:
    """Row steps of contiguous tables that are not float64, whose states may lie side by side."""
    kinds, state_row = _kinds(step), _state_row(step)
    if kinds is None or state_row is None:
        return NotImplemented
    entries = SortedEntries(step.parts, len(step.table_SV))
    scale = 1.0
    if step.max_norm is not None:
        scale = float(clipping_scale(_norm(entries) if step.norm is None else step.norm, step.max_norm))
    numbers = {"scale": scale, "seed": step.seed, "first_column": step.first_column, **step.settings}
    _launch_step(RULES.index(step.rule), entries, kinds, state_row, step.table_SV, *step.states, **numbers)
    return None


def _state_row(step: Step) -> int | None:
    """Elements from one row of the states to the next; None where the kernel does not know how they lie."""
    if not step.table_SV.is_contiguous() or any(state.stride(-1) != 1 for state in step.states):
        return None
    width = step.table_SV.shape[1]
    distances = {state.stride(0) for state in step.states if state.ndim == 2} or {width}
    return max(distances) if len(distances) == 1 and min(distances) >= width else None


def _kinds(step: Step) -> tuple[int, int] | None:
    """The numbers of the dtypes of table and states; None where the kernel does not know them."""
    dtypes = {state.dtype for state in step.states if state.ndim == 2} or {torch.float32}
    known = torch.int32 if step.rule is adam else torch.float32
    if len(dtypes) > 1 or not {step.table_SV.dtype, *dtypes} <= KINDS.keys():
        return None
    if any(state.dtype != known for state in step.states if state.ndim == 1):
        return None
    return KINDS[step.table_SV.dtype], KINDS[dtypes.pop()]


def row_norm(parts: list[Part], num_slots: int) -> Tensor:
    """The operation, for all but float64 gradients."""
    if any(part.grad_TV.dtype == torch.float64 for part in parts):
        return NotImplemented
    return _norm(SortedEntries(parts, num_slots))


def sum_rows(slots_TK: Tensor, weights_TK: Tensor, outputs_TV: Tensor, num_slots: int) -> Tensor:
    """The operation, for all but float64 outputs."""
    if outputs_TV.dtype == torch.float64:
        return NotImplemented
    g_SV = torch.zeros(num_slots, outputs_TV.shape[1], dtype=torch.float32)
    entries = SortedEntries(parts_of([slots_TK], [weights_TK], [outputs_TV]), num_slots)
    # One step up from zero.
    _launch_step(SGD, entries, (FLOAT32, FLOAT32), 0, g_SV, scale=1.0, seed=-1, first_column=0, lr=-1.0)
    return g_SV


def _norm(entries: SortedEntries) -> Tensor:
    """Of the summed rows, a float32 scalar."""
    tasks = (entries.count + _ENTRIES - 1) // _ENTRIES
    threads = threads_for(tasks)
    buffer = torch.empty(threads, entries.width + LANES, dtype=torch.float32)
    sums = torch.zeros(tasks, dtype=torch.float64)
    launch(_square_sum, threads, **entries.arguments(), buffer=buffer, sums=sums)
    return torch.tensor(sums.numpy().sum()).sqrt().float()  # in one order, however many threads there are


def _launch_step(
    rule: int,
    entries: SortedEntries,
    kinds: tuple[int, int],
    state_row: int,
    table_SV: Tensor,
    first_SV: Tensor | None = None,
    second_SV: Tensor | None = None,
    steps_S: Tensor | None = None,
    **numbers: float,
) -> None:
    numbers = {"beta1": 0.0, "beta2": 0.0, "eps": 0.0, **numbers}  # not every rule has all of them
    tasks = (entries.count + _ENTRIES - 1) // _ENTRIES
    threads = threads_for(tasks)
    # The summed row, and the last few elements of a row and of its states, where they fill no vector. Beside them are
    # zeros, for an approximate step asks whether all that it works on is finite.
    buffer = torch.zeros(threads, entries.width + 4 * STRIDE, dtype=torch.float32)
    launch(
        _step,
        threads,
        **entries.arguments(),
        buffer=buffer,
        rule=rule,
        kind=kinds[0],
        state_kind=kinds[1],
        table=table_SV,
        firsts=first_SV,
        seconds=second_SV,
        steps=steps_S,
        state_row=state_row,
        **numbers,
    )


@part
def _slot_at(entry, j):
    return np.int64(np.uint64(entry[j]) >> np.uint64(32))


@part
def _sum_row(entry, weight, gradient, start, end, total, width):
    """total = the summed gradient of the row of entries start to end; zeros behind it, up to a whole vector."""
    whole = width // LANES * LANES
    for j in range(start, end, 2):
        one, other = entry[j] & 0xFFFFFFFF, entry[min(j + 1, end - 1)] & 0xFFFFFFFF
        weight_1, weight_2, grads_1, grads_2 = weight[one], weight[other], gradient[one], gradient[other]
        for v in range(0, whole * 4, LANES * 4):
            lanes = load(total + v) if j > start else fill(np.float32(0))
            lanes = add_scaled(lanes, weight_1, load(grads_1 + v))
            if j + 1 < end:
                lanes = add_scaled(lanes, weight_2, load(grads_2 + v))
            store(total + v, lanes)
    if whole < width:
        store(total + whole * 4, fill(np.float32(0)))
        _sum_tail(entry, weight, gradient, start, end, total, whole, width)


@part
def _sum_tail(entry, weight, gradient, start, end, total, whole, width):
    """Add the columns that fill no vector to total, which is zero there."""
    out = f32(total)
    for j in range(start, end):
        number = entry[j] & 0xFFFFFFFF
        for v in range(whole, width):
            out[v] += weight[number] * f32(gradient[number])[v]


@part
def _mean_square(total, width, scale):
    """Of scale * total."""
    lanes = fill(np.float32(0))
    for v in range(0, width, LANES):
        values = scaled(load(total + v * 4), scale)
        lanes = add(lanes, multiply(values, values))
    return lane_sum(lanes) / np.float32(width)


@part
def _copy(target, source, count, size):
    if size == 4:
        for i in range(count):
            i32(target)[i] = i32(source)[i]
    else:
        for i in range(count):
            u16(target)[i] = u16(source)[i]


@part
def _hash(value):
    """Well mixed 32 bits of an integer (`memlayers.ops.rounding`)."""
    # Numba computes with 32-bit integers in 64 bits, so each product is cut.
    bits = np.uint32(value)
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@part
def _ask_for_entries(entry, weights, gradients, start, stop):
    """Ask for the weights and the gradients' addresses of entries, which lie in the order of tokens."""
    for j in range(start, stop):
        number = entry[j] & 0xFFFFFFFF
        prefetch(weights + number * 4)
        prefetch(gradients + number * 8)


@kernel
def _sort(counters, described, parts, source, target, weights, gradients, counted, num_slots, passes, width, places):
    weight, gradient, place, row_bytes = f32(weights), i64(gradients), i64(places), width * 4
    count = 0
    entry = i64(source)
    for p in range(parts):
        part_5 = i64(described + p * 5 * 8)
        slot_of, weight_of, grads = i64(part_5[0]), f32(part_5[1]), part_5[2]
        num_tokens, topk = part_5[3], part_5[4]
        for t in range(num_tokens):
            for k in range(t * topk, (t + 1) * topk):
                if weight_of[k] != 0:
                    if slot_of[k] < 0 or slot_of[k] >= num_slots:
                        fail(counters)
                        return
                    entry[count] = (slot_of[k] << 32) | count
                    weight[count] = weight_of[k]
                    gradient[count] = grads + t * row_bytes
                    count += 1
    for digit in range(passes):
        shift = 32 + digit * _DIGIT
        entry, other = i64(source), i64(target)
        for d in range(2**_DIGIT):
            place[d] = 0
        for j in range(count):
            place[(entry[j] >> shift) & (2**_DIGIT - 1)] += 1
        before = 0
        for d in range(2**_DIGIT):
            before, place[d] = before + place[d], before
        for j in range(count):
            d = (entry[j] >> shift) & (2**_DIGIT - 1)
            other[place[d]] = entry[j]
            place[d] += 1
        source, target = target, source
    i64(counted)[0] = count


@kernel
def _square_sum(counters, entries, weights, gradients, count, width, buffer, sums):
    entry, weight, gradient = i64(entries), f32(weights), i64(gradients)
    total = buffer + this_thread(counters) * (width + LANES) * 4
    while True:
        task = next_task(counters)
        start, stop = task * _ENTRIES, min(count, (task + 1) * _ENTRIES)
        if start >= count:
            return
        _ask_for_entries(entry, weights, gradients, start, stop)
        while start < stop and start > 0 and _slot_at(entry, start) == _slot_at(entry, start - 1):
            start += 1
        square = 0.0
        while start < stop:
            slot = _slot_at(entry, start)
            end = start + 1
            while end < count and _slot_at(entry, end) == slot:
                end += 1
            _sum_row(entry, weight, gradient, start, end, total, width)
            square += np.float64(_mean_square(total, width, np.float32(1))) * width
            start = end
        f64(sums)[task] = square


@kernel
def _step(
    counters, entries, weights, gradients, count, width, buffer, rule, kind, state_kind, table, firsts, seconds, steps,
    state_row, seed, first_column, scale: float, lr: float, beta1: float, beta2: float, eps: float,
):  # fmt: skip
    entry, weight, gradient = i64(entries), f32(weights), i64(gradients)
    total = buffer + this_thread(counters) * (width + 4 * STRIDE) * 4
    keep1_32, keep2_32 = np.float32(1 - beta1), np.float32(1 - beta2)
    beta2_32, eps_32, scale_32 = np.float32(beta2), np.float32(eps), np.float32(scale)
    size, state_size = 4 if kind == FLOAT32 else 2, 4 if state_kind == FLOAT32 else 2
    row_bytes, state_bytes = width * size, state_row * state_size
    whole = width // STRIDE * STRIDE
    tail = width - whole
    edge = total + (width + STRIDE) * 4
    length, root = np.float32(lr), np.float32(1)
    random = random1 = random2 = np.int64(0)
    while True:
        task = next_task(counters)
        start, stop = task * _ENTRIES, min(count, (task + 1) * _ENTRIES)
        if start >= count:
            return
        _ask_for_entries(entry, weights, gradients, start, stop)
        while start < stop and start > 0 and _slot_at(entry, start) == _slot_at(entry, start - 1):
            start += 1
        while start < stop:
            slot = _slot_at(entry, start)
            row = table + slot * row_bytes
            first, second = firsts + slot * state_bytes, seconds + slot * state_bytes
            end = start + 1
            while end < count and _slot_at(entry, end) == slot:
                end += 1
            after = _slot_at(entry, min(end, count - 1))  # the next row
            next_row, next_first = table + after * row_bytes, firsts + after * state_bytes
            next_second = seconds + after * state_bytes
            number = entry[start] & 0xFFFFFFFF
            source, factor = gradient[number], weight[number]
            # What is summed, or scaled twice, goes by a buffer, so that nothing is rounded otherwise.
            if end > start + 1 or rule == ROW_ADAGRAD or scale_32 != 1:
                _sum_row(entry, weight, gradient, start, end, total, width)
                source, factor = total, scale_32
            if rule == ADAM:
                i32(steps)[slot] += np.int32(1)
                times = np.float64(i32(steps)[slot])
                length = np.float32(lr / (1 - beta1**times))
                root = np.float32(1 / math.sqrt(1 - beta2**times))
            elif rule == ROW_ADAGRAD:
                f32(firsts)[slot] += _mean_square(total, width, scale_32)
                length = np.float32(lr / (math.sqrt(np.float64(f32(firsts)[slot])) + eps))
            if seed >= 0:
                hashed = np.int64(_hash(np.uint32(slot) + _hash(np.uint32(seed))))
                random = first_column + hashed
                random1 = first_column + np.int64(_hash(hashed + 1))
                random2 = first_column + np.int64(_hash(hashed + 2))
            v, elements = 0, whole
            while v < width:
                at, at1, at2 = row, first, second
                if v == whole:  # what is left fills no vector, so it is worked on elsewhere
                    at, at1, at2 = edge, edge + STRIDE * 4, edge + 2 * STRIDE * 4
                    store(total + v * 4, fill(np.float32(0)))
                    store(total + (v + LANES) * 4, fill(np.float32(0)))
                    _sum_tail(entry, weight, gradient, start, end, total, whole, width)
                    source, factor, elements = total + v * 4, scale_32, STRIDE
                    _copy(at, row + v * size, tail, size)
                    if rule <= ADAGRAD:
                        _copy(at1, first + v * state_size, tail, state_size)
                    if rule == ADAM:
                        _copy(at2, second + v * state_size, tail, state_size)
                given = (
                    at, at1, at2, next_row + v * size, next_first + v * state_size, next_second + v * state_size,
                    source, factor, elements, seed >= 0, random + v, random1 + v, random2 + v,
                    (keep1_32, beta2_32, keep2_32, length, root, eps_32),
                )  # fmt: skip
                if rule == ADAM and kind == FLOAT32 and state_kind == FLOAT32:
                    update(ADAM, FLOAT32, FLOAT32, *given)
                elif rule == ADAM and kind == BFLOAT16 and state_kind == FLOAT32:
                    update(ADAM, BFLOAT16, FLOAT32, *given)
                elif rule == ADAM and kind == BFLOAT16 and state_kind == BFLOAT16:
                    update(ADAM, BFLOAT16, BFLOAT16, *given)
                else:
                    update(rule, kind, state_kind, *given)
                if v == whole:
                    _copy(row + v * size, at, tail, size)
                    if rule <= ADAGRAD:
                        _copy(first + v * state_size, at1, tail, state_size)
                    if rule == ADAM:
                        _copy(second + v * state_size, at2, tail, state_size)
                v += elements
            start = end
