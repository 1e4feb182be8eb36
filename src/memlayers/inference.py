"""When a memory layer is run as one operation (`memlayers.ops.infer`).

Letters: T tokens, D model width, V value width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from memlayers.keys import ProductKeys
from memlayers.ops.infer import infer
from memlayers.query import MaskedBatchNorm, QueryNetwork
from memlayers.values import ValueTable

if TYPE_CHECKING:
    from memlayers.layer import MemoryLayer

# What the operation does the work of. A module of another class, a wrapped or a reparametrised one included, is called.
_PARTS = (QueryNetwork, nn.Linear, MaskedBatchNorm, ProductKeys, ValueTable)


def try_infer(layer: "MemoryLayer", x_TD: Tensor) -> Tensor | None:
    """y [T, V], without gradients and in float32, of the paper's layer with nobody who listens to its parts.

    A subclass has it, too, where it differs in `combine` alone. None otherwise: then the parts are to be called.
    """
    if torch.is_grad_enabled() or layer.training or x_TD.dtype != torch.float32 or x_TD.device.type != "cpu":
        return None
    if _global_forward_hooks or _global_forward_pre_hooks or torch.is_autocast_enabled("cpu"):
        return None
    query, keys, values = layer.query, layer.keys, layer.values
    norm, projections = query.norm, query.projections
    projection = projections[0]
    for part, kind in zip((query, projection, norm, keys, values), _PARTS, strict=True):
        # Hooks, or a forward of its own: `accelerate` gives modules one where it moves their weights.
        if type(part) is not kind or part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
            return None
    if len(projections) > 1 or norm.training or not layer.reads_plainly():
        return None
    stats = norm.running_mean, norm.running_var, norm.weight, norm.bias
    arguments = (projection.weight, projection.bias, *stats, norm.eps, keys.weight, keys.topk, values.weight)
    for tensor in arguments:
        # A tensor of another class (a quantised weight, say) knows what to do with the operations of a module only.
        if isinstance(tensor, Tensor) and type(tensor) not in (Tensor, nn.Parameter):
            return None
    return infer(x_TD, *arguments)
