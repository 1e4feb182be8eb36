"""ProductKeys, NormalisedKeys and FlatKeys: from a query to the K best slots of each head, exactly.

Letters: T tokens, H heads, Q query width of a head, N sub-keys a codebook, S slots, K rows a head reads, C keys of a
block, ... any leading shape.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.ops import exported, wide_dtype, widened, without_autocast
from memlayers.ops.read import dot
from memlayers.ops.registry import is_transformed
from memlayers.ops.search import search
from memlayers.ops.select import best
from memlayers.torch_private import is_exporting


class Hits(NamedTuple):
    """What a search returns, best first."""

    scores: Tensor  # [..., H, K], descending, differentiable, at least float32
    slots: Tensor  # [..., H, K], int64


class ProductKeys(nn.Module):
    """Two codebooks of N sub-keys a head; the key of slot i * N + j is (first[i], second[j]) (paper, section 3.2).

        score(i, j) = <query[:Q/2], first[i]> + <query[Q/2:], second[j]>

    The search finds the K best of all N * N sums exactly, from the K best of each half; of equal sums it takes the
    lower slot.

    Args:
        heads: H, each with its own codebooks.
        num_subkeys: N, sub-keys per codebook.
        query_dim: Q, width of the query of one head; even.
        topk: K, slots found per head.
        device: of the sub-keys.
        dtype: of the sub-keys.
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
        searched = exported.search if is_exporting() else search
        scores_THK, slots_THK = searched(*self.factors(query.reshape(-1, *query.shape[-2:])), self.topk)
        shape = (*query.shape[:-1], self.topk)
        return Hits(scores_THK.reshape(shape), slots_THK.reshape(shape))

    def factors(self, query_THQ: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and the sub-keys whose products are the scores, in one dtype: that of the query.

        Under autocast the query has 16 bits.
        """
        return query_THQ, self.weight.to(query_THQ.dtype)

    def extra_repr(self) -> str:
        _, heads, num_subkeys, half = self.weight.shape
        return f"heads={heads}, num_subkeys={num_subkeys}, query_dim={2 * half}, topk={self.topk}"


class NormalisedKeys(ProductKeys):
    """Product keys whose scores are cosines over a learned temperature; norms of queries and keys do not count.

        score(i, j) = <q, k_ij> / temperature        q = query / |query|
        k_ij = (first[i] / |first[i]|, second[j] / |second[j]|) / sqrt(2)        so |q| = |k_ij| = 1

    Each head has one temperature, exp(log_temperature). It starts at 1/sqrt(Q), where scores of random queries have a
    standard deviation of 1. The search is that of `ProductKeys`, exact, in at least float32; so are the arguments.

    A vector shorter than `least_norm` is divided by that instead, so its scores are smaller. In float32, squares of
    norms above 1e19 overflow.
    """

    least_norm = 1e-3  # near zero, directions are noise, and their gradient is without bound

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
        if "log_temperature" in self._parameters:  # not yet, when the constructor of ProductKeys calls
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

    A query costs O(S * Q). Scores are computed for a block of queries and a block of keys at a time, of which the
    greatest of each group of neighbours is kept; those of the K best groups are computed once more.

    Args:
        heads: H, each with its own keys.
        slots: S, keys per head.
        query_dim: Q, width of the query of one head.
        topk: K, slots found per head.
        device: of the keys.
        dtype: of the keys.
    """

    BLOCK = 2**20  # scores held at once: 4 MB in float32, which a cache holds
    KEYS = 2**12  # of a block; of a few queries more, up to as many scores

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
        shape = (*query.shape[:-1], self.topk)
        if is_exporting() or is_transformed(query, self.weight):
            scores_THK, slots_THK = exported.search_all(query_THQ, self.weight, self.topk)
            return Hits(scores_THK.reshape(shape), slots_THK.reshape(shape))
        slots_THK = self._search(query_THQ)
        # One table of H * S keys, so that all heads are scored in one call.
        rows_THK = slots_THK + torch.arange(heads, device=query.device)[:, None] * slots
        scores = dot(self.weight.flatten(0, 1), rows_THK.flatten(0, 1), query_THQ.flatten(0, 1))
        # Rescored in another order of operations than searched, so near-ties may have changed places.
        scores_THK, order_THK = scores.view_as(rows_THK).sort(dim=-1, descending=True, stable=True)
        return Hits(scores_THK.view(shape), slots_THK.gather(-1, order_THK).view(shape))

    @torch.no_grad()
    def _search(self, query_THQ: Tensor) -> Tensor:
        # Searched as exactly as scored, whatever a surrounding autocast says.
        with without_autocast(query_THQ):
            return self._search_blocks(widened(query_THQ))

    def _search_blocks(self, query_THQ: Tensor) -> Tensor:
        heads, slots, _ = self.weight.shape
        if len(query_THQ) == 0:
            return query_THQ.new_empty(0, heads, self.topk, dtype=torch.int64)
        is_grouped = slots >= 16 * self.topk
        search = self._search_groups if is_grouped else self._search_all
        held = self.BLOCK if query_THQ.device.type == "cpu" else 4 * self.BLOCK  # small products would idle a GPU
        queries = max(1, held // (heads * (self.KEYS if is_grouped else slots)))
        return torch.cat([search(block) for block in query_THQ.split(queries)])

    def _search_all(self, query_THQ: Tensor) -> Tensor:
        scores_HTS = query_THQ.transpose(0, 1) @ self.weight.to(query_THQ.dtype).transpose(1, 2)
        return best(scores_HTS, torch.arange(scores_HTS.shape[-1], device=query_THQ.device), self.topk).transpose(0, 1)

    def _search_groups(self, query_THQ: Tensor) -> Tensor:
        # Above a score that is in none of the K groups with the best greatest scores stand these K. So it is among
        # equal scores, of which the lower slot, in the lower group, is better.
        tokens, heads, _ = query_THQ.shape
        slots, device = self.weight.shape[1], query_THQ.device
        size = min(2 ** (math.isqrt(slots // self.topk).bit_length() - 1), self.KEYS)  # of a group
        query_HQT = query_THQ.permute(1, 2, 0).contiguous()
        greatest_HGT = query_THQ.new_empty(heads, -(-slots // size), tokens)
        block = max(self.KEYS, self.BLOCK // (heads * tokens) // size * size)
        # One for all blocks: the system takes as long to hand out new memory as a product takes to fill it.
        scores_N = query_THQ.new_empty(heads * min(block, slots) * tokens)
        for start in range(0, slots, block):
            keys_HCQ = self.weight[:, start : start + block].to(query_THQ.dtype)
            keys = keys_HCQ.shape[1]
            scores_HCT = scores_N[: heads * keys * tokens].view(heads, keys, tokens)
            torch.bmm(keys_HCQ, query_HQT, out=scores_HCT)
            whole = keys // size
            into_HGT = greatest_HGT[:, start // size :]
            torch.amax(scores_HCT[:, : whole * size].unflatten(1, (whole, size)), 2, out=into_HGT[:, :whole])
            if whole * size < keys:
                torch.amax(scores_HCT[:, whole * size :], 1, out=into_HGT[:, whole])
        groups_G = torch.arange(greatest_HGT.shape[1], device=device)
        group_HTK = best(greatest_HGT.transpose(1, 2).contiguous(), groups_G, self.topk)
        slots_HTN = (group_HTK[..., None] * size + torch.arange(size, device=device)).flatten(-2)
        rows_HTN = slots_HTN.clamp(max=slots - 1) + torch.arange(heads, device=device)[:, None, None] * slots
        flat_query = query_THQ.transpose(0, 1).flatten(0, 1)
        scores = dot(self.weight.flatten(0, 1), rows_HTN.flatten(0, 1), flat_query)
        scores_HTN = torch.where(slots_HTN < slots, scores.view_as(slots_HTN), -math.inf)
        return best(scores_HTN, slots_HTN, self.topk).transpose(0, 1)

    def extra_repr(self) -> str:
        heads, slots, query_dim = self.weight.shape
        return f"heads={heads}, slots={slots}, query_dim={query_dim}, topk={self.topk}"
