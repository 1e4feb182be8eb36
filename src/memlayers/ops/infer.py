"""infer: a whole memory layer as one operation, without a backward.

Where there are no gradients to come, steps can share passes over memory. And for the one token of a generating model,
whose weights are not in cache, an operation of PyTorch costs as much as reading a tenth of the query projection.

Letters: T tokens, D model width, H heads, Q query width of a head, F = H * Q features, N sub-keys a codebook,
C = Q / 2, K neighbours, M rows a token, S slots, V value width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops.low_bits import read_low_bits
from memlayers.ops.precision import wide_dtype
from memlayers.ops.read import read
from memlayers.ops.registry import operation
from memlayers.ops.search import search


class Layer(NamedTuple):
    """The arguments of `infer`: tokens, and a layer with a linear query network and BatchNorm by running statistics.

    Projection, bias and keys are multiplied as if they were cast to the dtype of x. A table with `scales` holds the
    codes of `read_low_bits`, of that many `bits` and this `width`.
    """

    x_TD: Tensor
    projection_FD: Tensor
    bias_F: Tensor | None
    mean_HQ: Tensor
    var_HQ: Tensor
    gain_HQ: Tensor
    shift_HQ: Tensor
    eps: float
    keys_2HNC: Tensor
    topk: int
    table_SV: Tensor
    scales_S: Tensor | None = None
    bits: int = 0
    width: int = 0

    @property
    def stats(self) -> tuple[Tensor, ...]:
        """Mean, variance, gain and shift of the features."""
        return self.mean_HQ, self.var_HQ, self.gain_HQ, self.shift_HQ


def infer_reference(layer: Layer) -> Tensor:
    """y [T, V], by the layer's own operations."""
    dtype = layer.x_TD.dtype
    bias_F = None if layer.bias_F is None else layer.bias_F.to(dtype)
    query_TF = F.linear(layer.x_TD, layer.projection_FD.to(dtype), bias_F)
    mean_F, var_F, gain_F, shift_F = (stat_HQ.flatten() for stat_HQ in layer.stats)
    # In at least the dtype of the statistics, float32, as `MaskedBatchNorm` computes.
    wide_TF = query_TF.to(torch.promote_types(query_TF.dtype, mean_F.dtype))
    gain_F, shift_F = gain_F.to(wide_TF.dtype), shift_F.to(wide_TF.dtype)
    query_TF = F.batch_norm(wide_TF, mean_F, var_F, gain_F, shift_F, eps=layer.eps).to(query_TF.dtype)
    scores_THK, slots_THK = search(query_TF.view(-1, *layer.mean_HQ.shape), layer.keys_2HNC.to(dtype), layer.topk)
    return read_rows(layer, slots_THK.flatten(1), scores_THK.softmax(-1).flatten(1))


def read_rows(layer: Layer, slots_TM: Tensor, weights_TM: Tensor) -> Tensor:
    """The read of the layer's table."""
    if layer.scales_S is not None:
        return read_low_bits(layer.table_SV, layer.scales_S, slots_TM, weights_TM, layer.width, layer.bits)
    return read(layer.table_SV, slots_TM, weights_TM)


def _empty(*arguments) -> Tensor:
    layer = Layer(*arguments)
    width = layer.width or layer.table_SV.shape[1]
    return layer.x_TD.new_empty(len(layer.x_TD), width, dtype=wide_dtype(layer.table_SV.dtype))


def _flops(*arguments, **_) -> int:
    layer = Layer(*arguments)  # of shapes
    num_tokens, dim = layer.x_TD
    _, heads, num_subkeys, _ = layer.keys_2HNC
    num_features = layer.projection_FD[0]
    read = heads * layer.topk * (layer.width or layer.table_SV[1])
    return 2 * num_tokens * (dim * num_features + num_features * num_subkeys + read)


infer = operation("infer", infer_reference, _empty, pack=lambda *arguments: (Layer(*arguments),), flops=_flops)
