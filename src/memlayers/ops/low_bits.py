"""read_low_bits, dot_low_bits: as `read` and `dot`, of rows that were rounded to integers of 8 or 4 bits.

A number of a row is its integer times the scale of the row. Integers are from -128 or -8 to 127 or 7, and the scale,
which may be negative, is the one with the least squared error (`quantised`). Codes [S, R] hold the integers of a row:

    8 bits     an int8 each number, 16 to a group
    4 bits     128 numbers to a group of 16 words of 32 bits: number i is bits 4 * (i // 16) and up of word i % 16; 8 is
               added, so that it is from 0 to 15

The last group is filled. Such rows are trained by nobody; weights and outputs have gradients.

Letters: T tokens, K rows a token, S slots, V width, R bytes of codes of a row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.checks import require_choice
from memlayers.ops.registry import operation

BITS = (8, 4)
_GROUP = {8: 16, 4: 128}  # numbers of a group

# Scales that are tried, as what they make of the largest number of a row: from 0.9 to 3.9 times the largest integer,
# then some around the best. Few large numbers are cut off where that serves the many.
_STRETCHES = [0.9 * 1.08**i for i in range(20)]
_FINE = [1.08 ** (i / 5) for i in (-4, -3, -2, -1, 1, 2, 3, 4)]
# Elements that are rounded at once, so that the passes over them stay in the cache.
_ELEMENTS = 2**17
# Bytes of gathered rows that the references hold at once.
_BYTES = 2**22


def code_bytes(width: int, bits: int) -> int:
    """R. Raises `ValueError` for bits other than 8 and 4."""
    require_choice("bits", bits, BITS)
    return math.ceil(width / _GROUP[bits]) * _GROUP[bits] * bits // 8


@torch.no_grad()
def quantised(table_SV: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [S, R] (uint8) and scales [S] (float32) of a table of floats.

    Raises `ValueError` where a number is not finite, or for other bits.
    """
    slots, width = table_SV.shape
    codes_SR = torch.empty(slots, code_bytes(width, bits), dtype=torch.uint8, device=table_SV.device)
    scales_S = torch.empty(slots, dtype=torch.float32, device=table_SV.device)
    count = max(1, _ELEMENTS // width)
    for start in range(0, slots, count):
        rows = slice(start, start + count)
        scale_C1, integers_CV = _nearest(table_SV[rows].float(), -(2 ** (bits - 1)))
        if not scale_C1.isfinite().all():
            raise ValueError("a table that is rounded to integers must hold finite numbers, got NaN or infinite ones")
        scales_S[rows] = scale_C1[:, 0]
        codes_SR[rows] = _packed(F.pad(integers_CV, (0, -width % _GROUP[bits])).to(torch.int8), bits)
    return codes_SR, scales_S


def _packed(integers: Tensor, bits: int) -> Tensor:
    """The codes of integers (int8) of whole groups."""
    if bits == 8:
        return integers.view(torch.uint8)
    nibbles = (integers + 8).unflatten(-1, (-1, 8, 16)).transpose(-1, -2)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).flatten(-3).view(torch.uint8)


def dequantised(codes: Tensor, scales: Tensor, width: int, bits: int) -> Tensor:
    """The numbers [..., V] (float32) that codes [..., R] and scales [...] stand for."""
    if bits == 8:
        integers = codes.view(torch.int8)
    else:
        words = codes.unflatten(-1, (-1, 16, 4))
        nibbles = torch.stack([words & 15, words >> 4], -1).flatten(-2)
        integers = nibbles.transpose(-1, -2).flatten(-3).to(torch.int8) - 8
    return integers[..., :width] * scales[..., None]


def _nearest(values_CV: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
    """The scales [C, 1] and integers of rows with the least squared error; integers from `lowest` to -`lowest` - 1."""
    largest_C1 = values_CV.gather(1, values_CV.abs().argmax(1, keepdim=True))
    unit_C1 = torch.where(largest_C1 == 0, 1.0, largest_C1)
    values_CV = values_CV / unit_C1  # the largest is 1 now, and becomes the lowest integer, which has no counterpart
    codes_CV = torch.empty_like(values_CV)

    def round_by(factor):
        return torch.mul(values_CV, factor, out=codes_CV).round_().clamp_(lowest, -lowest - 1)

    def fitted() -> tuple[Tensor, Tensor]:
        """What the integers that are there explain of the squares of their row, and the scale that does it."""
        product_C1 = torch.linalg.vecdot(values_CV, codes_CV)[:, None]
        square_C1 = torch.linalg.vecdot(codes_CV, codes_CV)[:, None].clamp_(min=1)
        scale_C1 = product_C1 / square_C1
        return product_C1 * scale_C1, scale_C1

    best_C1, scale_C1, stretch_C1 = torch.full_like(unit_C1, -1.0), unit_C1, torch.ones_like(unit_C1)
    for factors in (_STRETCHES, _FINE):
        center_C1 = stretch_C1
        for factor in factors:
            tried_C1 = center_C1 * factor
            round_by(lowest * tried_C1)
            explained_C1, its_scale_C1 = fitted()
            is_better = explained_C1 > best_C1
            best_C1 = torch.where(is_better, explained_C1, best_C1)
            scale_C1 = torch.where(is_better, its_scale_C1, scale_C1)
            stretch_C1 = torch.where(is_better, tried_C1, stretch_C1)
    # To the nearest by that scale, and the best scale of those: neither can be worse.
    round_by(torch.where(scale_C1 == 0, 0.0, 1 / scale_C1))
    _, scale_C1 = fitted()
    return scale_C1 * unit_C1, codes_CV


def read_reference(
    codes_SR: Tensor, scales_S: Tensor, slots_TK: Tensor, weights_TK: Tensor, width: int, bits: int
) -> Tensor:
    """y [T, V]."""
    y_TV = codes_SR.new_empty(len(slots_TK), width, dtype=torch.float32)
    for tokens in _chunks(slots_TK, width):
        rows_CKV = rows_of(codes_SR, scales_S, slots_TK[tokens], width, bits)
        y_TV[tokens] = (rows_CKV * weights_TK[tokens, :, None].float()).sum(1)
    return y_TV


def dot_reference(codes_SR: Tensor, scales_S: Tensor, slots_TK: Tensor, outputs_TV: Tensor, bits: int) -> Tensor:
    """d [T, K]."""
    width = outputs_TV.shape[1]
    d_TK = codes_SR.new_empty(slots_TK.shape, dtype=torch.float32)
    for tokens in _chunks(slots_TK, width):
        rows_CKV = rows_of(codes_SR, scales_S, slots_TK[tokens], width, bits)
        d_TK[tokens] = (rows_CKV * outputs_TV[tokens, None].float()).sum(-1)
    return d_TK


def rows_of(codes_SR: Tensor, scales_S: Tensor, slots: Tensor, width: int, bits: int) -> Tensor:
    """The rows [..., V] (float32) of slots [...]."""
    return dequantised(F.embedding(slots, codes_SR), F.embedding(slots, scales_S[:, None])[..., 0], width, bits)


def _chunks(slots_TK: Tensor, width: int) -> list[slice]:
    size = max(1, _BYTES // max(1, 4 * slots_TK.shape[1] * width))
    return [slice(start, start + size) for start in range(0, len(slots_TK), size)]


def _empty_outputs(codes_SR, scales_S, slots_TK, weights_TK, width, bits):
    return codes_SR.new_empty(len(slots_TK), width, dtype=torch.float32)


def _empty_weights(codes_SR, scales_S, slots_TK, outputs_TV, bits):
    return codes_SR.new_empty(slots_TK.shape, dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.width, ctx.bits = inputs[-2], inputs[-1]  # a dot has no width: its outputs have


def _read_backward(ctx, grad_TV):
    codes_SR, scales_S, slots_TK, weights_TK = ctx.saved_tensors
    grad_TK = None
    if ctx.needs_input_grad[3]:
        grad_TK = dot_low_bits(codes_SR, scales_S, slots_TK, grad_TV, ctx.bits).to(weights_TK.dtype)
    return None, None, None, grad_TK, None, None


def _dot_backward(ctx, grad_TK):
    codes_SR, scales_S, slots_TK, outputs_TV = ctx.saved_tensors
    grad_TV = None
    if ctx.needs_input_grad[3]:
        grad_TV = read_low_bits(codes_SR, scales_S, slots_TK, grad_TK, outputs_TV.shape[1], ctx.bits).to(
            outputs_TV.dtype
        )
    return None, None, None, grad_TV, None


def _flops_of_read(codes_SR, scales_S, slots_TK, weights_TK, width, *_, **__):
    return 2 * math.prod(slots_TK) * width


def _flops_of_dot(codes_SR, scales_S, slots_TK, outputs_TV, *_, **__):
    return 2 * math.prod(slots_TK) * outputs_TV[1]


read_low_bits = operation(
    "read_low_bits", read_reference, _empty_outputs, backward=_read_backward, save=_save, flops=_flops_of_read
)
dot_low_bits = operation(
    "dot_low_bits", dot_reference, _empty_weights, backward=_dot_backward, save=_save, flops=_flops_of_dot
)
