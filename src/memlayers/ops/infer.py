"""infer: a whole memory layer as one operation, without a backward.

Where there are no gradients to come, steps can share passes over memory. And for the one token of a generating model,
whose weights are not in cache, an operation of PyTorch costs as much as reading a tenth of the query projection.

Letters: T tokens, D model width, H heads, Q query width of a head, F = H * Q features, N sub-keys a codebook,
C = Q / 2, K neighbours, S slots, V value width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops.precision import wide_dtype
from memlayers.ops.read import read
from memlayers.ops.registry import operation
from memlayers.ops.search import search


class Layer(NamedTuple):
    """The arguments of `infer`: tokens, and a layer with a linear query network and BatchNorm by running statistics.

    Projection, bias and keys are multiplied as if they were cast to the dtype of x.
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
    return read(layer.table_SV, slots_THK.flatten(1), scores_THK.softmax(-1).flatten(1))


def _empty(x_TD, *arguments) -> Tensor:
    table_SV = arguments[-1]
    return x_TD.new_empty(x_TD.shape[0], table_SV.shape[1], dtype=wide_dtype(table_SV.dtype))


def _flops(*arguments, **_) -> int:
    layer = Layer(*arguments)  # of shapes
    num_tokens, dim = layer.x_TD
    _, heads, num_subkeys, _ = layer.keys_2HNC
    num_features = layer.projection_FD[0]
    read = heads * layer.topk * layer.table_SV[1]
    return 2 * num_tokens * (dim * num_features + num_features * num_subkeys + read)


infer = operation("infer", infer_reference, _empty, pack=lambda *arguments: (Layer(*arguments),), flops=_flops)
