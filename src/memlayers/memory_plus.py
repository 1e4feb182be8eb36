"""MemoryPlus: a memory whose output is gated by its input.

Letters: T tokens, D model width, V value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.config import MemoryConfig
from memlayers.keys import NormalisedKeys
from memlayers.layer import MemoryLayer
from memlayers.ops.registry import is_transformed
from memlayers.values import TablePlace, ValueTable


class MemoryPlus(MemoryLayer):
    """The memory m: R^D -> R^D of *Memory Layers at Scale* (Berges et al. 2024, arXiv 2412.09764), "Memory+".

        m(x) = W2 (y * silu(W1 x))
        y = sum over heads h of sum over i in I_h of w_hi * v_i
        I_h = the K slots whose keys k_hi have the best cosine with q_h(x)
        w_h = softmax of these K cosines, divided by t_h

    W1 [V, D] and W2 [D, V] are linear maps without biases, * goes entry by entry, silu(z) = z / (1 + exp(-z)).
    q_h is the query network of head h, k_hi its (product) key of slot i, t_h its learned temperature
    (`NormalisedKeys`), v_i the value of slot i, shared by all heads. Padding has an output of zero.

    The paper's layers share one table: pass ``values=first.values`` to the others. The arguments are those of
    `MemoryLayer`.

    Raises:
        ValueError: flat keys; a table of another shape.
    """

    keys: NormalisedKeys

    def __init__(
        self,
        config: MemoryConfig,
        *,
        values: ValueTable | TablePlace | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if config.keys != "product":
            raise ValueError(f"keys must be 'product' for MemoryPlus, got {config.keys!r}")
        super().__init__(config, values=values, device=device, dtype=dtype)
        self.gate = nn.Linear(config.dim, config.width, bias=False, device=device, dtype=dtype)

    def make_keys(self, **where: Any) -> NormalisedKeys:
        config = self.config
        return NormalisedKeys(config.heads, config.num_subkeys, config.query_dim, config.topk, **where)

    def make_output(self, **where: Any) -> nn.Linear:
        """W2 [D, V], also where values are as wide as the model."""
        return nn.Linear(self.config.width, self.config.dim, bias=False, **where)

    def combine(self, y_TV: Tensor, x_TD: Tensor) -> Tensor:
        gate_TV = self.gate(x_TD)
        # The gradient of PyTorch's silu has no tangent.
        silu_TV = gate_TV * gate_TV.sigmoid() if is_transformed(gate_TV) else F.silu(gate_TV)
        return self.output(y_TV * silu_TV)
