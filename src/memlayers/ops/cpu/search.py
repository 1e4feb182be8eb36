"""search on a CPU: key products and selection a block of tokens at a time; gradients from the slots that were found.

Of a token's N half scores only those of its K slots have a gradient, some twelve distinct sub-keys a half at K = 32. So
backward costs a fraction of two dense products with N columns, and not more when there are more keys.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, K neighbours, X = 2 * H halves of
heads (head first), t tokens of a block.
"""

import functools
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from memlayers.ops.cpu import kernels
from memlayers.ops.cpu.compile import kernel, part
from memlayers.ops.cpu.intrinsics import (
    LANES,
    add_scaled,
    f32,
    fail,
    fill,
    i32,
    i64,
    load,
    next_task,
    store,
    this_thread,
)
from memlayers.ops.cpu.launch import launch, threads_for
from memlayers.ops.cpu.processor import has_matrix_units
from memlayers.ops.cpu.select import select_into
from memlayers.ops.search import CPU_BLOCK, token_blocks

_TOKENS = 64  # tokens of a task
_COLUMNS = 64  # columns of the keys' gradient that a task sums


def search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int, *, softmax: bool = False) -> tuple[Tensor, Tensor]:
    """The operation, for all but float64; with `softmax`, that of the K scores in their place.

    Scores are in float32, and so are products but where there are matrix units for bfloat16.
    """
    if torch.float64 in (query_THQ.dtype, weight_2HNC.dtype):
        return NotImplemented
    units = matrix_units()
    if units is not None and units.takes(query_THQ, weight_2HNC):
        return units.search(query_THQ, weight_2HNC, topk, softmax)
    query_THQ, weight_2HNC = query_THQ.float(), weight_2HNC.float()
    num_tokens, heads, _ = query_THQ.shape
    _, _, num_subkeys, half = weight_2HNC.shape
    scores_THK = torch.empty(num_tokens, heads, topk, dtype=torch.float32)
    slots_THK = torch.empty(num_tokens, heads, topk, dtype=torch.int64)
    blocks = token_blocks(num_tokens, weight_2HNC, *CPU_BLOCK)
    products_2HtN = torch.empty(2, heads, blocks[0].stop if blocks else 0, num_subkeys, dtype=torch.float32)
    for tokens in blocks:
        query_tHQ = query_THQ[tokens]
        halves_2HtN = products_2HtN[:, :, : len(query_tHQ)]
        by_half = zip(query_tHQ.unflatten(-1, (2, half)).unbind(2), weight_2HNC, halves_2HtN, strict=True)
        for query_tHC, keys_HNC, out_HtN in by_half:
            torch.bmm(query_tHC.transpose(0, 1), keys_HNC.transpose(1, 2), out=out_HtN)
        first_HtN, second_HtN = halves_2HtN
        found = scores_THK[tokens], slots_THK[tokens]
        select_into(first_HtN.transpose(0, 1), second_HtN.transpose(0, 1), *found, softmax=softmax)
    return scores_THK, slots_THK


@functools.cache
def matrix_units() -> ModuleType | None:
    """The kernels of a processor with matrix units for bfloat16, where this process may use them."""
    return kernels("matrix_units") if has_matrix_units() else None


def search_backward(
    grad_THK: Tensor,
    slots_THK: Tensor,
    query_THQ: Tensor,
    weight_2HNC: Tensor,
    of_query: bool = True,
    of_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """The operation, for all but float64: there is no dense product, so nothing would be gained by 16 bits."""
    if torch.float64 in (query_THQ.dtype, weight_2HNC.dtype):
        return NotImplemented
    dtypes = query_THQ.dtype, weight_2HNC.dtype
    grad_THK, query_THQ, weight_2HNC = (given.float().contiguous() for given in (grad_THK, query_THQ, weight_2HNC))
    slots_THK = slots_THK.contiguous()
    num_tokens, heads, topk = slots_THK.shape
    _, _, num_subkeys, half = weight_2HNC.shape
    grad_query_THQ = torch.empty_like(query_THQ) if of_query else query_THQ.new_empty(0)
    grad_keys_2HNC = torch.empty_like(weight_2HNC) if of_weight else weight_2HNC.new_empty(0)
    # Per half of a head and token: how many distinct sub-keys were found, which, and their gradients.
    count_XT = torch.empty(2 * heads, num_tokens, dtype=torch.int32)
    index_XTK = torch.empty(2 * heads, num_tokens, topk, dtype=torch.int32)
    value_XTK = torch.empty(2 * heads, num_tokens, topk, dtype=torch.float32)
    sizes = {"num_tokens": num_tokens, "heads": heads, "num_subkeys": num_subkeys, "half": half, "topk": topk}
    shared: dict[str, Tensor | int] = {"count": count_XT, "indices": index_XTK, "values": value_XTK, **sizes}
    threads = threads_for(2 * heads * ((num_tokens + _TOKENS - 1) // _TOKENS))
    place = torch.full((threads, num_subkeys), -1, dtype=torch.int32)
    found = {"grads": grad_THK, "slots": slots_THK, "keys": weight_2HNC, "place": place}
    if launch(_query_gradient, threads, **shared, **found, grad_query=grad_query_THQ if of_query else None):
        low, high = int(slots_THK.min()), int(slots_THK.max())
        raise IndexError(f"slots must be in [0, {num_subkeys**2}), got {low} to {high}")
    if of_weight:
        threads = threads_for(2 * heads * ((half + _COLUMNS - 1) // _COLUMNS))
        launch(_keys_gradient, threads, **shared, query=query_THQ, grad_keys=grad_keys_2HNC)
    return grad_query_THQ.to(dtypes[0]), grad_keys_2HNC.to(dtypes[1])


@part
def _distinct(grad, slots, topk, is_second, num_subkeys, place, index, value):
    """Sum the gradients of K slots by sub-key; returns how many there are, or -1 for a slot out of range."""
    count = 0
    for k in range(topk):
        slot = slots[k]
        if slot < 0 or slot >= num_subkeys * num_subkeys:
            return -1
        row = np.uint32(slot) // np.uint32(num_subkeys)
        subkey = np.int64(np.uint32(slot) - row * np.uint32(num_subkeys)) if is_second else np.int64(row)
        if place[subkey] < 0:
            place[subkey] = count
            index[count] = subkey
            value[count] = grad[k]
            count += 1
        else:
            value[place[subkey]] += grad[k]
    for k in range(count):
        place[index[k]] = -1
    return count


@kernel
def _query_gradient(
    counters, keys, grads, slots, grad_query, place, count, indices, values, num_tokens, heads, num_subkeys, half, topk
):
    place_of = i32(place + this_thread(counters) * num_subkeys * 4)
    blocks = (num_tokens + _TOKENS - 1) // _TOKENS
    whole = half // LANES * LANES
    while True:
        task = next_task(counters)
        x, first = task // max(blocks, 1), task % max(blocks, 1) * _TOKENS
        if x >= 2 * heads or blocks == 0:
            return
        head, side = x // 2, x % 2
        codebook = keys + (side * heads + head) * num_subkeys * half * 4
        for token in range(first, min(num_tokens, first + _TOKENS)):
            at = x * num_tokens + token
            index, value = i32(indices + at * topk * 4), f32(values + at * topk * 4)
            found = (token * heads + head) * topk
            distinct = _distinct(
                f32(grads + found * 4), i64(slots + found * 8), topk, side == 1, num_subkeys, place_of, index, value
            )
            if distinct < 0:
                fail(counters)
                return
            i32(count)[at] = distinct
            if grad_query == 0:
                continue
            out = grad_query + ((token * heads + head) * 2 + side) * half * 4
            for v in range(0, whole, LANES):
                lanes = fill(np.float32(0))
                for k in range(distinct):
                    lanes = add_scaled(lanes, value[k], load(codebook + (np.int64(index[k]) * half + v) * 4))
                store(out + v * 4, lanes)
            for v in range(whole, half):
                total = np.float32(0)
                for k in range(distinct):
                    total += value[k] * f32(codebook)[np.int64(index[k]) * half + v]
                f32(out)[v] = total


@kernel
def _keys_gradient(counters, query, grad_keys, count, indices, values, num_tokens, heads, num_subkeys, half, topk):
    blocks = (half + _COLUMNS - 1) // _COLUMNS
    while True:
        task = next_task(counters)
        x, first = task // blocks, task % blocks * _COLUMNS
        if x >= 2 * heads:
            return
        head, side = x // 2, x % 2
        last = min(half, first + _COLUMNS)
        whole = first + (last - first) // LANES * LANES
        codebook = grad_keys + (side * heads + head) * num_subkeys * half * 4
        for subkey in range(num_subkeys):
            for v in range(first, last):
                f32(codebook)[subkey * half + v] = np.float32(0)
        for token in range(num_tokens):
            at = x * num_tokens + token
            index, value = i32(indices + at * topk * 4), f32(values + at * topk * 4)
            distinct = np.int64(i32(count)[at])
            source = query + ((token * heads + head) * 2 + side) * half * 4
            for v in range(first, whole, LANES):
                lanes = load(source + v * 4)
                for k in range(distinct):
                    target = codebook + (np.int64(index[k]) * half + v) * 4
                    store(target, add_scaled(load(target), value[k], lanes))
            for v in range(whole, last):
                for k in range(distinct):
                    f32(codebook)[np.int64(index[k]) * half + v] += value[k] * f32(source)[v]
