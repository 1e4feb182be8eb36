"""select_slots against a plain loop that is written from its formulas."""

import math

import pytest
import torch

from memlayers import Experts, quantize_memory, slot_rates
from memlayers.finetuning import SlotCounts, select_slots
from memlayers.optim import RowSGD
from memlayers.values import value_tables


def plain_scores(method, new, counts, name):
    """By slot that the text reads: score, reads."""
    c, b, old = (one[name].tolist() for one in (new.reads, counts.batches_with, counts.reads))
    found = {}
    for slot, reads in enumerate(c):
        if reads:
            p = reads / sum(c)
            q = (old[slot] + 1) / (sum(old) + len(old))
            tfidf = p * math.log((counts.batches + 1) / (b[slot] + 1))
            found[slot] = (tfidf if method == "tfidf" else p * math.log(p / q), reads)
    return found


@pytest.fixture(scope="module")
def net(make_net):
    return make_net().eval()


@pytest.fixture(scope="module")
def counts(make_batches, net):
    with SlotCounts(net) as counts, torch.no_grad():
        for x, mask in make_batches(4, tokens=2):
            net(x, mask)
    return counts


@pytest.mark.parametrize("slots", [1, 9, 1000])
@pytest.mark.parametrize("method", ["tfidf", "kl"])
def test_the_best_of_the_scores_are_taken(make_batches, net, counts, method, slots):
    x, mask = make_batches(6)[-1]
    with SlotCounts(net) as new, torch.no_grad():
        net(x, mask)
    rows = select_slots(net, counts, {"x": x, "mask": mask}, method=method, slots=slots)
    assert list(rows) == value_tables(net)
    for name, chosen in zip(counts.reads, rows.values(), strict=True):
        scores = plain_scores(method, new, counts, name)
        ranked = sorted(scores, key=lambda slot: (-round(scores[slot][0], 12), -scores[slot][1], slot))
        assert chosen.tolist() == sorted(ranked[:slots])
    again = select_slots(net, counts, new, method=method, slots=slots)
    assert all(torch.equal(rows[table], again[table]) for table in rows)


def test_all_takes_what_is_read_of_both_tables_of_experts(make_net, make_batches):
    net = make_net(Experts, shared=True).eval()
    x, _ = make_batches()[0]
    with SlotCounts(net) as new, torch.no_grad():
        net(x)
    rows = select_slots(net, None, x, method="all")
    assert len(rows) == 2
    for chosen in rows.values():
        assert chosen.tolist() == new.reads["first.values"].nonzero().flatten().tolist()
    RowSGD(net).choose_rows(rows)


def test_tables_of_integers_are_counted_and_ignored_by_optimizers(make_net, make_batches):
    net = make_net().eval()
    net.first = quantize_memory(net.first, bits=8)
    rows = select_slots(net, None, make_batches()[0][0], method="all")
    assert list(rows) == value_tables(net)
    optimizer = RowSGD([net.second.values])
    optimizer.choose_rows(rows)
    assert list(optimizer.chosen_rows) == [net.second.values]


def test_the_model_is_left_as_it_is(make_net, make_batches):
    net = make_net().train()
    net.second.eval()
    select_slots(net, None, make_batches()[0][0], method="all")
    assert [module.training for module in (net, net.first, net.second, net.second.keys)] == [
        True,
        True,
        False,
        False,
    ]
    assert not net.first.keys._forward_hooks


def test_counts_and_text_of_nothing_are_refused(net, counts, make_batches):
    with pytest.raises(ValueError, match="counts must be of text that memories read, got counts of which"):
        select_slots(net, SlotCounts(net), make_batches()[0][0], slots=3)
    with pytest.raises(ValueError, match="batch must be of text that memories read, got batch of which"):
        select_slots(net, counts, SlotCounts(net), slots=3)


def test_new_text_is_not_counted_as_background(net, counts, make_batches):
    with counts, pytest.raises(ValueError, match="counts must not listen"):
        select_slots(net, counts, make_batches()[0][0], slots=3)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"method": "idf", "slots": 3}, "method must be one of 'tfidf', 'kl', 'all', got 'idf'"),
        ({}, "slots must be an integer of at least 1, got None"),
        ({"slots": 0}, "slots must be an integer of at least 1, got 0"),
        ({"method": "all", "slots": 3}, "slots must be None with method='all'.* got 3"),
        ({"slots": 3, "counts": None}, "counts must be those of background text with method='tfidf', got None"),
        (
            {"slots": 3, "counts": "other"},
            r"counts must count the slots of .* second.values \(36\), got those of first.values \(36\)$",
        ),
        (
            {"slots": 3, "batch": "other"},
            r"batch must count the slots of .* second.values \(36\), got those of first.values \(36\)$",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(make_net, make_batches, net, counts, how, named):
    how = {name: SlotCounts(make_net(shared=True)) if value == "other" else value for name, value in how.items()}
    with pytest.raises(ValueError, match=named):
        select_slots(net, **{"counts": counts, "batch": make_batches()[0][0], **how})


def test_the_rates_of_rows_fall_with_their_reads_in_the_background(net, counts):
    rates = slot_rates(net, counts, floor=0.25)
    assert list(rates) == value_tables(net)
    for reads_S, rate_S in zip(counts.reads.values(), rates.values(), strict=True):
        reads = reads_S.tolist()
        mean = sum(reads) / 36
        assert rate_S.dtype == torch.float32
        assert rate_S.tolist() == pytest.approx([0.25 / (one / mean + 0.25) for one in reads])
        assert max(rate_S.tolist()) == 1  # of one that is never read
    RowSGD(net).choose_rows(rates)


def test_rates_without_a_floor_or_counts_are_refused(net, counts):
    with pytest.raises(ValueError, match="floor must be a finite number above 0.*got 0"):
        slot_rates(net, counts, floor=0)
    with pytest.raises(ValueError, match="counts must be of text that memories read"):
        slot_rates(net, SlotCounts(net))
