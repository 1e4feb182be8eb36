"""read_low_bits and dot_low_bits on a CPU: integers become floats in registers, and the scale of a row is a part of its
weight. What a row is, `memlayers.ops.low_bits` says.

The kernels know whole groups of numbers: outputs have room for the last one.

Letters: T tokens, K rows a token, S slots, V width, W the width of whole groups, R bytes of codes
of a row.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops.cpu.compile import kernel, part
from memlayers.ops.cpu.intrinsics import (
    LANES,
    add,
    add_scaled,
    f32,
    fail,
    fill,
    i64,
    lane_sum,
    load,
    load_int8,
    multiply,
    next_task,
    nibble0,
    nibble1,
    nibble2,
    nibble3,
    nibble4,
    nibble5,
    nibble6,
    nibble7,
    prefetch,
    store,
)
from memlayers.ops.cpu.read import are_slots, launch_tokens
from memlayers.ops.low_bits import code_bytes

_ROWS = 16  # rows read side by side
_STEP = 4 * LANES  # bytes from one vector of outputs to the next
# What makes an integer of four bits of those of number 0 to 3.
_UNIT0, _UNIT1, _UNIT2, _UNIT3 = (np.float32(16.0**-i) for i in range(4))


def read(codes_SR: Tensor, scales_S: Tensor, slots_TK: Tensor, weights_TK: Tensor, width: int, bits: int) -> Tensor:
    """The operation, for contiguous tables."""
    if not takes(codes_SR, width, bits):
        return NotImplemented
    y_TW = torch.empty(len(slots_TK), whole_width(codes_SR, bits), dtype=torch.float32)
    _launch(_read, codes_SR, scales_S, slots_TK, weights_TK.float().contiguous(), y_TW, bits)
    return y_TW[:, :width].contiguous()


def dot(codes_SR: Tensor, scales_S: Tensor, slots_TK: Tensor, outputs_TV: Tensor, bits: int) -> Tensor:
    """The operation, for contiguous tables."""
    if not takes(codes_SR, outputs_TV.shape[1], bits):
        return NotImplemented
    d_TK = torch.empty(slots_TK.shape, dtype=torch.float32)
    outputs_TW = F.pad(outputs_TV.float(), (0, whole_width(codes_SR, bits) - outputs_TV.shape[1])).contiguous()
    _launch(_dot, codes_SR, scales_S, slots_TK, d_TK, outputs_TW, bits)
    return d_TK


def takes(codes_SR: Tensor, width: int, bits: int) -> bool:
    """Whether these are rows of that width, one behind the other."""
    return codes_SR.dtype == torch.uint8 and codes_SR.shape[1] == code_bytes(width, bits) and codes_SR.is_contiguous()


def whole_width(codes_SR: Tensor, bits: int) -> int:
    """W."""
    return codes_SR.shape[1] * 8 // bits


def _launch(
    function, codes_SR: Tensor, scales_S: Tensor, slots_TK: Tensor, weights_TK: Tensor, outputs_TW: Tensor, bits: int
) -> None:
    scaled_TK = torch.empty(slots_TK.shape, dtype=torch.float32)
    row = {"row_bytes": codes_SR.shape[1], "bits": bits}
    launch_tokens(function, codes_SR, slots_TK, weights_TK, outputs_TW, scales=scales_S, scaled=scaled_TK, **row)


@part
def scale_weights(scale, slot, weight, out, start, end):
    """out[k] = weight[k] * scale of the row, for entries start to end."""
    for k in range(start, end):
        out[k] = weight[k] * scale[slot[k]]


@part
def add_low_rows(table, slot, scaled, start, end, known, out, first, last, row_bytes, bits):
    """out += the weighted sum of columns first to last, of whole groups, of the rows of entries start to end.

    Asks for as many rows of the next entries, up to entry `known`, meanwhile: a row ends before the processor's own
    prefetcher has found it.
    """
    if bits == 4:
        _add_int4(table, slot, scaled, start, end, known, out, first, last, row_bytes)
        return
    wide = first + (last - first) // (4 * LANES) * 4 * LANES
    for v in range(first, wide, 4 * LANES):
        at = out + v * 4
        total0, total1, total2, total3 = load(at), load(at + _STEP), load(at + 2 * _STEP), load(at + 3 * _STEP)
        for k in range(start, end):
            prefetch(table + slot[min(k + _ROWS, known - 1)] * row_bytes + v)
            row, factor = table + slot[k] * row_bytes + v, scaled[k]
            total0 = add_scaled(total0, factor, load_int8(row))
            total1 = add_scaled(total1, factor, load_int8(row + LANES))
            total2 = add_scaled(total2, factor, load_int8(row + 2 * LANES))
            total3 = add_scaled(total3, factor, load_int8(row + 3 * LANES))
        store(at, total0)
        store(at + _STEP, total1)
        store(at + 2 * _STEP, total2)
        store(at + 3 * _STEP, total3)
    for v in range(wide, last, LANES):
        total = load(out + v * 4)
        for k in range(start, end):
            total = add_scaled(total, scaled[k], load_int8(table + slot[k] * row_bytes + v))
        store(out + v * 4, total)


@part
def _add_int4(table, slot, scaled, start, end, known, out, first, last, row_bytes):
    """The same for 4 bits. What was added to integers is taken off at the end, and so is the place of their bits."""
    offset = np.float32(0)
    for k in range(start, end):
        offset -= np.float32(8) * scaled[k]
    for v in range(first, last, 8 * LANES):
        total0 = total1 = total2 = total3 = total4 = total5 = total6 = total7 = fill(np.float32(0))
        for k in range(start, end):
            prefetch(table + slot[min(k + _ROWS, known - 1)] * row_bytes + v // 2)
            row, factor = table + slot[k] * row_bytes + v // 2, scaled[k]
            total0 = add_scaled(total0, factor, nibble0(row))
            total1 = add_scaled(total1, factor, nibble1(row))
            total2 = add_scaled(total2, factor, nibble2(row))
            total3 = add_scaled(total3, factor, nibble3(row))
            total4 = add_scaled(total4, factor, nibble4(row))
            total5 = add_scaled(total5, factor, nibble5(row))
            total6 = add_scaled(total6, factor, nibble6(row))
            total7 = add_scaled(total7, factor, nibble7(row))
        at = out + v * 4
        _add_to(at, offset, _UNIT0, total0)
        _add_to(at + _STEP, offset, _UNIT1, total1)
        _add_to(at + 2 * _STEP, offset, _UNIT2, total2)
        _add_to(at + 3 * _STEP, offset, _UNIT3, total3)
        _add_to(at + 4 * _STEP, offset, _UNIT0, total4)
        _add_to(at + 5 * _STEP, offset, _UNIT1, total5)
        _add_to(at + 6 * _STEP, offset, _UNIT2, total6)
        _add_to(at + 7 * _STEP, offset, _UNIT3, total7)


@part
def _add_to(out, offset, unit, total):
    """out += offset + unit * total."""
    store(out, add_scaled(add(load(out), fill(offset)), unit, total))


@part
def _product_int8(row, output, width):
    """<integers of a row, output>."""
    total = fill(np.float32(0))
    for v in range(0, width, LANES):
        total = add(total, multiply(load_int8(row + v), load(output + v * 4)))
    return lane_sum(total)


@part
def _product_int4(row, output, width):
    """The same."""
    total0 = total1 = total2 = total3 = eight = fill(np.float32(0))
    for v in range(0, width, 8 * LANES):
        word, at = row + v // 2, output + v * 4
        part0, part1, part2, part3 = load(at), load(at + _STEP), load(at + 2 * _STEP), load(at + 3 * _STEP)
        part4, part5 = load(at + 4 * _STEP), load(at + 5 * _STEP)
        part6, part7 = load(at + 6 * _STEP), load(at + 7 * _STEP)
        total0 = add(add(total0, multiply(nibble0(word), part0)), multiply(nibble4(word), part4))
        total1 = add(add(total1, multiply(nibble1(word), part1)), multiply(nibble5(word), part5))
        total2 = add(add(total2, multiply(nibble2(word), part2)), multiply(nibble6(word), part6))
        total3 = add(add(total3, multiply(nibble3(word), part3)), multiply(nibble7(word), part7))
        eight = add(eight, add(add(part0, part1), add(part2, part3)))
        eight = add(eight, add(add(part4, part5), add(part6, part7)))
    total = add_scaled(add_scaled(total0, _UNIT1, total1), _UNIT2, total2)
    return lane_sum(add_scaled(add_scaled(total, _UNIT3, total3), np.float32(-8), eight))


@kernel
def _read(
    counters, table, scales, slots, weights, scaled, outputs, num_tokens, topk, num_slots, width, row_bytes, bits,
    tokens, columns,
):  # fmt: skip
    slot, factor = i64(slots), f32(scaled)
    blocks = (width + columns - 1) // columns
    while True:
        task = next_task(counters)
        first, column = task // blocks * tokens, task % blocks * columns
        if first >= num_tokens:
            return
        last, stop = min(width, column + columns), min(num_tokens, first + tokens)
        if not are_slots(slot, first * topk, stop * topk, num_slots):
            fail(counters)
            return
        # Each task of a token's columns writes the same there.
        scale_weights(f32(scales), slot, f32(weights), factor, first * topk, stop * topk)
        for token in range(first, stop):
            out, end = outputs + token * width * 4, (token + 1) * topk
            for v in range(column, last):
                f32(out)[v] = np.float32(0)
            for k in range(token * topk, end, _ROWS):
                upto = min(k + _ROWS, end)
                add_low_rows(table, slot, factor, k, upto, stop * topk, out, column, last, row_bytes, bits)


@kernel
def _dot(
    counters, table, scales, slots, weights, scaled, outputs, num_tokens, topk, num_slots, width, row_bytes, bits,
    tokens, columns,
):  # fmt: skip
    slot, product = i64(slots), f32(weights)
    while True:
        first = next_task(counters) * tokens
        if first >= num_tokens:
            return
        for token in range(first, min(num_tokens, first + tokens)):
            start, end = token * topk, (token + 1) * topk
            if not are_slots(slot, start, end, num_slots):
                fail(counters)
                return
            output = outputs + token * width * 4
            for k in range(start, end):
                row, scale = table + slot[k] * row_bytes, f32(scales)[slot[k]]
                if bits == 8:
                    product[k] = scale * _product_int8(row, output, width)
                else:
                    product[k] = scale * _product_int4(row, output, width)
