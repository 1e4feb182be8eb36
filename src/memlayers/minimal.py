"""The whole layer on one page, in plain PyTorch, without options. The tests hold MemoryLayer to it."""

import torch
from torch import Tensor, nn


class MinimalMemory(nn.Module):
    """Product-key memory with H heads and query BatchNorm (Lample et al. 2019, sections 3.1 to 3.3)."""

    def __init__(self, dim: int, heads: int, topk: int, num_subkeys: int, query_dim: int):
        super().__init__()
        self.topk, self.heads = topk, heads
        self.query = nn.Linear(dim, heads * query_dim)
        self.norm = nn.BatchNorm1d(heads * query_dim)
        bound = (query_dim // 2) ** -0.5
        self.keys = nn.Parameter(torch.empty(2, heads, num_subkeys, query_dim // 2).uniform_(-bound, bound))
        self.values = nn.Parameter(torch.randn(num_subkeys**2, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # [T, dim] -> [T, dim]
        num_subkeys = self.keys.shape[2]
        query = self.norm(self.query(x)).view(len(x), self.heads, 2, -1)
        # The K best sub-keys of each half, [T, heads, K].
        score1, index1 = torch.einsum("thd,hnd->thn", query[:, :, 0], self.keys[0]).topk(self.topk)
        score2, index2 = torch.einsum("thd,hnd->thn", query[:, :, 1], self.keys[1]).topk(self.topk)
        # The K best of their K * K pairs are the K best of all pairs: a better pair has a better half.
        pairs = score1[..., :, None] + score2[..., None, :]
        slots = index1[..., :, None] * num_subkeys + index2[..., None, :]
        score, best = pairs.flatten(2).topk(self.topk)
        slot = slots.flatten(2).gather(-1, best)
        # Softmax over the K selected, then the weighted sum of their values, over all heads.
        return torch.einsum("thk,thkv->tv", score.softmax(-1), self.values[slot])
