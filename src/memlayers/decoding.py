"""When a memory layer is run as one operation (`memlayers.ops.decode`).

Letters: T tokens, D model width, V value width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memlayers.keys import ProductKeys
from memlayers.ops.decode import FEW_TOKENS, decode
from memlayers.query import MaskedBatchNorm, QueryNetwork
from memlayers.values import ValueTable

if TYPE_CHECKING:
    from memlayers.layer import MemoryLayer

# What the operation does the work of. A module of another class, a wrapped or a reparametrised one included, is called.
_PARTS = (QueryNetwork, nn.Linear, MaskedBatchNorm, ProductKeys, ValueTable)


def try_decode(layer: "MemoryLayer", x_TD: Tensor) -> Tensor | None:
    """y [T, V] for a few tokens, in inference in float32, of the paper's layer with nobody who listens to its parts.

    None otherwise: then the parts are to be called.
    """
    if x_TD.shape[0] > FEW_TOKENS or torch.is_grad_enabled() or layer.training or x_TD.dtype != torch.float32:
        return None
    query, keys, values = layer.query, layer.keys, layer.values
    norm, projections = query.norm, query.projections
    projection = projections[0]
    for part, kind in zip((query, projection, norm, keys, values), _PARTS, strict=True):
        if type(part) is not kind or part._forward_hooks or part._forward_pre_hooks:
            return None
    weight, table = projection.weight, values.weight
    is_plain = weight.dtype == keys.weight.dtype == table.dtype == torch.float32 and table.device.type == "cpu"
    if not is_plain or len(projections) > 1 or torch.is_autocast_enabled("cpu"):
        return None
    stats = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return decode(x_TD, weight, projection.bias, *stats, norm.eps, keys.weight, keys.topk, table)
