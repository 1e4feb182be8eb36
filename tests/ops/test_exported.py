"""What an exported program computes of a memory, against the operations that it stands for."""

import math

import pytest
import torch

from memlayers.ops import exported
from memlayers.ops.read import read_reference
from memlayers.ops.search import search_reference


@pytest.mark.parametrize("topk", [1, 5, 13])
@pytest.mark.parametrize("grid", [1, 4, math.inf], ids=["all equal", "many ties", "no ties"])
def test_search_finds_the_same_slots_and_of_equal_sums_the_lowest(topk, grid):
    query, keys = torch.randn(7, 2, 6), torch.randn(2, 2, 13, 3)
    if grid < math.inf:  # sums on a grid are exact
        query, keys = (torch.randint(-grid, grid + 1, given.shape) / 4 * (grid > 1) for given in (query, keys))
    scores, slots = exported.search(query, keys, topk)
    expected_scores, expected_slots = search_reference(query, keys, topk)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(slots, expected_slots)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 1e30], ids=str)
def test_scores_that_differ_by_their_last_bit_are_no_ties(scale):
    scores = torch.tensor([1.0, 1.5, -1.0, 0.0, -0.0, 1.0]) * scale
    scores = torch.cat([scores, torch.nextafter(scores, torch.tensor(math.inf)), scores.new_zeros(90)])
    expected = scores.sort(descending=True, stable=True).indices
    assert torch.equal(exported._best(scores, len(scores)), expected)


def test_search_of_doubles_is_as_exact_as_they_are():
    query, keys = torch.randn(7, 2, 6).double(), torch.randn(2, 2, 13, 3).double()
    keys[:, :, 1] = keys[:, :, 0] * (1 + 1e-12)
    scores, slots = exported.search(query, keys, 5)
    expected_scores, expected_slots = search_reference(query, keys, 5)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-15, atol=0)
    assert torch.equal(slots, expected_slots)


def test_search_of_flat_keys_finds_the_best_and_of_equal_ones_the_lowest():
    query, keys = torch.randint(-2, 3, (7, 2, 3)) / 4, torch.randint(-2, 3, (2, 40, 3)) / 4
    scores, slots = exported.search_all(query, keys, 6)
    expected = torch.einsum("thq,hsq->ths", query, keys).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, expected.values[..., :6])
    assert torch.equal(slots, expected.indices[..., :6])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_read_sums_the_rows(dtype):
    table, slots, weights = torch.randn(11, 5).to(dtype), torch.randint(11, (7, 6)), torch.randn(7, 6)
    y = exported.read(table, slots, weights)
    expected = read_reference(table, slots, weights)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
