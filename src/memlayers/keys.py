"""ProductKeys, NormalisedKeys and FlatKeys: from a query to the K best slots of each head, exactly.

Letters: T tokens, H heads, Q query width of a head, N sub-keys a codebook, S slots, K neighbours, C keys of a block,
... any leading shape.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.ops import wide_dtype, widened, without_autocast
from memlayers.ops.read import dot
from memlayers.ops.search import search
from memlayers.ops.select import best


class Hits(NamedTuple):
    """What a search found, best first."""

    scores: Tensor  # [..., H, K], descending, differentiable, at least float32
    slots: Tensor  # [..., H, K], int64


class ProductKeys(nn.Module):
    """Two codebooks of N sub-keys a head; the key of slot i * N + j is (first[i], second[j]) (paper, section 3.2).

    score(i, j) = <query[:Q/2], first[i]> + <query[Q/2:], second[j]>. The K best of all N * N sums are found exactly,
    from the K best of each half; equal sums go to the lower slot.
    """

    def __init__(
        self,
        heads: int,
        num_subkeys: int,
        query_dim: int,
        topk: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.topk = topk
        self.weight = nn.Parameter(torch.empty(2, heads, num_subkeys, query_dim // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(Q/2), each half and head its own draw."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, query: Tensor) -> Hits:
        """query: [..., H, Q] -> Hits of shape [..., H, K]."""
        scores_THK, slots_THK = search(*self.factors(query.reshape(-1, *query.shape[-2:])), self.topk)
        shape = (*query.shape[:-1], self.topk)
        return Hits(scores_THK.view(shape), slots_THK.view(shape))

    def factors(self, query_THQ: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and the sub-keys whose products are the scores, in one dtype."""
        # The query comes in 16 bits out of autocast; the products are computed in its dtype.
        return query_THQ, self.weight.to(query_THQ.dtype)

    def extra_repr(self) -> str:
        _, heads, num_subkeys, half = self.weight.shape
        return f"heads={heads}, num_subkeys={num_subkeys}, query_dim={2 * half}, topk={self.topk}"


class NormalisedKeys(ProductKeys):
    """Product keys whose scores are cosines over a learned temperature, whatever the norms of queries and keys.

    That is, norms from 1e-3 (`least_norm`: a vector that is shorter is divided by it, so that its scores are smaller)
    to 1e19, above which squares overflow in float32.

    score(i, j) = <q, k_ij> / temperature, with q = query / |query| and
    k_ij = (first[i] / |first[i]|, second[j] / |second[j]|) / sqrt(2), so that |q| = |k_ij| = 1

    One temperature a head, exp(log_temperature), 1/sqrt(Q) at the start: then scores of random queries have a standard
    deviation of 1. The search is that of `ProductKeys`, exact, in at least float32.
    """

    # A norm below it counts as this: near zero, directions are noise, and their gradient is without bound.
    least_norm = 1e-3

    def __init__(
        self,
        heads: int,
        num_subkeys: int,
        query_dim: int,
        topk: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(heads, num_subkeys, query_dim, topk, device=device, dtype=dtype)
        self.log_temperature = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self._reset_temperature()

    def reset_parameters(self) -> None:
        """Sub-keys as those of `ProductKeys`, temperatures to 1/sqrt(Q)."""
        super().reset_parameters()
        if "log_temperature" in self._parameters:  # not yet, where the constructor of ProductKeys calls
            self._reset_temperature()

    def _reset_temperature(self) -> None:
        nn.init.constant_(self.log_temperature, -0.5 * math.log(2 * self.weight.shape[-1]))

    def factors(self, query_THQ: Tensor) -> tuple[Tensor, Tensor]:
        """Unit queries over the temperature, which is positive: the order of scores is that of cosines; unit keys."""
        dtype = wide_dtype(query_THQ.dtype)
        query_THQ = self._unit(query_THQ.to(dtype)) * torch.exp(-self.log_temperature.to(dtype))[:, None]
        return query_THQ, self._unit(self.weight.to(dtype)) / math.sqrt(2)

    def _unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1, eps=self.least_norm)


class FlatKeys(nn.Module):
    """S keys a head, all of them searched (paper, section 3.1): what product keys are compared with.

    Cost O(S * Q). Scores are computed for a block of queries and a block of keys at a time and never held for all S.
    """

    BLOCK = 2**22  # scores held at once: 16 MB in float32

    def __init__(
        self,
        heads: int,
        slots: int,
        query_dim: int,
        topk: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.topk = topk
        self.weight = nn.Parameter(torch.empty(heads, slots, query_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(Q)."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, query: Tensor) -> Hits:
        """query: [..., H, Q] -> Hits of shape [..., H, K]."""
        heads, slots, query_dim = self.weight.shape
        query_THQ = query.reshape(-1, heads, query_dim)
        slots_THK = self._search(query_THQ)
        # One table of H * S keys, so that all heads are scored in one call.
        rows_THK = slots_THK + torch.arange(heads, device=query.device)[:, None] * slots
        scores = dot(self.weight.flatten(0, 1), rows_THK.flatten(0, 1), query_THQ.flatten(0, 1))
        # Rescored in another order of operations than searched, so near-ties may have changed places.
        scores_THK, order_THK = scores.view_as(rows_THK).sort(dim=-1, descending=True, stable=True)
        shape = (*query.shape[:-1], self.topk)
        return Hits(scores_THK.view(shape), slots_THK.gather(-1, order_THK).view(shape))

    @torch.no_grad()
    def _search(self, query_THQ: Tensor) -> Tensor:
        # Searched as exactly as scored, whatever a surrounding autocast says.
        with without_autocast(query_THQ):
            return self._search_blocks(widened(query_THQ))

    def _search_blocks(self, query_THQ: Tensor) -> Tensor:
        heads, slots, _ = self.weight.shape
        keys_per_block = min(slots, max(self.topk, 2**14))
        queries_per_block = max(1, self.BLOCK // (heads * keys_per_block))
        found = [self._search_block(block, keys_per_block) for block in query_THQ.split(queries_per_block)]
        return torch.cat(found) if found else query_THQ.new_empty(0, heads, self.topk, dtype=torch.int64)

    def _search_block(self, query_THQ: Tensor, keys_per_block: int) -> Tensor:
        query_HTQ = query_THQ.transpose(0, 1)
        scores_HTK: Tensor | None = None
        slots_HTK: Tensor | None = None
        for start in range(0, self.weight.shape[1], keys_per_block):
            keys_HCQ = self.weight[:, start : start + keys_per_block]
            scores_HTC = query_HTQ @ keys_HCQ.to(query_HTQ.dtype).transpose(-1, -2)
            slots_HTC = torch.arange(start, start + scores_HTC.shape[-1], device=query_HTQ.device).expand_as(scores_HTC)
            if scores_HTK is not None and slots_HTK is not None:
                scores_HTC = torch.cat([scores_HTK, scores_HTC], -1)
                slots_HTC = torch.cat([slots_HTK, slots_HTC], -1)
            # Among equal scores an earlier place is a lower slot: blocks come in order, and so do ties among the best.
            place_HTK = best(scores_HTC, torch.arange(scores_HTC.shape[-1], device=query_HTQ.device), self.topk)
            scores_HTK, slots_HTK = scores_HTC.gather(-1, place_HTK), slots_HTC.gather(-1, place_HTK)
        assert slots_HTK is not None
        return slots_HTK.transpose(0, 1)

    def extra_repr(self) -> str:
        heads, slots, query_dim = self.weight.shape
        return f"heads={heads}, slots={slots}, query_dim={query_dim}, topk={self.topk}"
