"""What the memory layer is compared with, each written from its public description.

Letters: T tokens, D model width, H heads, Q query width of a head, N sub-keys, K neighbours, S slots, V value width.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.bench.shapes import Shape

# Heads one by one keep their scores in cache, all at once saves calls: each form where it is the faster one.
_TOKENS_AT_ONCE = 128


class TextbookMemory(nn.Module):
    """The published pipeline (Lample et al. 2019): three `torch.topk`, the K * K grid, `F.embedding_bag`.

    A linear query network with BatchNorm, as in the paper. `values` is taken as it is, not copied. `sparse`: the
    table's gradient is a sparse tensor, for `torch.optim.SparseAdam`.
    """

    def __init__(self, shape: Shape, values_SV: Tensor, *, sparse: bool = False):
        super().__init__()
        self.heads, self.topk, self.sparse = shape.heads, shape.topk, sparse
        device = values_SV.device
        features, half = shape.heads * shape.query_dim, shape.query_dim // 2
        self.query = nn.Linear(shape.dim, features, device=device)
        self.norm = nn.BatchNorm1d(features, device=device)
        self.keys = nn.Parameter(torch.empty(2, shape.heads, shape.num_subkeys, half, device=device))
        nn.init.uniform_(self.keys, -(half**-0.5), half**-0.5)
        self.values = nn.Parameter(values_SV)
        self.output = (
            nn.Identity()
            if shape.value_dim == shape.dim
            else nn.Linear(shape.value_dim, shape.dim, bias=False, device=device)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        scores_THK, slots_THK = self.search(x_TD, self.topk)
        y_TV = F.embedding_bag(
            slots_THK.flatten(1),
            self.values,
            per_sample_weights=scores_THK.softmax(-1).flatten(1).to(self.values.dtype),  # not that of autocast
            mode="sum",
            sparse=self.sparse,
        )
        return self.output(y_TV)

    def search(self, x_TD: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """Scores and slots, [T, H, K]."""
        query_THQ = self.norm(self.query(x_TD)).view(len(x_TD), self.heads, -1)
        if len(x_TD) <= _TOKENS_AT_ONCE:
            halves = query_THQ.unflatten(-1, (2, -1)).permute(2, 1, 0, 3) @ self.keys.transpose(-1, -2)
            scores_HTK, slots_HTK = grid_topk(halves[0], halves[1], topk)
            return scores_HTK.transpose(0, 1), slots_HTK.transpose(0, 1)
        found = []
        for head in range(self.heads):
            first_TQ, second_TQ = query_THQ[:, head].chunk(2, -1)
            first_TN, second_TN = F.linear(first_TQ, self.keys[0, head]), F.linear(second_TQ, self.keys[1, head])
            found.append(grid_topk(first_TN, second_TN, topk))
        return torch.stack([scores for scores, _ in found], 1), torch.stack([slots for _, slots in found], 1)


def grid_topk(first_N: Tensor, second_N: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Scores and slots of the K best pairs, from a grid of K * K sums and one of K * K slots: [..., N] -> [..., K]."""
    first_K, row_K = first_N.topk(topk)
    second_K, column_K = second_N.topk(topk)
    sums = (first_K[..., :, None] + second_K[..., None, :]).flatten(-2)
    slots = (row_K[..., :, None] * first_N.shape[-1] + column_K[..., None, :]).flatten(-2)
    scores_K, place_K = sums.topk(topk)
    return scores_K, slots.gather(-1, place_K)


def lean_grid_topk(first_N: Tensor, second_N: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The same without the grid of slots: a place in the grid of sums says which pair it is."""
    first_K, row_K = first_N.topk(topk)
    second_K, column_K = second_N.topk(topk)
    scores_K, place_K = (first_K[..., :, None] + second_K[..., None, :]).flatten(-2).topk(topk)
    i_K, j_K = torch.div(place_K, topk, rounding_mode="floor"), place_K % topk
    return scores_K, row_K.gather(-1, i_K) * first_N.shape[-1] + column_K.gather(-1, j_K)


def dense_ffn(dim: int, device: torch.device) -> nn.Module:
    """The feed-forward network that a memory replaces."""
    return nn.Sequential(nn.Linear(dim, 4 * dim, device=device), nn.GELU(), nn.Linear(4 * dim, dim, device=device))


class PackageMemory(nn.Module):
    """The layer of the PyPI package ``product-key-memory``, on a table that is handed over: [T, D] -> [T, D].

    Its queries pass a LayerNorm where the textbook has BatchNorm; its values are as wide as the model. Raises
    `ImportError` when the package is not installed, and whatever the package raises when it cannot be built.
    """

    def __init__(self, shape: Shape, values_SV: Tensor):
        super().__init__()
        if shape.value_dim != shape.dim:
            raise ValueError(f"its values are as wide as the model, {shape.dim}")
        package = importlib.import_module("product_key_memory")
        with torch.device("meta"):  # its table would take a minute to initialise
            layer = package.PKM(
                dim=shape.dim,
                heads=shape.heads,
                num_keys=shape.num_subkeys,
                topk=shape.topk,
                dim_head=shape.query_dim // 2,
            )
        layer.values.weight = None
        layer.to_empty(device=values_SV.device)
        for module in layer.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.normal_(layer.keys, std=(shape.query_dim // 2) ** -0.5)
        layer.values.weight = nn.Parameter(values_SV)
        self.layer = layer

    @property
    def values(self) -> Tensor:
        """The table."""
        return self.layer.values.weight

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD[None])[0]


def why_not(error: Exception) -> str:
    """Why the package does not take part, on one line."""
    if isinstance(error, ModuleNotFoundError) and error.name == "product_key_memory":
        return "not installed"
    return f"does not run: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
