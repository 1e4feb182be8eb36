"""exported: the operations in PyTorch's own operators, for `torch.export` and for derivatives of any kind.

An exported program runs where this package is not: in onnxruntime, in AOTInductor. So nothing in it is one of our
operations, and nothing depends on how many tokens there are, or on the bits of a float. PyTorch's own operators also
have what ours lack: tangents (`torch.func.jvp`, dual numbers) and rules for `vmap`.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, S slots, K rows a head reads,
P pairs of the staircase, M rows a token reads, V value width, R bytes of codes of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.ops.low_bits import rows_of
from memlayers.ops.precision import widened, without_autocast
from memlayers.ops.registry import compositions
from memlayers.ops.search import for_scores, half_scores, search_backward_reference
from memlayers.ops.select import staircase


def search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """As the operation `search`: scores and slots [T, H, K] of product keys."""
    first_HTN, second_HTN = half_scores(for_scores(query_THQ), for_scores(weight_2HNC))
    scores_HTK, slots_HTK = select(first_HTN, second_HTN, topk)
    return scores_HTK.transpose(0, 1), slots_HTK.transpose(0, 1)


def select(first_N: Tensor, second_N: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """As the operation `select`: scores and slots [..., K] of half scores [..., N]."""
    first_N, second_N = widened(first_N), widened(second_N)
    rank_first_P, rank_second_P = staircase(topk, first_N.device)
    first_P = _best(first_N, topk)[..., rank_first_P]
    second_P = _best(second_N, topk)[..., rank_second_P]
    # In the order of slots, so that the first of equal sums is the lowest. Not by `halves`: ONNX divides in float32.
    slots_P, order_P = (first_P * first_N.shape[-1] + second_P).sort(-1)
    first_P, second_P = first_P.gather(-1, order_P), second_P.gather(-1, order_P)
    scores_P = first_N.gather(-1, first_P) + second_N.gather(-1, second_P)
    place_K = _best(scores_P, topk)
    return scores_P.gather(-1, place_K), slots_P.gather(-1, place_K)


def search_all(query_THQ: Tensor, weight_HSQ: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Scores and slots [T, H, K] of flat keys; holds the scores of all S."""
    scores_HTS = widened(query_THQ).transpose(0, 1) @ widened(weight_HSQ).transpose(-1, -2)
    slots_HTK = _best(scores_HTS, topk)
    return scores_HTS.gather(-1, slots_HTK).transpose(0, 1), slots_HTK.transpose(0, 1)


def read(table_SV: Tensor, slots_TM: Tensor, weights_TM: Tensor, mark_1: Tensor | None = None) -> Tensor:
    """As the operation `read`: y [T, V]; holds the rows [T, M, V]. The mark is left without a gradient."""
    rows_TMV = widened(F.embedding(slots_TM, table_SV))
    with without_autocast(table_SV):
        return (weights_TM.to(rows_TMV.dtype)[:, None] @ rows_TMV).squeeze(1)


def read_row_mode(table_SV: Tensor, slots_TM: Tensor, weights_TM: Tensor, mark_1: Tensor, log: Tensor) -> Tensor:
    """As `read`; no gradient reaches a table that a row optimizer trains, for it could not be recorded."""
    return read(_without_gradient(table_SV), slots_TM, weights_TM)


def _without_gradient(table_SV: Tensor) -> Tensor:
    # A table that is an input of what is differentiated, as by `torch.func.functional_call`, is no parameter there.
    is_trained = isinstance(table_SV, nn.Parameter) and table_SV.requires_grad
    return _NoRowGradient.apply(table_SV) if is_trained else table_SV


class _NoRowGradient(torch.autograd.Function):
    """The identity, whose backward raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table_SV):
        return table_SV.view_as(table_SV)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, tangent_SV):
        return tangent_SV.view_as(tangent_SV)

    @staticmethod
    def backward(ctx, grad_SV):
        raise ValueError(
            "a table in row mode records no row gradients inside of torch.func or for dual numbers: pass its weight as "
            "an input (torch.func.functional_call), or call release() on its optimizer first"
        )


def read_low_bits(
    codes_SR: Tensor, scales_S: Tensor, slots_TM: Tensor, weights_TM: Tensor, width: int, bits: int
) -> Tensor:
    """As the operation `read_low_bits`: y [T, V]; holds the rows [T, M, V]."""
    rows_TMV = rows_of(codes_SR, scales_S, slots_TM, width, bits)
    return (weights_TM.to(rows_TMV.dtype)[..., None] * rows_TMV).sum(1)


def dot_low_bits(codes_SR: Tensor, scales_S: Tensor, slots_TM: Tensor, outputs_TV: Tensor, bits: int) -> Tensor:
    """As the operation `dot_low_bits`: [T, M]; holds the rows [T, M, V]."""
    rows_TMV = rows_of(codes_SR, scales_S, slots_TM, outputs_TV.shape[1], bits)
    return (rows_TMV * outputs_TV.to(rows_TMV.dtype)[:, None]).sum(-1)


def dot(table_SV: Tensor, slots_TM: Tensor, outputs_TV: Tensor, mark_1: Tensor | None = None) -> Tensor:
    """As the operation `dot`: [T, M]; holds the rows [T, M, V]. The mark is left without a gradient."""
    rows_TMV = widened(F.embedding(slots_TM, table_SV))
    with without_autocast(table_SV):
        return (rows_TMV @ outputs_TV.to(rows_TMV.dtype)[..., None]).squeeze(-1)


def dot_row_mode(table_SV: Tensor, slots_TM: Tensor, outputs_TV: Tensor, mark_1: Tensor, log: Tensor) -> Tensor:
    """As `dot`; no gradient reaches a table that a row optimizer trains, for it could not be recorded."""
    return dot(_without_gradient(table_SV), slots_TM, outputs_TV)


def sum_rows(slots_TM: Tensor, weights_TM: Tensor, outputs_TV: Tensor, num_slots: int) -> Tensor:
    """As the operation `sum_rows`: [S, V]; holds T * M rows."""
    outputs_TV = widened(outputs_TV)
    rows_TMV = weights_TM.to(outputs_TV.dtype)[..., None] * outputs_TV[:, None]
    zeros_SV = outputs_TV.new_zeros(num_slots, outputs_TV.shape[-1])
    return zeros_SV.index_add(0, slots_TM.flatten(), rows_TMV.flatten(0, 1))


def _best(scores: Tensor, topk: int) -> Tensor:
    """The places of the K best of the last axis, best first; of equal ones (in float32) the first is the better."""
    if scores.dtype == torch.float64:
        return scores.topk(topk).indices
    # `topk` leaves ties in any order, so score and place are made one number: float64 has room below what tells two
    # float32 numbers apart, 2**-24 of them or, near zero, 2**-149.
    count = scores.shape[-1]
    wide, place = scores.double(), torch.arange(count, device=scores.device)
    return (wide - (wide.abs() * 2.0**-26 + 2.0**-151) * (place / count)).topk(topk).indices


compositions.update(
    search=search,
    search_backward=search_backward_reference,
    select=select,
    read=read,
    read_row_mode=read_row_mode,
    dot=dot,
    dot_row_mode=dot_row_mode,
    read_low_bits=read_low_bits,
    dot_low_bits=dot_low_bits,
    sum_rows=sum_rows,
)
