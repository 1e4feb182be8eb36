import numpy as np
import pytest
import torch

from memlayers.lm.data.corpus import DOCUMENT, Shard, Split
from memlayers.lm.data.windows import Windows, training_order


def shard(first, tokens, source=0):
    documents = np.array([(0, 1, 1)], DOCUMENT)
    return Shard(np.arange(first, first + tokens, dtype=np.uint16), documents, source)


def one_shard(tokens=11):
    return Split.of([shard(0, tokens)])


def three_sources():
    """Sources 0, 1 and 2 with 4 + 1, 5 and 1 windows of three tokens."""
    return Split.of([shard(0, 14), shard(100, 5), shard(200, 15, source=1), shard(300, 3, source=2)])


def test_windows_cover_the_split_without_overlap():
    windows = Windows(one_shard(), 3)
    assert len(windows) == 3
    items = list(windows)
    assert torch.cat([item["input_ids"] for item in items]).tolist() == list(range(9))
    for item in items:
        assert item["input_ids"].dtype == torch.int64
        assert torch.equal(item["labels"], item["input_ids"])
    with pytest.raises(IndexError):
        windows[3]


def test_no_window_crosses_the_end_of_a_shard():
    windows = Windows(three_sources(), 3)
    starts = [item["input_ids"][0].item() for item in windows]
    assert starts == [0, 3, 6, 9, 100, 200, 203, 206, 209, 212, 300]
    assert all(torch.equal(item["input_ids"].diff(), torch.ones(2, dtype=torch.int64)) for item in windows)
    assert windows[-1]["input_ids"].tolist() == [300, 301, 302]
    assert windows.by_source == {0: range(5), 1: range(5, 10), 2: range(10, 11)}


def test_a_shard_that_is_shorter_than_a_window_gives_none():
    windows = Windows(three_sources(), 5)
    assert [item["input_ids"][0].item() for item in windows] == [0, 5, 100, 200, 205, 210]
    assert windows.by_source[2] == range(6, 6)


@pytest.mark.parametrize("length", [1, 12, 2.0, True])
def test_windows_need_a_length_that_fits(length):
    with pytest.raises(ValueError, match="length must be an integer from 2 to the split's 11 tokens"):
        Windows(one_shard(), length)


def test_windows_fit_into_the_longest_shard():
    assert len(Windows(three_sources(), 15)) == 1
    with pytest.raises(ValueError, match="from 2 to the split's longest shard's 15 tokens, got 16"):
        Windows(three_sources(), 16)


def test_windows_go_through_a_data_loader():
    loader = torch.utils.data.DataLoader(Windows(one_shard(100), 16), batch_size=4, shuffle=True, num_workers=0)
    batch = next(iter(loader))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)


# The order of training


def order_of_before(windows, count, seed):
    passes = -(-count // windows)
    order = [np.random.default_rng([seed, index]).permutation(windows) for index in range(passes)]
    return np.concatenate(order)[:count]


@pytest.mark.parametrize(("windows", "count"), [(10, 25), (10, 7), (10, 10), (1, 3), (997, 5000)])
def test_the_order_without_weights_is_one_shuffled_pass_after_the_other(windows, count):
    order = training_order(Windows(one_shard(windows * 3), 3), count, seed=3)
    assert order.dtype == np.uint32
    assert order.tolist() == order_of_before(windows, count, 3).tolist()
    assert np.bincount(order).max() - np.bincount(order, minlength=windows).min() <= 1


def test_the_order_of_a_seed_is_that_of_every_run_before():
    """Literals: a run that is resumed by a later version must see the windows that it would have seen."""
    windows = Windows(three_sources(), 3)
    assert training_order(windows, 14, 3).tolist() == [9, 7, 0, 2, 1, 4, 6, 10, 5, 3, 8, 7, 4, 10]
    assert training_order(windows, 14, 3, (1.0, 2.0, 0.5)).tolist() == [1, 4, 9, 5, 0, 6, 7, 2, 8, 3, 7, 6, 8, 9]


def test_another_seed_is_another_order():
    windows = Windows(one_shard(300), 3)
    assert not np.array_equal(training_order(windows, 100, 0), training_order(windows, 100, 1))
    first, other = (training_order(Windows(three_sources(), 3), 100, seed, (1, 1, 1)) for seed in (0, 1))
    assert not np.array_equal(first, other)


def test_weights_decide_the_share_of_each_source():
    windows = Windows(three_sources(), 3)
    order = training_order(windows, 40_000, 0, weights=(1.0, 2.0, 5.0))
    shares = [np.isin(order, windows.by_source[source]).mean() for source in range(3)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.01)


def test_weights_may_be_as_large_as_numbers_are():
    windows = Windows(three_sources(), 3)
    usual = training_order(windows, 1000, 0, weights=(1.0, 2.0, 5.0))
    for scale in (2.0**1021, 3e307, 1e-300):
        order = training_order(windows, 1000, 0, weights=(1.0 * scale, 2.0 * scale, 5.0 * scale))
        assert np.array_equal(order, usual)


def test_each_source_is_seen_in_shuffled_passes_of_its_own():
    windows = Windows(three_sources(), 3)
    order = training_order(windows, 400, 0, weights=(1.0, 1.0, 1.0))
    seen = []
    for source in (0, 1):
        first = windows.by_source[source].start
        own = order[np.isin(order, windows.by_source[source])] - first
        passes = [own[start : start + 5].tolist() for start in range(0, len(own) - 5, 5)]
        assert len(passes) > 10
        assert all(sorted(one) == list(range(5)) for one in passes)
        assert passes[0] != passes[1]
        seen.append(passes[:10])
    assert seen[0] != seen[1]  # each source has a shuffling of its own, too


def test_a_shorter_order_begins_a_longer_one(monkeypatch):
    windows = Windows(three_sources(), 3)
    long = training_order(windows, 500, 7, weights=(1.0, 2.0, 3.0))
    assert np.array_equal(training_order(windows, 123, 7, weights=(1.0, 2.0, 3.0)), long[:123])
    monkeypatch.setattr("memlayers.lm.data.windows.DRAWN_AT_ONCE", 64)
    assert np.array_equal(training_order(windows, 500, 7, weights=(1.0, 2.0, 3.0)), long)


def test_a_weight_for_a_source_without_a_window_is_refused():
    windows = Windows(three_sources(), 5)
    with pytest.raises(ValueError, match="data.weights gives source 2 the weight 3.0, .* no window of 5 tokens"):
        training_order(windows, 10, 0, weights=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="data.weights must have one number for each of the 3 sources"):
        training_order(windows, 10, 0, weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="data.weights gives source 3"):
        training_order(Windows(three_sources(), 3), 10, 0, weights=(1.0, 1.0, 1.0, 1.0))
