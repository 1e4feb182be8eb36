"""Stochastic rounding to bfloat16: up or down at random, so that the mean over many roundings is the value itself.

A row's update below half a unit in its last place (1/256 of a number) is lost when it is rounded to the nearest, each
time; rounded stochastically, it arrives on average. The random bits are made from (seed, slot, column), so a step gives
the same rows however it is divided among threads. The kernels (`memlayers.ops.cpu.rows`, `memlayers.ops.gpu.rules`)
give the same bits.

A row has one random number, a hash of seed and slot. From it the columns go on in equal steps modulo 2**32, as in a
Weyl sequence, and take the upper 16 bits: each element's are uniform over seeds and over slots, and those of a row are
spread evenly. For a kernel on a CPU a hash of each element would cost as much as the step itself. What is rounded
beside a row in the same step, such as its moments, has a stream of its own, with another number (the row's, hashed once
more with the stream's) and another step.

Letters: C rows, V width.
"""

import torch
from torch import Tensor

_32_BITS = 0xFFFFFFFF
FACTORS = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # the steps, by stream


def round_to_bfloat16(values_CV: Tensor, slots_C: Tensor, seed: int, stream: int = 0, first_column: int = 0) -> Tensor:
    """bfloat16 [C, V] from float32; infinity stays infinity, and NaN NaN.

    slots_C: the slot of each row (int64). seed: at least 0; its lower 32 bits count. stream: 0 for the row itself, 1
    for its first state, 2 for its second. first_column: of the values, where the rows go on to either side.
    """
    row_C = hash32(slots_C + hash32(torch.full_like(slots_C[:1], seed & _32_BITS)))
    if stream:
        row_C = hash32(row_C + stream)
    columns_V = first_column + torch.arange(values_CV.shape[1], device=values_CV.device)
    random_CV = (((row_C[:, None] + columns_V) * FACTORS[stream]) & _32_BITS) >> 16
    # The lower 16 bits of a float32 say how far it is from the bfloat16 below: it goes up where adding carries.
    bits_CV = values_CV.view(torch.int32).long() & _32_BITS
    is_special_CV = (bits_CV & 0x7F800000) == 0x7F800000  # nothing may be carried into or out of them
    quiet_CV = torch.where((bits_CV & 0x7FFFFF) == 0, bits_CV, bits_CV | 0x400000)
    rounded_CV = torch.where(is_special_CV, quiet_CV, bits_CV + random_CV)
    return (rounded_CV >> 16).to(torch.int16).view(torch.bfloat16)


def hash32(values: Tensor) -> Tensor:
    """32 well mixed bits of the lower 32 of each int64: the finaliser of MurmurHash3."""
    bits = values & _32_BITS
    # Products wrap at 64 bits, which leaves the lower 32 as they should be.
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _32_BITS
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _32_BITS
    return bits ^ (bits >> 16)
