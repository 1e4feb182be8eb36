"""exported: search and read in PyTorch's own operators, which is what `torch.export` sees of a memory.

An exported program runs where this package is not: in onnxruntime, in AOTInductor. So nothing in it is one of our
operations, and nothing depends on how many tokens there are, or on the bits of a float.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, S slots, K rows a head reads,
P pairs of the staircase, M rows a token reads, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops.precision import widened
from memlayers.ops.search import half_scores
from memlayers.ops.select import staircase


def search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """As the operation `search`: scores and slots [T, H, K] of product keys."""
    first_HTN, second_HTN = widened(half_scores(query_THQ, weight_2HNC))
    num_subkeys = weight_2HNC.shape[2]
    rank_first_P, rank_second_P = staircase(topk, query_THQ.device)
    first_HTP = _best(first_HTN, topk)[..., rank_first_P]
    second_HTP = _best(second_HTN, topk)[..., rank_second_P]
    # In the order of slots, so that the first of equal sums is the lowest. Not by `halves`: ONNX divides in float32.
    slots_HTP, order_HTP = (first_HTP * num_subkeys + second_HTP).sort(-1)
    first_HTP, second_HTP = first_HTP.gather(-1, order_HTP), second_HTP.gather(-1, order_HTP)
    scores_HTP = first_HTN.gather(-1, first_HTP) + second_HTN.gather(-1, second_HTP)
    place_HTK = _best(scores_HTP, topk)
    scores_HTK, slots_HTK = scores_HTP.gather(-1, place_HTK), slots_HTP.gather(-1, place_HTK)
    return scores_HTK.transpose(0, 1), slots_HTK.transpose(0, 1)


def search_all(query_THQ: Tensor, weight_HSQ: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Scores and slots [T, H, K] of flat keys; holds the scores of all S."""
    scores_HTS = widened(query_THQ).transpose(0, 1) @ widened(weight_HSQ).transpose(-1, -2)
    slots_HTK = _best(scores_HTS, topk)
    return scores_HTS.gather(-1, slots_HTK).transpose(0, 1), slots_HTK.transpose(0, 1)


def read(table_SV: Tensor, slots_TM: Tensor, weights_TM: Tensor) -> Tensor:
    """As the operation `read`: y [T, V]; holds the rows [T, M, V]."""
    rows_TMV = widened(F.embedding(slots_TM, table_SV))
    return (weights_TM.to(rows_TMV.dtype)[:, None] @ rows_TMV).squeeze(1)


def _best(scores: Tensor, topk: int) -> Tensor:
    """The places of the K best of the last axis, best first; of equal ones (in float32) the first is the better."""
    if scores.dtype == torch.float64:
        return scores.topk(topk).indices
    # `topk` leaves ties in any order, so score and place are made one number: float64 has room below what tells two
    # float32 numbers apart, 2**-24 of them or, near zero, 2**-149.
    count = scores.shape[-1]
    wide, place = scores.double(), torch.arange(count, device=scores.device)
    return (wide - (wide.abs() * 2.0**-26 + 2.0**-151) * (place / count)).topk(topk).indices
