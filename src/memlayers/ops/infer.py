"""infer: a whole memory layer as one operation, without a backward.

Where there are no gradients to come, steps can share passes over memory. And for the one token of a generating model,
whose weights are not in cache, an operation of PyTorch costs as much as reading a tenth of the query projection.

Letters: T tokens, D model width, H heads, Q query width of a head, F = H * Q features, N sub-keys a codebook,
C = Q / 2, K neighbours, S slots, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.ops import cpu, gpu
from memlayers.ops.precision import wide_dtype
from memlayers.ops.read import read
from memlayers.ops.search import search

# Not a `torch.library.custom_op`, whose wrappers cost more than the arithmetic of one token.
_library = torch.library.Library("memlayers", "FRAGMENT")
_library.define(
    "infer(Tensor x, Tensor projection, Tensor? bias, Tensor mean, Tensor var, Tensor gain, Tensor shift, float eps, "
    "Tensor keys, int topk, Tensor table) -> Tensor"
)
# y [T, V] of a layer with a linear query network and BatchNorm by its running statistics.
infer = torch.ops.memlayers.infer.default


def infer_reference(
    x_TD, projection_FD, bias_F, mean_HQ, var_HQ, gain_HQ, shift_HQ, eps, keys_2HNC, topk, table_SV
) -> Tensor:
    """The layer's own operations."""
    query_TF = F.linear(x_TD, projection_FD, bias_F)
    mean_F, var_F, gain_F, shift_F = (stat_HQ.flatten() for stat_HQ in (mean_HQ, var_HQ, gain_HQ, shift_HQ))
    # In at least the dtype of the statistics, float32, as `MaskedBatchNorm` computes.
    wide_TF = query_TF.to(torch.promote_types(query_TF.dtype, mean_F.dtype))
    gain_F, shift_F = gain_F.to(wide_TF.dtype), shift_F.to(wide_TF.dtype)
    query_TF = F.batch_norm(wide_TF, mean_F, var_F, gain_F, shift_F, eps=eps).to(query_TF.dtype)
    scores_THK, slots_THK = search(query_TF.view(-1, *mean_HQ.shape), keys_2HNC, topk)
    return read(table_SV, slots_THK.flatten(1), scores_THK.softmax(-1).flatten(1))


def _infer_on_cpu(x_TD, *arguments) -> Tensor:
    *rest, topk, table_SV = arguments
    keys_2HNC, num_slots = rest[-1], len(table_SV)
    tensors = [x_TD, *(given for given in rest if isinstance(given, Tensor))]
    is_plain = (
        all(tensor.dtype == torch.float32 for tensor in tensors)
        and table_SV.dtype != torch.float64
        and all(tensor.is_contiguous() for tensor in (*tensors[1:], table_SV))
        and num_slots == keys_2HNC.shape[2] ** 2
        and 1 <= topk <= keys_2HNC.shape[2] <= 2**16
    )
    kernels = cpu.kernels("infer") if is_plain else None
    if kernels is None:
        return infer_reference(x_TD, *arguments)
    return kernels.infer(x_TD.contiguous(), *arguments)


def infer_on_gpu(x_TD: Tensor, *arguments) -> Tensor:
    """By the kernels for few tokens, where they know the dtypes and K; else by those of search and read."""
    kernels = gpu.kernels("infer")
    if kernels is None or not kernels.takes(x_TD, *arguments):
        return infer_reference(x_TD, *arguments)
    return kernels.infer(x_TD, *arguments)


def _fake(x_TD, *arguments) -> Tensor:
    table_SV = arguments[-1]
    return x_TD.new_empty(x_TD.shape[0], table_SV.shape[1], dtype=wide_dtype(table_SV.dtype))


_library.impl("infer", infer_reference, "CompositeExplicitAutograd")
_library.impl("infer", _infer_on_cpu, "CPU")
_library.impl("infer", infer_on_gpu, "CUDA")
torch.library.register_fake("memlayers::infer", _fake, lib=_library)
