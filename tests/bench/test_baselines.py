import dataclasses
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from memlayers.bench import baselines
from memlayers.bench.baselines import PackageMemory, grid_topk, lean_grid_topk, why_not
from memlayers.bench.layers import make_layer, make_minimal, make_table, make_textbook, share_textbook

CPU = torch.device("cpu")


def test_the_textbook_layer_is_the_one_page_layer(tiny, monkeypatch):
    textbook = make_textbook(tiny, make_table(tiny, CPU))
    minimal = make_minimal(textbook, tiny)
    x_TD = torch.randn(tiny.tokens, tiny.dim)
    expected = minimal.eval()(x_TD)
    torch.testing.assert_close(textbook.eval()(x_TD), expected)
    monkeypatch.setattr(baselines, "_TOKENS_AT_ONCE", 1)  # head by head
    torch.testing.assert_close(textbook(x_TD), expected)


def test_a_sparse_gradient_is_the_dense_one(tiny):
    textbook = make_textbook(tiny, make_table(tiny, CPU))
    sparse = share_textbook(textbook, tiny, sparse=True)
    x_TD = torch.randn(tiny.tokens, tiny.dim)
    for module in (textbook, sparse):
        module(x_TD).square().sum().backward()
    assert sparse.values.grad.is_sparse
    torch.testing.assert_close(sparse.values.grad.to_dense(), textbook.values.grad)


def test_layers_share_the_table_and_only_the_table(tiny):
    table_SV = make_table(tiny, CPU)
    textbook = make_textbook(tiny, table_SV)
    layer, other = make_layer(textbook, tiny), share_textbook(textbook, tiny, sparse=False)
    tables = {one.data_ptr() for one in (table_SV, textbook.values, layer.values.weight, other.values)}
    assert len(tables) == 1
    assert len({one.data_ptr() for one in (textbook.keys, layer.keys.weight, other.keys)}) == 3


def test_values_of_another_width_are_projected(tiny):
    narrow = dataclasses.replace(tiny, value_dim=12)
    textbook = make_textbook(narrow, make_table(narrow, CPU))
    x_TD = torch.randn(narrow.tokens, narrow.dim)
    torch.testing.assert_close(make_layer(textbook, narrow).eval()(x_TD), textbook.eval()(x_TD), rtol=1e-4, atol=1e-5)


def test_every_page_of_a_table_is_written_with_rows_that_differ(tiny):
    wide = dataclasses.replace(tiny, num_subkeys=64)
    table_SV = make_table(wide, CPU)
    assert table_SV.ne(0).all()
    row_T = table_SV[:, 0].view(64, 64)
    assert (row_T[1:] != row_T[:-1]).all()
    assert (row_T[:, 1:] != row_T[:, :-1]).all()


def test_both_grids_find_the_best_pairs():
    first_N, second_N = torch.randn(2, 3, 5, 16)
    sums = (first_N[..., :, None] + second_N[..., None, :]).flatten(-2)
    scores_K, slots_K = sums.topk(4)
    for select in (grid_topk, lean_grid_topk):
        found = select(first_N, second_N, 4)
        assert torch.equal(found[0], scores_K)
        assert torch.equal(found[1], slots_K)


class PackageLayer(nn.Module):
    """Of the package's interface what the bench uses."""

    def __init__(self, dim, heads, num_keys, topk, dim_head):
        super().__init__()
        self.to_queries = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.norm = nn.LayerNorm(dim_head)
        self.keys = nn.Parameter(torch.zeros(heads, num_keys, 2, dim_head))
        self.values = nn.EmbeddingBag(num_keys**2, dim, mode="sum")

    def forward(self, x_BTD):
        assert x_BTD.ndim == 3
        return x_BTD + self.values.weight[0]


def test_the_package_reads_our_table(tiny, monkeypatch):
    package = ModuleType("product_key_memory")
    package.PKM = PackageLayer
    monkeypatch.setitem(sys.modules, "product_key_memory", package)
    table_SV = make_table(tiny, CPU)
    layer = PackageMemory(tiny, table_SV)
    assert layer.values.data_ptr() == table_SV.data_ptr()
    assert all(parameter.device.type == "cpu" for parameter in layer.parameters())
    assert layer.layer.keys.std() > 0
    assert torch.equal(layer.layer.norm.weight, torch.ones(8))
    assert layer(torch.zeros(5, tiny.dim)).shape == (5, tiny.dim)


def test_a_package_that_is_not_there_or_broken_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "product_key_memory", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        PackageMemory(tiny, make_table(tiny, CPU))
    assert why_not(missing.value) == "not installed"
    assert why_not(ModuleNotFoundError("No module named 'einops'", name="einops")).startswith("does not run: Module")
    assert why_not(RuntimeError("no\nway")) == "does not run: RuntimeError: no way"
