"""select on a GPU: the K best pair sums of each row, as `memlayers.ops.select` promises them.

A score and its id are one integer of 64 bits, whose order is the order that is promised; so one sort is both. Before
that, most of a half is put aside: its K best lie in the K groups of adjacent elements with the greatest maxima (among
equal maxima the first groups, whose ids are lower), and so again within these groups.

Letters: A leading rows, B trailing rows, N sub-keys a codebook, K neighbours, G groups of M members, P pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlayers.ops.gpu.launch import launch
from memlayers.ops.select import check_halves, select_by

_DTYPES = torch.float32, torch.bfloat16, torch.float16
_MAX_TOPK = 128, 32  # up to 4096 sub-keys, and beyond: more do not fit the registers, or compile for minutes
_FEW_ROWS = 512  # that do not fill the processors with a warp each


def takes(num_subkeys: int, topk: int, *dtypes: torch.dtype) -> bool:
    """Whether the kernel knows the sizes and the dtypes."""
    is_small = num_subkeys <= 2**16 and topk <= _MAX_TOPK[num_subkeys > 2**12]
    return is_small and all(dtype in _DTYPES for dtype in dtypes)


def select(first_N: Tensor, second_N: Tensor, topk: int, *, softmax: bool = False) -> tuple[Tensor, Tensor]:
    """The operation; with `softmax`, that of the K scores in their place."""
    if not takes(first_N.shape[-1], topk, first_N.dtype, second_N.dtype):
        return NotImplemented
    return select_by(select_into, first_N, second_N, topk, softmax)


def select_into(
    first_ABN: Tensor, second_ABN: Tensor, scores_ABK: Tensor, slots_ABK: Tensor, *, softmax: bool = False
) -> None:
    """[A, B, N] with adjacent scores -> contiguous scores [A, B, K] float32, slots [A, B, K] int64."""
    rows_a, rows_b, num_subkeys = first_ABN.shape
    topk = scores_ABK.shape[-1]
    check_halves(first_ABN, second_ABN, topk)
    strides = *first_ABN.stride()[:2], *second_ABN.stride()[:2]
    rows = rows_a * rows_b
    is_aligned = all(size % 16 == 0 for size in (num_subkeys, *strides))

    launch(
        _select,
        (rows,),
        first_ABN,
        second_ABN,
        scores_ABK,
        slots_ABK,
        *strides,
        rows_b,
        num_subkeys,
        TOPK=topk,
        SOFTMAX=softmax,
        VECTOR=is_aligned,
        **blocks(rows, num_subkeys, topk),
    )


def blocks(rows: int, num_subkeys: int, topk: int) -> dict[str, int]:
    """Sizes of the kernel's tensors, and its warps.

    Groups of 4 are one load of 16 bytes, and of at most 8 K of them the K best are found at little cost. A warp a row
    keeps sorting within shuffles; more warps where the registers of one do not hold the candidates, and for a few rows,
    whose time is that of a single one.
    """
    n2, k2 = (max(2, triton.next_power_of_2(size)) for size in (num_subkeys, topk))
    pairs = max(k2, triton.next_power_of_2(sum(topk // (i + 1) for i in range(topk))))
    members = 1 if n2 <= 2 * k2 else 4
    while n2 // members > 8 * k2:
        members *= 4
    warps = max(1, k2 // 32) * (1 if n2 <= 2048 else 2)
    return {
        "N2": n2,
        "K2": k2,
        "P2": pairs,
        "M": min(members, n2 // k2),
        "num_warps": max(warps, 4) if rows <= _FEW_ROWS else warps,
    }


@triton.jit
def _code(score):
    """int32 in the order of the scores."""
    bits = (score.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # plus zero, because -0.0 equals +0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(code):
    return (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _pack(code, index):
    """Code and id, so that of equal codes the lower id is the greater."""
    return (code.to(tl.int64) << 32) | (index ^ -1).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _index(packed):
    return packed.to(tl.int32) ^ -1


@triton.jit
def _codes_at(half, index, num_subkeys):
    code = _code(tl.load(half + index, mask=index < num_subkeys, other=0.0))
    return tl.where(index < num_subkeys, code, -0x80000000)


@triton.jit
def _exchange(h, BIT: tl.constexpr, TURN: tl.constexpr, LAST: tl.constexpr):
    """Of two elements along a dimension the greater first, or last where the bit TURN is set. LAST: bit 0's axis."""
    is_second = tl.reshape(tl.arange(0, 2), [1] * (LAST - BIT) + [2] + [1] * (len(h.shape) - 1 - LAST + BIT))
    if TURN <= LAST:
        is_second ^= tl.reshape(tl.arange(0, 2), [1] * (LAST - TURN) + [2] + [1] * (len(h.shape) - 1 - LAST + TURN))
    other = tl.sum(h, LAST - BIT, keep_dims=True) - h  # a shuffle is left of it
    return tl.where((other > h) != (is_second != 0), other, h)


@triton.jit
def _merge(h, LOG: tl.constexpr, LAST: tl.constexpr):
    """Sort runs of 2 ** LOG that rise and then fall: every other one up, or a single one down."""
    for step in tl.static_range(LOG):
        h = _exchange(h, LOG - 1 - step, LOG, LAST)
    return h


@triton.jit
def _greatest(x, LOG_SIZE: tl.constexpr, LOG_K: tl.constexpr, SORTED: tl.constexpr):
    """Along the first dimension, the 2 ** LOG_K greatest, by a bitonic network; in no order if not SORTED.

    x: [SIZE] or, of both halves, [SIZE, 2].
    """
    h = tl.reshape(x, [2] * (LOG_SIZE + len(x.shape) - 1))
    for log in tl.static_range(1, LOG_K + 1):
        h = _merge(h, log, LOG_SIZE - 1)
    for log in tl.static_range(LOG_K + 1, LOG_SIZE + 1):
        h = tl.max(h, LOG_SIZE - log)  # of two runs, one up and one down
        if SORTED or log < LOG_SIZE:
            h = _merge(h, LOG_K, LOG_SIZE - 1 - log + LOG_K)
    return tl.reshape(h, [2**LOG_K] + [2] * (len(x.shape) - 1))


@triton.jit
def _maxima(half, start_C, num_subkeys, M: tl.constexpr, VECTOR: tl.constexpr):
    """The greatest code of M elements from each start."""
    if M == 1:
        greatest_C = _codes_at(half, start_C, num_subkeys)
    elif VECTOR:
        CHUNK: tl.constexpr = M if M <= 4 else 8
        offset = tl.arange(0, CHUNK)[None, :]
        greatest_C = tl.max(_codes_at(half, start_C[:, None] + offset, num_subkeys), axis=1)
        for m in range(CHUNK, M, CHUNK):
            codes = _codes_at(half, start_C[:, None] + m + offset, num_subkeys)
            greatest_C = tl.maximum(greatest_C, tl.max(codes, axis=1))
    else:  # no load of several elements, for which threads would share a group
        greatest_C = _codes_at(half, start_C, num_subkeys)
        for m in range(1, M):
            greatest_C = tl.maximum(greatest_C, _codes_at(half, start_C + m, num_subkeys))
    return greatest_C


@triton.jit
def _members(half1, half2, best_K2, num_subkeys, LOG_K: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr):
    """Of the best groups of M the K2 best smaller groups, packed: of M // 4 or, then sorted, of a single element."""
    L: tl.constexpr = M // 4 if M > 4 else 1
    RATIO: tl.constexpr = M // L
    SIZE: tl.constexpr = RATIO << LOG_K
    LOG_SIZE: tl.constexpr = SIZE.bit_length() - 1
    member = tl.arange(0, RATIO)[None, :]
    group1_K, group2_K = tl.split(_index(best_K2))
    group1_C = tl.reshape(group1_K[:, None] * RATIO + member, [SIZE])
    group2_C = tl.reshape(group2_K[:, None] * RATIO + member, [SIZE])
    code1_C = _maxima(half1, group1_C * L, num_subkeys, L, VECTOR)
    code2_C = _maxima(half2, group2_C * L, num_subkeys, L, VECTOR)
    packed_C2 = _pack(tl.join(code1_C, code2_C), tl.join(group1_C, group2_C))
    return _greatest(packed_C2, LOG_SIZE, LOG_K, L == 1)


@triton.jit
def _best(half1, half2, num_subkeys, LOG_K: tl.constexpr, N2: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr):
    """Packed, the K2 best of both halves, best first."""
    GROUPS: tl.constexpr = N2 // M
    LOG_GROUPS: tl.constexpr = GROUPS.bit_length() - 1
    LEVELS: tl.constexpr = M.bit_length() // 2
    group = tl.arange(0, GROUPS)
    code1_C = _maxima(half1, group * M, num_subkeys, M, VECTOR)
    code2_C = _maxima(half2, group * M, num_subkeys, M, VECTOR)
    packed_C2 = _pack(tl.join(code1_C, code2_C), tl.join(group, group))
    best_K2 = _greatest(packed_C2, LOG_GROUPS, LOG_K, M == 1)
    for level in tl.static_range(LEVELS):
        best_K2 = _members(half1, half2, best_K2, num_subkeys, LOG_K, M >> (2 * level), VECTOR)
    return best_K2


@triton.jit
def _staircase(TOPK: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, LOG_K2: tl.constexpr):
    """Ranks from 0, i and j, of the pairs with (i + 1) * (j + 1) <= K, row by row; and which of P2 there are."""
    rank = tl.arange(0, K2)
    length = TOPK // (rank + 1)
    end = tl.cumsum(length, axis=0)
    pair = tl.arange(0, P2)
    i = tl.zeros([P2], tl.int32)  # how many rows end before a pair: a search in their ends
    for bit in tl.static_range(LOG_K2):
        step = K2 >> (bit + 1)
        i += tl.where(tl.gather(end, i + (step - 1), 0) <= pair, step, 0)
    j = pair - tl.gather(end - length, i, 0)
    exists = (i + 1) * (j + 1) <= TOPK
    return i, tl.where(exists, j, 0), exists


@triton.jit(do_not_specialize=["first_a", "first_b", "second_a", "second_b", "rows_b"])
def _select(
    first,
    second,
    scores,
    slots,
    first_a,
    first_b,
    second_a,
    second_b,
    rows_b,
    num_subkeys,
    TOPK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    N2: tl.constexpr,
    K2: tl.constexpr,
    P2: tl.constexpr,
    M: tl.constexpr,
    VECTOR: tl.constexpr,
):
    LOG_K: tl.constexpr = K2.bit_length() - 1
    LOG_P: tl.constexpr = P2.bit_length() - 1
    rank = tl.arange(0, K2)
    row = tl.program_id(0)
    a, b = (row // rows_b).to(tl.int64), (row % rows_b).to(tl.int64)
    offset1, offset2 = a * first_a + b * first_b, a * second_a + b * second_b
    if VECTOR:  # known of no stride, or another number of tokens would be compiled again
        offset1, offset2 = tl.multiple_of(offset1, 16), tl.multiple_of(offset2, 16)
    half1, half2 = first + offset1, second + offset2
    best1, best2 = tl.split(_best(half1, half2, num_subkeys, LOG_K, N2, M, VECTOR))
    i, j, exists = _staircase(TOPK, K2, P2, LOG_K)  # only now: through the search it would take registers
    score1, score2 = _score((best1 >> 32).to(tl.int32)), _score((best2 >> 32).to(tl.int32))
    code = _code(tl.gather(score1, i, 0) + tl.gather(score2, j, 0))
    slot = tl.gather(_index(best1) * num_subkeys, i, 0) + tl.gather(_index(best2), j, 0)
    packed = _pack(tl.where(exists, code, -0x80000000), tl.where(exists, slot, -1))
    best = _greatest(packed, LOG_P, LOG_K, True)
    score = _score((best >> 32).to(tl.int32))
    if SOFTMAX:
        score = tl.where(rank < TOPK, tl.exp(score - tl.max(score, axis=0)), 0.0)
        score /= tl.sum(score, axis=0)
    out = row.to(tl.int64) * TOPK + rank
    tl.store(scores + out, score, mask=rank < TOPK)
    tl.store(slots + out, _index(best).to(tl.uint32, bitcast=True).to(tl.int64), mask=rank < TOPK)
