"""infer on a CPU. For the few tokens that generation has at a time: query, key products, selection and softmax, and the
read in one kernel, which reads the weights at the speed of memory, with nothing in between.

Its tasks are taken in the order of these phases, and one of a later phase waits until all of the earlier ones are done.
A task that somebody waits for is always in work already, so however many threads there are, none waits for ever.

Letters: see `memlayers.ops.infer`; M = H * K.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops.cpu.compile import kernel, part
from memlayers.ops.cpu.intrinsics import f32, i64, next_task, task_done, tasks_done
from memlayers.ops.cpu.launch import launch, threads_for
from memlayers.ops.cpu.low_bits import add_low_rows, scale_weights, takes, whole_width
from memlayers.ops.cpu.products import ROUNDED, ROWS, nearest_bfloat16, products
from memlayers.ops.cpu.read import BFLOAT16, FLOAT32, KINDS, add_rows
from memlayers.ops.cpu.search import matrix_units, search
from memlayers.ops.cpu.select import best_slots, pair_plan, scratch_width
from memlayers.ops.infer import Layer, read_rows

FEW_TOKENS = 4  # up to which reading the weights is what costs

_COLUMNS = 128  # columns of a row that a task reads
_SIDE_BY_SIDE = 16  # rows read side by side


def infer(layer: Layer) -> Tensor:
    """The operation, for what is contiguous, and but for the table float32 or bfloat16.

    Beside x in bfloat16 weights may be in float32, as under autocast, and count as if they were cast. Of a few tokens
    they are rounded where they are read. Many are left to the reference where there are no matrix units.
    """
    if not _takes(layer):
        return NotImplemented
    if len(layer.x_TD) <= FEW_TOKENS:
        return _decode(layer)
    if layer.x_TD.dtype == torch.bfloat16:
        return NotImplemented if matrix_units() is None else _prefill_bfloat16(layer)
    # BatchNorm and the bias of the projection are one pass over the query, in its place.
    scale_HQ = torch.rsqrt(layer.var_HQ + layer.eps).mul_(layer.gain_HQ)
    offset_HQ = layer.shift_HQ - layer.mean_HQ * scale_HQ
    if layer.bias_F is not None:
        offset_HQ.addcmul_(layer.bias_F.view_as(scale_HQ), scale_HQ)
    query_THQ = torch.mm(layer.x_TD, layer.projection_FD.t()).view(-1, *scale_HQ.shape)
    torch.addcmul(offset_HQ, query_THQ, scale_HQ, out=query_THQ)
    weights_THK, slots_THK = search(query_THQ, layer.keys_2HNC, layer.topk, softmax=True)
    return read_rows(layer, slots_THK.flatten(1), weights_THK.flatten(1))


def _prefill_bfloat16(layer: Layer) -> Tensor:
    bias_F = None if layer.bias_F is None else layer.bias_F.bfloat16()
    query_TF = F.linear(layer.x_TD, layer.projection_FD.bfloat16(), bias_F)
    # Normalised in float32 in one pass, which leaves the query in bfloat16, as the layer's parts do.
    mean_F, var_F, gain_F, shift_F = (stat_HQ.flatten().float() for stat_HQ in layer.stats)
    query_TF = F.batch_norm(query_TF, mean_F, var_F, gain_F, shift_F, eps=layer.eps)
    query_THQ = query_TF.view(-1, *layer.mean_HQ.shape)
    weights_THK, slots_THK = search(query_THQ, layer.keys_2HNC.bfloat16(), layer.topk, softmax=True)
    return read_rows(layer, slots_THK.flatten(1), weights_THK.flatten(1))


def _takes(layer: Layer) -> bool:
    given = [one for one in layer if isinstance(one, Tensor)]
    factors = layer.projection_FD, layer.keys_2HNC, *(() if layer.bias_F is None else (layer.bias_F,))
    num_subkeys, dtype = layer.keys_2HNC.shape[2], layer.x_TD.dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and layer.keys_2HNC.dtype in (dtype, torch.float32)
        and all(factor.dtype == layer.keys_2HNC.dtype for factor in factors)
        and all(stat_HQ.dtype in (dtype, torch.float32) for stat_HQ in layer.stats)
        and (
            layer.table_SV.dtype in KINDS if layer.scales_S is None else takes(layer.table_SV, layer.width, layer.bits)
        )
        and all(tensor.is_contiguous() for tensor in given[1:])
        and len(layer.table_SV) == num_subkeys**2
        and 1 <= layer.topk <= num_subkeys <= 2**16
    )


def _decode(layer: Layer) -> Tensor:
    kind = KINDS[layer.x_TD.dtype]
    if kind != FLOAT32:
        kind = BFLOAT16 if layer.keys_2HNC.dtype == torch.bfloat16 else ROUNDED
        bias_F = None if layer.bias_F is None else layer.bias_F.bfloat16().float()
        mean_HQ, var_HQ, gain_HQ, shift_HQ = (stat_HQ.float() for stat_HQ in layer.stats)
        layer = layer._replace(
            x_TD=layer.x_TD.float(), bias_F=bias_F, mean_HQ=mean_HQ, var_HQ=var_HQ, gain_HQ=gain_HQ, shift_HQ=shift_HQ
        )
    x_TD, keys_2HNC, table_SV, topk = layer.x_TD.contiguous(), layer.keys_2HNC, layer.table_SV, layer.topk
    tokens, dim = x_TD.shape
    _, heads, num_subkeys, half = keys_2HNC.shape
    features = 2 * heads * half
    width = whole_width(table_SV, layer.bits) if layer.bits else table_SV.shape[1]
    scratch = scratch_width(num_subkeys, topk)
    # Query, half scores, weights, and slots behind them; then what each selection needs.
    sizes = features * tokens, 2 * heads * num_subkeys * tokens, heads * topk * tokens
    memory = torch.empty(sum(sizes) + 2 * sizes[2] + tokens * heads * 10 * scratch + 2, dtype=torch.float32)
    y_TV = torch.empty(tokens, width, dtype=torch.float32)
    launch(
        _decode_kernel,
        threads_for(1 << 30),
        factor_kind=kind,
        x=x_TD, projection=layer.projection_FD, bias=layer.bias_F,
        means=layer.mean_HQ, variances=layer.var_HQ, gains=layer.gain_HQ, shifts=layer.shift_HQ, eps=layer.eps,
        keys=keys_2HNC, table=table_SV, scales=layer.scales_S, bits=layer.bits,
        kind=KINDS.get(table_SV.dtype, FLOAT32), row_bytes=table_SV.shape[1], y=y_TV,
        tokens=tokens, dim=dim, heads=heads, num_subkeys=num_subkeys, half=half, topk=topk, width=width,
        memory=memory, scratch=scratch, plan=pair_plan(topk),
    )  # fmt: skip
    return y_TV[:, : layer.width].contiguous() if layer.bits else y_TV


@part
def _wait_for(counters, tasks):
    while tasks_done(counters) < tasks:
        pass


@kernel
def _decode_kernel(
    counters, factor_kind, x, projection, bias, means, variances, gains, shifts, eps: float, keys, table, scales,
    bits, kind, row_bytes, y, tokens, dim, heads, num_subkeys, half, topk, width, memory, scratch, plan,
):  # fmt: skip
    step, eps_32, features = scratch * 4, np.float32(eps), 2 * heads * half
    query, halves = memory, memory + features * tokens * 4
    weights = halves + 2 * heads * num_subkeys * tokens * 4
    slots = (weights + heads * topk * tokens * 4 + 7) // 8 * 8
    selections = slots + heads * topk * tokens * 8
    # The first task of each phase.
    key_blocks, column_blocks = (num_subkeys + ROWS - 1) // ROWS, (width + _COLUMNS - 1) // _COLUMNS
    first_keys = (features + ROWS - 1) // ROWS
    first_select = first_keys + 2 * heads * key_blocks
    first_read = first_select + tokens * heads
    end = first_read + tokens * column_blocks
    while True:
        task = next_task(counters)
        if task >= end:
            return
        if task < first_keys:
            first, last = task * ROWS, min(features, (task + 1) * ROWS)
            products(projection, x, bias, query, first, last, features, dim, tokens, dim, factor_kind)
            for t in range(tokens):
                out = f32(query + t * features * 4)
                for f in range(first, last):
                    scale = f32(gains)[f] / np.sqrt(f32(variances)[f] + eps_32)
                    value = out[f] if factor_kind == FLOAT32 else nearest_bfloat16(out[f])
                    value = (value - f32(means)[f]) * scale + f32(shifts)[f]
                    out[f] = value if factor_kind == FLOAT32 else nearest_bfloat16(value)
        elif task < first_select:
            _wait_for(counters, first_keys)
            x_half, first = (task - first_keys) // key_blocks, (task - first_keys) % key_blocks * ROWS
            side, head = x_half // heads, x_half % heads
            products(
                keys + x_half * num_subkeys * half * (2 if factor_kind == BFLOAT16 else 4),
                query + (head * 2 + side) * half * 4,
                0,
                halves + x_half * tokens * num_subkeys * 4,
                first,
                min(num_subkeys, first + ROWS),
                num_subkeys,
                half,
                tokens,
                features,
                factor_kind,
            )
        elif task < first_read:
            _wait_for(counters, first_select)
            token, head = (task - first_select) // heads, (task - first_select) % heads
            codes = selections + (task - first_select) * 10 * step
            out, row = (token * heads + head) * topk, halves + (head * tokens + token) * num_subkeys * 4
            best_slots(
                row, row + heads * tokens * num_subkeys * 4, num_subkeys, topk, plan, codes, step, weights + out * 4,
                slots + out * 8, 1,
            )  # fmt: skip
            if bits > 0:
                scale_weights(f32(scales), i64(slots), f32(weights), f32(weights), out, out + topk)
        else:
            _wait_for(counters, first_read)
            token, first = (task - first_read) // column_blocks, (task - first_read) % column_blocks * _COLUMNS
            last, out = min(width, first + _COLUMNS), y + token * width * 4
            for v in range(first, last):
                f32(out)[v] = np.float32(0)
            known = (token + 1) * heads * topk
            for k in range(token * heads * topk, known, _SIDE_BY_SIDE):
                stop = min(k + _SIDE_BY_SIDE, known)
                if bits > 0:
                    add_low_rows(table, i64(slots), f32(weights), k, stop, known, out, first, last, row_bytes, bits)
                else:
                    add_rows(table, i64(slots), f32(weights), k, stop, known, out, first, last, width, kind)
        task_done(counters)
