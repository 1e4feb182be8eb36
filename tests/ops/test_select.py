import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayers.ops.select import best, select_pairs, staircase


def brute_force(first_N, second_N, topk):
    """All N * N sums, stably sorted: equal sums stay in the order of their slots."""
    sums_S = (first_N[..., :, None] + second_N[..., None, :]).flatten(-2)
    scores_S, slots_S = sums_S.sort(dim=-1, descending=True, stable=True)
    return scores_S[..., :topk], slots_S[..., :topk]


def neighbours(num_subkeys):
    wanted = {1, 2, 3, num_subkeys // 2, 32, num_subkeys - 1, num_subkeys}
    return sorted(k for k in wanted if 1 <= k <= num_subkeys)


SHAPES = [(n, k) for n in (2, 3, 7, 16, 61, 128) for k in neighbours(n)] + [(512, 32), (1024, 32), (1024, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("num_subkeys", "topk"), SHAPES)
def test_random_scores_give_the_scores_of_brute_force(num_subkeys, topk, dtype):
    first, second = torch.randn(2, 3, num_subkeys, dtype=dtype)
    scores, slots = select_pairs(first, second, topk)
    expected, _ = brute_force(first, second, topk)
    assert torch.equal(scores, expected)
    assert torch.equal((first[..., :, None] + second[..., None, :]).flatten(-2).gather(-1, slots), scores)
    assert all(len(set(row)) == topk for row in slots.tolist())


@pytest.mark.parametrize(("num_subkeys", "topk"), SHAPES)
def test_clustered_scores_give_the_scores_of_brute_force(num_subkeys, topk):
    """A few tight clusters: neighbours differ in the last bits of the sum."""
    first, second = torch.randint(3, (2, 5, num_subkeys)) + 1e-6 * torch.randn(2, 5, num_subkeys)
    scores, slots = select_pairs(first, second, topk)
    assert torch.equal(scores, brute_force(first, second, topk)[0])
    assert all(len(set(row)) == topk for row in slots.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_subkeys", "topk"), SHAPES)
def test_exact_ties_go_to_the_lower_slot(num_subkeys, topk, dtype):
    """Small integers have exact sums, and hardly anything but ties."""
    first, second = torch.randint(-2, 3, (2, 4, num_subkeys)).to(dtype)
    scores, slots = select_pairs(first, second, topk)
    expected, expected_slots = brute_force(first.double(), second.double(), topk)
    assert torch.equal(scores.double(), expected)
    assert torch.equal(slots, expected_slots)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_grid_of_exact_values_matches_brute_force(data):
    num_subkeys = data.draw(st.integers(2, 12))
    topk = data.draw(st.integers(1, num_subkeys))
    values = st.lists(st.integers(-4, 4).map(lambda i: i / 4), min_size=num_subkeys, max_size=num_subkeys)
    first, second = torch.tensor(data.draw(values)), torch.tensor(data.draw(values))
    scores, slots = select_pairs(first, second, topk)
    expected, expected_slots = brute_force(first, second, topk)
    assert torch.equal(scores, expected)
    assert torch.equal(slots, expected_slots)


def test_positive_and_negative_zero_tie():
    first, second = torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, -0.0])
    assert select_pairs(first, second, 3)[1].tolist() == [0, 1, 2]


def test_infinite_scores_keep_their_order():
    scores = torch.tensor([0.0, -torch.inf, torch.inf, -3e38, 3e38])
    assert best(scores, torch.arange(5), 5).tolist() == [2, 4, 0, 3, 1]


def test_ids_up_to_the_last_slot_of_the_largest_table_survive():
    last = 2**32 - 1
    assert best(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0, last, last - 1]), 3).tolist() == [last - 1, last, 0]


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 31, 32, 100])
def test_the_staircase_is_every_pair_that_can_win_and_no_other(topk):
    pairs = set(zip(*(ranks.tolist() for ranks in staircase(topk)), strict=True))
    expected = {(i, j) for i, j in itertools.product(range(topk), repeat=2) if (i + 1) * (j + 1) <= topk}
    assert pairs == expected


def test_thirty_two_neighbours_need_119_pairs():
    assert len(staircase(32)[0]) == 119


def test_scores_of_scattered_gradients_match_autograd_over_all_pairs():
    first, second = (torch.randn(2, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: select_pairs(a, b, 4)[0], (first, second))


def test_it_is_deterministic():
    first, second = torch.randint(3, (2, 50, 64)).float()
    results = [select_pairs(first, second, 8)[1] for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
