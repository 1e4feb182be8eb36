"""select on a CPU: the K best pair sums of each row, as `memlayers.ops.select` promises them.

A half's K best, sorted, are found in five steps: integer codes in the order of the scores, and the maxima of groups of
them; a bound between the K-th greatest maximum and the next, by bisection; what is at or above it, in order; how many
of these are greater than each, which is its rank; the ranks below K. Pairs likewise: a lower bound of the K-th best
sum, the pairs of the staircase that reach it (a prefix of each of its rows), their ranks.

Codes are compared, never scores, so NaN has a place in the order (beyond infinity of its sign) and nothing is left
undefined.

Letters: A leading rows, B trailing rows, N sub-keys a codebook, K neighbours, G groups.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from memlayers.ops.cpu.compile import kernel, part, part_with_a_sum, shared
from memlayers.ops.cpu.intrinsics import (
    LANES,
    add,
    bits_float,
    count_bits,
    count_greater_64,
    f32,
    fill,
    float_bits,
    i32,
    i64,
    keep_16,
    keep_places_16,
    load,
    lowest_bit,
    mask_at_least_64,
    next_task,
    order_64,
    store_ordered,
    store_sums,
    this_thread,
)
from memlayers.ops.cpu.launch import launch, threads_for
from memlayers.ops.cpu.processor import has_feature
from memlayers.ops.select import check_halves, select_by

_ROWS = 16  # rows of a task
_LOWEST = np.int32(-(2**31))  # below the code of every score
_COMPRESSES = has_feature("avx512f")
_RANKED = 256  # as many candidates are ranked by counting; more are sorted


def select(first_N: Tensor, second_N: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The operation, for all but float64."""
    if torch.float64 in (first_N.dtype, second_N.dtype):
        return NotImplemented
    return select_by(select_into, first_N.float(), second_N.float(), topk)


def select_into(
    first_ABN: Tensor, second_ABN: Tensor, scores_ABK: Tensor, slots_ABK: Tensor, *, softmax: bool = False
) -> None:
    """float32 [A, B, N] with adjacent scores -> contiguous scores [A, B, K], slots [A, B, K] int64.

    softmax: that of the K scores in their place.
    """
    rows_a, rows_b, num_subkeys = first_ABN.shape
    topk = scores_ABK.shape[-1]
    check_halves(first_ABN, second_ABN, topk)
    rows = rows_a * rows_b
    threads = threads_for((rows + _ROWS - 1) // _ROWS)
    width = scratch_width(num_subkeys, topk)
    scratch = torch.empty(threads, 10, width, dtype=torch.int32)
    launch(
        _select,
        threads,
        first=first_ABN, first_a=first_ABN.stride(0), first_b=first_ABN.stride(1),
        second=second_ABN, second_a=second_ABN.stride(0), second_b=second_ABN.stride(1),
        scores=scores_ABK, slots=slots_ABK, rows=rows, rows_b=rows_b, num_subkeys=num_subkeys, topk=topk,
        scratch=scratch, width=width, plan=pair_plan(topk), softmax=softmax,
    )  # fmt: skip


@functools.cache
def scratch_width(num_subkeys: int, topk: int) -> int:
    """int32 of a row of scratch: as many as there are sub-keys or pairs, and 64 more."""
    return max((num_subkeys + 63) // 64 * 64, sum(topk // (i + 1) for i in range(topk))) + 64


@functools.cache
def pair_plan(topk: int) -> Tensor:
    """int32: how many corners, then each as (i, j), ranks from 0.

    Of a corner, the pairs of ranks up to i and j are at least K; nothing smaller than a corner has as many.
    """
    corners: list[int] = []
    for i in range(topk):
        j = (topk + i) // (i + 1) - 1
        if not corners or j < corners[-1]:
            corners += [i, j]
    return torch.tensor([len(corners) // 2, *corners], dtype=torch.int32)


@part
def _best_of_half(half, num_subkeys, topk, codes, step, best):
    """The K best codes of the N scores at `half`, best first, at `best`, and where they stand, behind them.

    codes: scratch of ten rows of `step` bytes, as `select` lays it out.
    """
    candidates, ids, ranks = codes + step, codes + 2 * step, codes + 3 * step
    groups = _code(half, num_subkeys, topk, codes, ranks)
    bound = _LOWEST
    if groups > 0:
        bound = _raise_bound(ranks, groups, topk, _least(ranks, groups))
    count = _keep_at_least(bound, codes, 0, num_subkeys, candidates, ids)
    _keep_best(candidates, ids, count, topk, ranks, codes + 8 * step, best, best + step)


@part
def _code(half, num_subkeys, topk, codes, maxima):
    """Codes of the scores, and the maxima of G groups of them; returns G, or 0 for too few scores to be worth it."""
    score, code, maximum = f32(half), i32(codes), i32(maxima)
    groups = (2 * topk + 63) // 64 * 64
    whole = num_subkeys // groups * groups
    if whole < 2 * groups:
        for j in range(num_subkeys):
            code[j] = _ordered(score[j])
        for j in range(num_subkeys, (num_subkeys + 63) // 64 * 64):
            code[j] = _LOWEST
        return 0
    for j in range(groups):
        maximum[j] = _LOWEST
    for start in range(0, whole, groups):
        for group in range(0, groups, 64):
            order_64(half + (start + group) * 4, codes + (start + group) * 4, maxima + group * 4)
    for j in range(whole, num_subkeys):
        code[j] = _ordered(score[j])
        maximum[j - whole] = max(maximum[j - whole], code[j])
    for j in range(num_subkeys, (num_subkeys + 63) // 64 * 64):
        code[j] = _LOWEST
    return groups


@part
def _ordered(score):
    """An int32 in the order of the scores; both zeros are 0, and no score is `_LOWEST`."""
    bits = float_bits(score)
    bits = np.int32(0) if bits == _LOWEST else bits
    return max(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)), np.int32(-(2**31) + 1))


@part
def _score(code):
    return bits_float(code ^ ((code >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@part
def _raise_bound(codes, count, topk, low):
    """A bound of at least `low`, which K codes reach, that at least K reach, and few more.

    count: a multiple of 64.
    """
    code = i32(codes)
    low, high = np.int64(low), np.int64(_LOWEST)
    for j in range(count):
        high = max(high, np.int64(code[j]))
    high += 1
    for _ in range(12):
        middle = low + (high - low) // 2
        bound = np.int32(middle)
        reach = 0
        for block in range(0, count, 64):
            reach += count_bits(mask_at_least_64(codes + block * 4, bound))
        if reach >= topk:
            low = middle
            if reach <= topk + topk // 8:
                break
        else:
            high = middle
    return np.int32(low)


@part
def _least(codes, count):
    code, least = i32(codes), np.int32(2**31 - 1)
    for j in range(count):
        least = min(least, code[j])
    return least


@part
def _keep_best(candidates, ids, count, topk, ranks, packed, best, index):
    """The K best of the candidates, in order; of equal ones the lower id is better."""
    candidate, identity, rank = i32(candidates), i32(ids), i32(ranks)
    chosen, where = i32(best), i32(index)
    if count > _RANKED:
        key = i64(packed)
        for j in range(count):
            # Ascending order of the packed integers is descending order of codes, then ascending of ids.
            key[j] = (~np.int64(candidate[j]) << 32) | np.int64(np.uint32(identity[j]))
        for root in range(count // 2 - 1, -1, -1):
            _sift(key, root, count)
        for j in range(topk):
            chosen[j], where[j] = np.int32(~(key[0] >> 32)), np.int32(key[0] & 0xFFFFFFFF)
            key[0] = key[count - 1 - j]
            _sift(key, 0, count - 1 - j)
        return
    for j in range(count, count + 64):
        candidate[j] = _LOWEST
    total = np.int32(0)
    for block in range(0, count, 64):
        count_greater_64(candidates, count, candidates + block * 4, ranks + block * 4)
    for j in range(count):
        total += rank[j]
    if total != count * (count - 1) // 2:  # some are equal
        for j in range(count):
            for other in range(count):
                is_equal = candidate[other] == candidate[j]
                rank[j] += np.int32(is_equal & (np.uint32(identity[other]) < np.uint32(identity[j])))
    for j in range(count):
        # Those beyond the K-th, too: a branch that nobody can predict costs more.
        chosen[rank[j]] = candidate[j]
        where[rank[j]] = identity[j]


@part
def _sift(key, root, count):
    """Make a heap of `count` integers, the least first, of one in which `root` may be too great."""
    value = key[root]
    while 2 * root + 1 < count:
        child = 2 * root + 1
        if child + 1 < count and key[child + 1] < key[child]:
            child += 1
        if value <= key[child]:
            break
        key[root] = key[child]
        root = child
    key[root] = value


@part
def _best_pairs(best1, best2, num_subkeys, topk, plan, codes, step, scores, slots):
    """The K best sums of the staircase of two sorted halves, at `scores` and `slots`; the halves are used up."""
    candidates, ids, ranks, places = codes + step, codes + 2 * step, codes + 3 * step, codes + 8 * step
    code1, code2, subkey1 = i32(best1), i32(best2), i32(best1 + step)
    score1, score2 = f32(best1), f32(best2)
    for i in range(topk):
        score1[i], score2[i] = _score(code1[i]), _score(code2[i])
        subkey1[i] = np.int32(np.uint32(np.int64(subkey1[i]) * num_subkeys))
    corner = i32(plan)
    pairs = _pair_sums(best1, best2, step, topk, codes, places)
    # The pairs of the i best and the j best are i * j pairs that score at least as much as pair (i, j).
    bound = _LOWEST
    for c in range(corner[0]):
        bound = max(bound, _ordered(score1[corner[1 + 2 * c]] + score2[corner[2 + 2 * c]]))
    bound = _raise_bound(codes, (pairs + 63) // 64 * 64, topk, bound)
    count = _keep_at_least(bound, codes, places, pairs, candidates, ids)
    if count < topk:  # infinities of both signs among the scores: their sums are in no order
        count = _keep_at_least(_LOWEST, codes, places, pairs, candidates, ids)
    _keep_best(candidates, ids, count, topk, ranks, places, best1, best1 + step)
    score, slot_of = f32(scores), i64(slots)
    for j in range(topk):
        score[j] = _score(code1[j])
        slot_of[j] = np.int64(np.uint32(subkey1[j]))


@part
def _pair_sums(best1, best2, step, topk, codes, ids):
    """Codes and ids of the sums of all pairs (i, j) with i * j <= K, ranks from 1; how many. A rest is `_LOWEST`.

    Along the rows of the staircase from its diagonal on, then along its columns, sixteen at a time: what is written
    beyond the end of one is overwritten by the next.
    """
    score1, score2, id1, id2 = f32(best1), f32(best2), i32(best1 + step), i32(best2 + step)
    pairs = 0
    for i in range(topk):
        length = topk // (i + 1)
        if length <= i:
            break
        for j in range(i, length, LANES):
            at = (pairs + j - i) * 4
            store_ordered(codes + at, add(fill(score1[i]), load(best2 + j * 4)))
            store_sums(ids + at, id1[i], best2 + step + j * 4)
        pairs += length - i
        for j in range(i + 1, length, LANES):
            at = (pairs + j - i - 1) * 4
            store_ordered(codes + at, add(fill(score2[i]), load(best1 + j * 4)))
            store_sums(ids + at, id2[i], best1 + step + j * 4)
        pairs += length - i - 1
    for p in range(pairs, (pairs + 63) // 64 * 64):
        i32(codes)[p] = _LOWEST
    return pairs


@part
def _keep_at_least(bound, codes, ids, total, candidates, kept_ids):
    """Copy the codes that reach a bound, and their ids, in order; how many. ids: 0 for the places of the codes."""
    count = 0
    if _COMPRESSES:
        for at in range(0, total, LANES):
            to, to_ids = candidates + count * 4, kept_ids + count * 4
            if ids == 0:
                count += keep_places_16(codes + at * 4, bound, np.int32(at), to, to_ids)
            else:
                count += keep_16(codes + at * 4, bound, ids + at * 4, to, to_ids)
        return min(count, total)  # not what fills the last 16
    code, identity, candidate, kept = i32(codes), i32(ids), i32(candidates), i32(kept_ids)
    for block in range(0, total, 64):
        mask = mask_at_least_64(codes + block * 4, bound)
        while mask != 0:
            where = block + lowest_bit(mask)
            candidate[count] = code[where]
            kept[count] = np.int32(where) if ids == 0 else identity[where]
            count += 1
            mask &= mask - 1
    return min(count, total)


@part_with_a_sum
def _softmax(score, topk):
    """In place; the first score is the greatest."""
    greatest, total = score[0], np.float32(0)
    for j in range(topk):
        score[j] = math.exp(score[j] - greatest)
        total += score[j]
    for j in range(topk):
        score[j] /= total


@shared
def best_slots(first, second, num_subkeys, topk, plan, codes, step, scores, slots, softmax):
    """The K best sums of the N scores at `first` and as many at `second`, best first, at `scores`, and their slots.

    plan: `pair_plan`; codes: scratch, ten rows of `step` bytes: codes; codes, ids and ranks of candidates; both halves'
    best codes and indices; sorting (two). softmax: 1 for that of the sums in their place.
    """
    best1, best2 = codes + 4 * step, codes + 6 * step
    for side in range(2):
        half, best = (first, best1) if side == 0 else (second, best2)
        _best_of_half(half, num_subkeys, topk, codes, step, best)
    _best_pairs(best1, best2, num_subkeys, topk, plan, codes, step, scores, slots)
    if softmax != 0:
        _softmax(f32(scores), topk)


@kernel
def _select(
    counters, first, first_a, first_b, second, second_a, second_b, scores, slots,
    rows, rows_b, num_subkeys, topk, scratch, width, plan, softmax,
):  # fmt: skip
    step = width * 4
    codes = scratch + this_thread(counters) * step * 10
    while True:
        start = next_task(counters) * _ROWS
        if start >= rows:
            return
        for row in range(start, min(rows, start + _ROWS)):
            a, b = row // rows_b, row % rows_b
            best_slots(
                first + (a * first_a + b * first_b) * 4, second + (a * second_a + b * second_b) * 4, num_subkeys, topk,
                plan, codes, step, scores + row * topk * 4, slots + row * topk * 8, softmax,
            )  # fmt: skip
