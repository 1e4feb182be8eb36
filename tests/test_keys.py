import pytest
import torch

from memlayers import FlatKeys, NormalisedKeys, ProductKeys


def all_scores(keys, query):
    """[..., H, S]: the score of every slot, from the definition."""
    if isinstance(keys, FlatKeys):
        return torch.einsum("...hq,hsq->...hs", query, keys.weight)
    first, second = query.chunk(2, dim=-1)
    first = torch.einsum("...hq,hnq->...hn", first, keys.weight[0])
    second = torch.einsum("...hq,hnq->...hn", second, keys.weight[1])
    return (first[..., :, None] + second[..., None, :]).flatten(-2)


def make(kind, *, heads=3, num_subkeys=6, query_dim=8, topk=5, dtype=torch.float64):
    if kind == "product":
        return ProductKeys(heads, num_subkeys, query_dim, topk, dtype=dtype)
    return FlatKeys(heads, num_subkeys**2, query_dim, topk, dtype=dtype)


@pytest.mark.parametrize("kind", ["product", "flat"])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)], ids=str)
def test_hits_are_the_best_of_all_scores_for_any_leading_shape(kind, lead):
    keys = make(kind)
    query = torch.randn(*lead, 3, 8, dtype=torch.float64)
    scores, slots = keys(query)
    expected = all_scores(keys, query)
    assert scores.shape == slots.shape == (*lead, 3, 5)
    assert slots.dtype == torch.int64
    torch.testing.assert_close(scores, expected.topk(5).values)
    torch.testing.assert_close(expected.gather(-1, slots), scores)


@pytest.mark.parametrize("kind", ["product", "flat"])
def test_exact_ties_go_to_the_lower_slot(kind):
    keys = make(kind, dtype=torch.float32)
    with torch.no_grad():
        keys.weight.copy_(torch.randint(-1, 2, keys.weight.shape))
    query = torch.randint(-1, 2, (50, 3, 8)).float()
    expected = all_scores(keys, query).sort(dim=-1, descending=True, stable=True)
    scores, slots = keys(query)
    assert torch.equal(scores, expected.values[..., :5])
    assert torch.equal(slots, expected.indices[..., :5])


@pytest.mark.parametrize("kind", ["product", "flat"])
def test_gradients_of_query_and_keys(kind):
    keys = make(kind, num_subkeys=3, heads=2, query_dim=4, topk=3)
    query = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)

    def scores(query, weight):
        return torch.func.functional_call(keys, {"weight": weight}, (query,)).scores

    assert torch.autograd.gradcheck(scores, (query, keys.weight))


def test_flat_keys_under_autocast_miss_no_better_key():
    keys = FlatKeys(1, 512, 64, 8)
    query = torch.randn(50, 1, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = keys(query)
    torch.testing.assert_close(scores, all_scores(keys, query.float()).topk(8).values)


@pytest.mark.parametrize("topk", [5, 40])
def test_flat_search_in_blocks_equals_search_in_one(monkeypatch, topk):
    keys = FlatKeys(2, 40_007, 4, topk)
    with torch.no_grad():
        keys.weight.copy_(torch.randint(-2, 3, keys.weight.shape))
        keys.weight[:, -1] = 3  # best of all for queries without a negative number
    query = torch.randint(-2, 3, (5, 2, 4)).float()
    query[0].abs_()
    expected = all_scores(keys, query).sort(dim=-1, descending=True, stable=True)
    # Ten blocks of keys, the last group of the last one not whole, and one query a block.
    monkeypatch.setattr(FlatKeys, "BLOCK", 1)
    scores, slots = keys(query)
    assert torch.equal(scores, expected.values[..., :topk])
    assert torch.equal(slots, expected.indices[..., :topk])


def test_flat_keys_find_more_than_a_block_holds():
    keys = FlatKeys(1, 16_500, 2, 16_450)
    query = torch.randn(2, 1, 2)
    torch.testing.assert_close(keys(query).scores, all_scores(keys, query).topk(16_450).values)


def test_flat_keys_search_262_144_keys_without_holding_all_scores():
    keys = FlatKeys(4, 256**2, 4, 32)
    query = torch.randn(256, 4, 4)  # all scores at once would be 268 MB
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        scores = keys(query).scores
    held = max(event.self_cpu_memory_usage for event in profile.events())
    assert held < 50e6
    torch.testing.assert_close(scores[:20], all_scores(keys, query[:20]).topk(32).values)


@pytest.mark.parametrize("kind", ["product", "flat"])
def test_sub_keys_start_uniform_in_the_paper_s_bounds(kind):
    keys = make(kind, num_subkeys=40, query_dim=32, dtype=torch.float32)
    bound = (16 if kind == "product" else 32) ** -0.5
    assert keys.weight.abs().max() <= bound
    assert keys.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_vector_shorter_than_a_thousandth_is_divided_by_a_thousandth():
    keys = NormalisedKeys(1, 6, 8, 5, dtype=torch.float64)
    query = torch.randn(7, 1, 8, dtype=torch.float64)
    query /= query.norm(dim=-1, keepdim=True)
    expected = keys(query).scores
    torch.testing.assert_close(keys(query * 2e-3).scores, expected)
    torch.testing.assert_close(keys(query * 5e-4).scores, expected / 2)
