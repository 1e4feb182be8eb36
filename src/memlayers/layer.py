"""MemoryLayer: query, search, read, output.

Letters: T tokens, D model width, H heads, Q query width of a head, K neighbours, S slots, V value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.config import MemoryConfig
from memlayers.inference import try_infer
from memlayers.keys import FlatKeys, ProductKeys
from memlayers.query import QueryNetwork
from memlayers.values import ValueTable


class MemoryLayer(nn.Module):
    """A large memory m: R^D -> R^D in place of a feed-forward network (Lample et al. 2019, arXiv 1907.05242).

        m(x) = sum over heads h of sum over i in I_h of w_hi * v_i
        I_h = the K slots whose keys k_hi score <q_h(x), k_hi> best, w_h = softmax of these K scores

    q_h is the query network of head h, k_hi its key of slot i, v_i the value of slot i, shared by all heads. With
    product keys the search is exact and costs O(sqrt(S)); a token reads H * K of the S rows. A `value_dim` that
    differs from `dim` adds an output projection.

    `values` shares the table of another layer; it must have ``config.slots`` rows of width ``config.width``.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        values: ValueTable | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        where: Any = {"device": device, "dtype": dtype}
        self.query = QueryNetwork(config, **where)
        self.keys: ProductKeys | FlatKeys
        if config.keys == "product":
            self.keys = ProductKeys(config.heads, config.num_subkeys, config.query_dim, config.topk, **where)
        else:
            self.keys = FlatKeys(config.heads, config.slots, config.query_dim, config.topk, **where)
        if values is not None and values.weight.shape != (config.slots, config.width):
            raise ValueError(
                f"values must be a table of {config.slots} slots of width {config.width}, "
                f"got {' x '.join(map(str, values.weight.shape))}"
            )
        self.owns_values = values is None
        self.values = ValueTable(config.slots, config.width, **where) if values is None else values
        self.output = (
            nn.Identity() if config.width == config.dim else nn.Linear(config.width, config.dim, bias=False, **where)
        )
        # The real tokens of the call in progress, [B, T]: set by a model around its call, for blocks that call
        # `self.mlp(hidden)` and so cannot pass a mask.
        self.mask: Tensor | None = None

    def reset_parameters(self) -> None:
        """Initialise as the paper's authors do; a table passed in is left to the layer that made it."""
        self.query.reset_parameters()
        self.keys.reset_parameters()
        if self.owns_values:
            self.values.reset_parameters()
        if isinstance(self.output, nn.Linear):
            self.output.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [..., D] -> [..., D], any leading shape.

        mask: True or 1 for real tokens, of the leading shape; padding reads nothing (its output is zero), and is left
        out of BatchNorm and of usage. None takes the mask that the model handed over, if any. Raises `ValueError` for a
        shape that does not fit.
        """
        config = self.config
        if x.shape[-1] != config.dim:
            raise ValueError(f"x must have dim = {config.dim} as its last size, got {[*x.shape]}")
        mask_T = self.token_mask(x, mask)
        x_TD = x.reshape(-1, config.dim)
        if mask_T is not None:  # selected, not multiplied: whatever padding holds, NaN included, must not come through
            x_TD = torch.where(mask_T[:, None], x_TD, 0)
        if (y_TV := try_infer(self, x_TD)) is not None:
            if mask_T is not None:
                y_TV = torch.where(mask_T[:, None], y_TV, 0)
            return self.output(y_TV.to(x.dtype)).view(x.shape)
        x_TD = F.dropout(x_TD, config.input_dropout, self.training)
        query_THQ = F.dropout(self.query(x_TD, mask_T), config.query_dropout, self.training)
        scores_THK, slots_THK = self.keys(query_THQ)
        weights_THK = scores_THK.softmax(-1)
        if mask_T is not None:  # padding reads nothing, so that it trains no row
            weights_THK = torch.where(mask_T[:, None, None], weights_THK, 0)
        y_TV = self.values.read(slots_THK.flatten(1), weights_THK.flatten(1))
        y_TV = F.dropout(y_TV, config.value_dropout, self.training)
        return self.output(y_TV.to(x.dtype)).view(x.shape)

    def token_mask(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The mask [T] (bool) that a call with these arguments uses, or None: all tokens are real."""
        if mask is None:
            mask = self.mask
            fits = mask is None or mask.numel() == x.shape[:-1].numel()  # the block may have flattened its tokens
        else:
            fits = mask.shape == x.shape[:-1]
        if mask is None:
            return None
        if not fits:
            raise ValueError(f"mask must have the leading shape of x, {[*x.shape[:-1]]}, got {[*mask.shape]}")
        return mask.reshape(-1).to(torch.bool)

    def extra_repr(self) -> str:
        return f"slots={self.config.slots}, heads={self.config.heads}, topk={self.config.topk}"
