"""search of bfloat16 queries and keys, with half scores in float32, on a processor with matrix units (AMX).

PyTorch rounds products of bfloat16 to bfloat16, in which two thirds of the scores near the K-th best are equal. The
units multiply bfloat16 exactly and sum in float32, sixteen times as fast as products of float32. A thread selects from
the half scores of a few tokens while they are in its cache; they are stored nowhere else.

A tile is 16 rows of 64 bytes. Of queries it has 16 tokens and 32 elements of each, which are copied beside each other,
since 4 KB apart they push each other out of the first cache; of keys it has 32 elements, two beside each other, of 16
sub-keys, so keys are laid out anew for each call (`tiles_of`). Two tiles of each make four of sums.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, K neighbours, X = 2 * H halves of
heads (first halves first).
"""

import functools

import numpy as np
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from memlayers.ops.cpu.compile import kernel, lowered, part
from memlayers.ops.cpu.intrinsics import LANES, load, next_task, store, this_thread
from memlayers.ops.cpu.launch import launch, threads_for
from memlayers.ops.cpu.select import best_slots, pair_plan, scratch_width
from memlayers.ops.select import check_topk

_TOKENS = 32  # of two tiles; as many sub-keys
_GROUP = 128  # tokens of a task
_ELEMENTS = 32  # of a query, in a tile
_BYTE, _LINE = ir.IntType(8), ir.PointerType(ir.IntType(8))
# Tiles: sums of first and second tokens with first and second sub-keys, queries, keys.
SUMS, QUERIES, KEYS = 0, 4, 6


def takes(query_THQ: Tensor, weight_2HNC: Tensor) -> bool:
    """Whether `search` knows these."""
    _, _, num_subkeys, half = weight_2HNC.shape
    is_bfloat16 = query_THQ.dtype == weight_2HNC.dtype == torch.bfloat16
    return is_bfloat16 and num_subkeys % _TOKENS == 0 and half % _ELEMENTS == 0


def tiles_of(weight_2HNC: Tensor) -> Tensor:
    """Keys as tiles: [X, N / 16, C / 32, 16, 16], each element two bfloat16."""
    _, _, num_subkeys, half = weight_2HNC.shape
    pairs = weight_2HNC.contiguous().view(torch.int32).view(-1, num_subkeys // 16, 16, half // _ELEMENTS, 16)
    return pairs.permute(0, 1, 3, 4, 2).contiguous()


def search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """The operation; with `softmax`, that of the K scores in their place."""
    query_THQ = query_THQ.contiguous()
    num_tokens, heads, query_dim = query_THQ.shape
    num_subkeys = weight_2HNC.shape[2]
    check_topk(topk, num_subkeys)
    scores_THK = torch.empty(num_tokens, heads, topk, dtype=torch.float32)
    slots_THK = torch.empty(num_tokens, heads, topk, dtype=torch.int64)
    threads = threads_for(heads * -(-num_tokens // _GROUP))
    scratch = scratch_width(num_subkeys, topk)
    launch(
        _search,
        threads,
        query=query_THQ, tiles=tiles_of(weight_2HNC), scores=scores_THK, slots=slots_THK,
        num_tokens=num_tokens, heads=heads, half=query_dim // 2, num_subkeys=num_subkeys, topk=topk,
        plan=pair_plan(topk), softmax=softmax,
        copies=torch.empty(threads, _TOKENS, query_dim // 2, dtype=torch.bfloat16),
        halves=torch.empty(threads, 2, _TOKENS, num_subkeys, dtype=torch.float32),
        scratch=torch.empty(threads, 10, scratch, dtype=torch.int32), width=scratch,
        whole=_configuration(16, 16),
        rest=_configuration(min(16, num_tokens % _TOKENS), num_tokens % _TOKENS - 16),
        before=torch.empty(threads, 64, dtype=torch.uint8),
    )  # fmt: skip
    return scores_THK, slots_THK


@functools.cache
def _configuration(first: int, second: int) -> Tensor:
    """What the units are told of their tiles, for so many tokens in the two tiles of tokens."""
    told = torch.zeros(64, dtype=torch.uint8)
    told[0] = 1
    rows = [first, first, max(second, 1), max(second, 1), first, max(second, 1), 16, 16]
    for tile, count in enumerate(rows):
        told[16 + 2 * tile], told[48 + tile] = 64, max(count, 1)
    return told


def _call(builder, name, values):
    name = f"llvm.x86.{name}"
    function_type = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, function_type, name), values)


def _of_tiles(name, *tiles):
    @lowered(types.void())
    def instruction(builder):
        _call(builder, name, [_BYTE(tile) for tile in tiles])

    return instruction


def _of_memory(name, tile):
    @lowered(types.void(types.int64, types.int64))
    def instruction(builder, address, stride):
        _call(builder, name, [_BYTE(tile), builder.inttoptr(address, _LINE), stride])

    return instruction


def _of_configuration(name):
    @lowered(types.void(types.int64))
    def instruction(builder, address):
        _call(builder, name, [builder.inttoptr(address, _LINE)])

    return instruction


_configure, _store_configuration = _of_configuration("ldtilecfg"), _of_configuration("sttilecfg")
_zero0, _zero1, _zero2, _zero3 = (_of_tiles("tilezero", SUMS + tile) for tile in range(4))
# Sums of first and second tokens (the rows) with first and second sub-keys.
_multiply0, _multiply1, _multiply2, _multiply3 = (
    _of_tiles("tdpbf16ps", SUMS + tile, QUERIES + tile // 2, KEYS + tile % 2) for tile in range(4)
)
_store0, _store1, _store2, _store3 = (_of_memory("tilestored64", SUMS + tile) for tile in range(4))
_load_queries0, _load_queries1 = (_of_memory("tileloadd64", QUERIES + tile) for tile in range(2))
_load_keys0, _load_keys1 = (_of_memory("tileloadd64", KEYS + tile) for tile in range(2))


@part
def _four_tiles(queries, others, row_bytes, tiles, blocks, scores, score_bytes, has_others):
    """Scores of 32 tokens (`others`: the second 16) with 32 sub-keys."""
    _zero0()
    _zero1()
    _zero2()
    _zero3()
    for k in range(blocks):
        _load_queries0(queries + k * 64, row_bytes)
        _load_keys0(tiles + k * 1024, np.int64(64))
        _load_keys1(tiles + (blocks + k) * 1024, np.int64(64))
        _multiply0()
        _load_queries1(others + k * 64, row_bytes)
        _multiply1()
        _multiply2()
        _multiply3()
    _store0(scores, score_bytes)
    _store1(scores + 64, score_bytes)
    if has_others:
        _store2(scores + 16 * score_bytes, score_bytes)
        _store3(scores + 16 * score_bytes + 64, score_bytes)


@kernel
def _search(
    counters, query, tiles, scores, slots, num_tokens, heads, half, num_subkeys, topk, plan, softmax,
    copies, halves, scratch, width, whole, rest, before,
):  # fmt: skip
    groups, blocks, step = (num_tokens + _GROUP - 1) // _GROUP, half // _ELEMENTS, width * 4
    row_bytes, score_bytes, codebook_bytes = half * 2, num_subkeys * 4, num_subkeys * half * 2
    thread = this_thread(counters)
    was, codes = before + thread * 64, scratch + thread * 10 * step
    queries, first = copies + thread * _TOKENS * row_bytes, halves + thread * 2 * _TOKENS * score_bytes
    others = queries + 16 * row_bytes
    second = first + _TOKENS * score_bytes
    _store_configuration(was)  # of whoever else uses the units in this thread, and may rely on it
    while True:
        task = next_task(counters)
        head, start = task // max(groups, 1), task % max(groups, 1) * _GROUP
        if head >= heads or groups == 0:
            break
        for token in range(start, min(num_tokens, start + _GROUP), _TOKENS):
            left = num_tokens - token
            _configure(whole if left >= _TOKENS else rest)
            for side in range(2):
                for t in range(min(left, _TOKENS)):
                    source = query + (((token + t) * heads + head) * 2 + side) * row_bytes
                    for at in range(0, row_bytes, 4 * LANES):
                        store(queries + t * row_bytes + at, load(source + at))
                keys, out = tiles + (side * heads + head) * codebook_bytes, first if side == 0 else second
                for n in range(0, num_subkeys, _TOKENS):
                    keys_n = keys + n * row_bytes
                    _four_tiles(queries, others, row_bytes, keys_n, blocks, out + n * 4, score_bytes, left > 16)
            for t in range(min(left, _TOKENS)):
                found = (token + t) * heads + head
                best_slots(
                    first + t * score_bytes, second + t * score_bytes, num_subkeys, topk, plan, codes, step,
                    scores + found * topk * 4, slots + found * topk * 8, softmax,
                )  # fmt: skip
    _configure(was)
