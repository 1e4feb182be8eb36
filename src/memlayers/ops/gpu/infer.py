"""infer on a GPU, for the few tokens that generation has at a time: four kernels, with hardly anything in between.

The projection is PyTorch's. Half scores are made of it and read the sub-keys, the most of what there is to read, once;
BatchNorm is computed on the way. Selection and softmax are one kernel, and so is the read.

Letters: see `memlayers.ops.infer`; C2 the power of two from C on.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from memlayers.ops.gpu import read as reading
from memlayers.ops.gpu import select as selecting
from memlayers.ops.gpu.launch import launch
from memlayers.ops.infer import Layer

FEW_TOKENS = 16  # up to which reading the sub-keys is what costs

_BYTES = 2**14  # of sub-keys, for each program: eight loads of 16 bytes a thread in flight
_WARPS = 4
_MAX_HALF = 4096  # more do not fit the registers


def takes(layer: Layer) -> bool:
    """Whether the kernels know the dtypes and sizes: one dtype, but for the table's and for statistics in float32."""
    x_TD, keys_2HNC = layer.x_TD, layer.keys_2HNC
    same = x_TD, layer.projection_FD, keys_2HNC, *(() if layer.bias_F is None else (layer.bias_F,))
    return (
        len(x_TD) <= FEW_TOKENS
        and all(given.dtype == x_TD.dtype for given in same)
        and all(stat_HQ.dtype in (x_TD.dtype, torch.float32) for stat_HQ in layer.stats)
        and keys_2HNC.is_contiguous()
        and keys_2HNC.shape[3] <= _MAX_HALF
        and selecting.takes(keys_2HNC.shape[2], layer.topk, keys_2HNC.dtype)
        and reading.takes(layer.table_SV)
    )


def infer(layer: Layer) -> Tensor:
    """y [T, V], float32. Of 16-bit inputs only the projection is rounded to 16 bits; query and scores are not."""
    if not takes(layer):
        return NotImplemented
    projected_TF = F.linear(layer.x_TD, layer.projection_FD, layer.bias_F)
    scores_2THN = _half_scores(projected_TF, layer.stats, layer.eps, layer.keys_2HNC)
    weights_THK, slots_THK = selecting.select(scores_2THN[0], scores_2THN[1], layer.topk, softmax=True)
    return reading.read(layer.table_SV, slots_THK.flatten(1), weights_THK.flatten(1))


def _half_scores(projected_TF: Tensor, stats: tuple[Tensor, ...], eps: float, keys_2HNC: Tensor) -> Tensor:
    tokens, (_, heads, num_subkeys, half) = len(projected_TF), keys_2HNC.shape
    scores_2THN = projected_TF.new_empty(2, tokens, heads, num_subkeys, dtype=torch.float32)
    c2 = triton.next_power_of_2(half)
    fitting = max(1, _BYTES // (c2 * keys_2HNC.element_size()))
    keys_of_program = min(fitting, triton.next_power_of_2(num_subkeys))
    launch(
        _half_scores_kernel,
        (2 * heads * triton.cdiv(num_subkeys, keys_of_program) if tokens else 0,),
        projected_TF,
        *(stat_HQ.contiguous() for stat_HQ in stats),
        keys_2HNC,
        scores_2THN,
        eps,
        tokens,
        HEADS=heads,
        NUM_SUBKEYS=num_subkeys,
        HALF=half,
        C2=c2,
        KEYS=keys_of_program,
        num_warps=_WARPS,
    )
    return scores_2THN


@triton.jit(do_not_specialize=["tokens"])
def _half_scores_kernel(
    projected,
    means,
    variances,
    gains,
    shifts,
    keys,
    scores,
    eps,
    tokens,
    HEADS: tl.constexpr,
    NUM_SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    C2: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Programs: (half, head) and block of its sub-keys, which stay in registers for all tokens."""
    BLOCKS: tl.constexpr = (NUM_SUBKEYS + KEYS - 1) // KEYS
    side_head = (tl.program_id(0) // BLOCKS).to(tl.int64)
    side, head = side_head // HEADS, side_head % HEADS
    subkey = tl.program_id(0) % BLOCKS * KEYS + tl.arange(0, KEYS)
    c = tl.arange(0, C2)
    is_subkey, is_c = subkey < NUM_SUBKEYS, c < HALF
    of_keys = keys + (side_head * NUM_SUBKEYS + subkey)[:, None] * HALF + c[None, :]
    key = tl.load(of_keys, mask=is_subkey[:, None] & is_c[None, :], other=0)
    feature = (2 * head + side) * HALF + c
    scale = tl.rsqrt(tl.load(variances + feature, mask=is_c, other=1).to(tl.float32) + eps)
    scale *= tl.load(gains + feature, mask=is_c, other=0).to(tl.float32)
    mean = tl.load(means + feature, mask=is_c, other=0).to(tl.float32)
    shift = tl.load(shifts + feature, mask=is_c, other=0).to(tl.float32)
    tl.debug_barrier()  # all but the query is asked for before anything is waited for
    token = tl.zeros([], tl.int64)
    while token < tokens:
        query = tl.load(projected + token * (2 * HEADS * HALF) + feature, mask=is_c, other=0).to(tl.float32)
        query = (query - mean) * scale + shift
        score = tl.sum(key.to(tl.float32) * query[None, :], 1)
        out = ((side * tokens + token) * HEADS + head) * NUM_SUBKEYS + subkey
        tl.store(scores + out, score, mask=is_subkey)
        token += 1
