"""How many slots a number of tokens allows, and what counts as a collapse."""

import math

import pytest
import torch

from memlayers import MemoryConfig, MemoryLayer, doctor
from memlayers.diagnosis.collapse import (
    Spread,
    complaints,
    expected_effective,
    expected_usage,
    first_of_alike,
    judge,
    spread,
)
from memlayers.optim import MemoryAdamW


@pytest.mark.parametrize(("slots", "reads"), [(7, 30), (64, 500), (1000, 37), (1000, 5000), (3, 20_000)])
def test_expectations_are_those_of_uniform_reads(slots, reads):
    draws = torch.randint(slots, (200, reads), generator=torch.Generator().manual_seed(0))
    used, effective = [], []
    for draw in draws:
        counts = draw.bincount(minlength=slots).double()
        share = counts[counts > 0] / reads
        used.append(len(share))
        effective.append(math.exp(-float((share * share.log()).sum())))
    assert expected_usage(slots, reads) == pytest.approx(sum(used) / 200, rel=0.02)
    assert expected_effective(slots, reads) == pytest.approx(sum(effective) / 200, rel=0.05)


def test_uniform_reads_have_a_spread_of_one():
    slots = torch.rand(2000, 2, 400, generator=torch.Generator().manual_seed(0)).topk(8).indices
    found = spread(slots, 400)
    assert found[:3] == pytest.approx((1, 1, 1), abs=0.02)
    assert found.overlap == pytest.approx(0, abs=0.002)
    assert complaints(found) == ([], False)


def test_equal_reads_are_a_collapse():
    for slots in (36, 4096):
        found = spread(torch.arange(6).view(1, 2, 3).expand(500, 2, 3), slots)
        assert found.overlap == pytest.approx(1)
        said, has_collapsed = complaints(found)
        assert has_collapsed
        assert "two tokens share 100% of their slots" in said
        assert found.usage == pytest.approx(6 / expected_usage(slots, 3000))


@pytest.mark.parametrize(
    ("name", "fine", "narrow", "collapsed"),
    [
        ("usage", 0.101, (0.099, 0.031), 0.029),
        ("effective", 0.051, (0.049, 0.021), 0.019),
        ("top1", 0.051, (0.049, 0.016), 0.014),
        ("overlap", 0.29, (0.31, 0.49), 0.51),
    ],
)
def test_what_is_narrow_and_what_is_a_collapse(name, fine, narrow, collapsed):
    healthy = Spread(usage=1.0, effective=1.0, top1=1.0, overlap=0.0)
    assert complaints(healthy._replace(**{name: fine})) == ([], False)
    for value in narrow:
        (_,), has_collapsed = complaints(healthy._replace(**{name: value}))
        assert not has_collapsed
    (_,), has_collapsed = complaints(healthy._replace(**{name: collapsed}))
    assert has_collapsed


@pytest.mark.parametrize(("tokens", "says", "share"), [(181, None, ""), (208, False, "66%"), (240, True, "87%")])
def test_how_often_two_tokens_may_have_one_best_sub_key(tokens, says, share):
    slots = uniform_hits(heads=4, num_subkeys=16)
    slots[:tokens, 1, 0] = 3 * 16 + slots[:tokens, 1, 0] % 16  # of 256: shares of 0.5, 0.66 and 0.87
    said, has_collapsed = judge(slots, 256, 16)
    assert (has_collapsed if said else None) is says
    assert all(one.endswith(f" have one best sub-key in {share} of cases") for one in said)


@pytest.mark.parametrize(("tokens", "state"), [(7, "skip"), (8, "pass")])
def test_eight_distinct_tokens_say_something(block, tokens, state, found):
    block.dropout.p = 0.0
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    assert found(doctor(block, x), "usage").state == state


def test_one_of_two_heads_alone_is_seen():
    slots = torch.rand(500, 2, 400, generator=torch.Generator().manual_seed(0)).topk(8).indices
    slots[:, 1] = torch.arange(8)
    assert spread(slots, 400).overlap == pytest.approx(0.5, abs=0.01)
    assert complaints(spread(slots, 400))[0]


@pytest.mark.parametrize("norm", ["batch", "rms", "none"])
@pytest.mark.parametrize(("num_subkeys", "topk"), [(4, 2), (6, 3), (32, 8), (128, 16)])
@pytest.mark.parametrize("tokens", [16, 256])
def test_a_memory_with_random_weights_is_healthy(norm, num_subkeys, topk, tokens):
    config = MemoryConfig(dim=16, heads=2, topk=topk, num_subkeys=num_subkeys, query_dim=16, query_norm=norm)
    layer = MemoryLayer(config)
    hits = []
    layer.keys.register_forward_hook(lambda module, args, found: hits.append(found.slots))
    layer(torch.randn(tokens, 16))
    assert judge(hits[0], config.slots, num_subkeys) == ([], False)


def uniform_hits(*, heads, num_subkeys, tokens=256, topk=8):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, heads, num_subkeys**2, generator=generator).topk(topk).indices


@pytest.mark.parametrize("heads", [4, 8])
def test_one_head_of_many_is_named(heads):
    slots = uniform_hits(heads=heads, num_subkeys=16)
    assert judge(slots, 256, 16) == ([], False)
    slots[:, 2] = torch.arange(8)
    assert complaints(spread(slots, 256)) == ([], False)
    (said,), has_collapsed = judge(slots, 256, None)
    assert has_collapsed
    assert said.startswith("of head 2 alone: two tokens share 100% of their slots")


@pytest.mark.parametrize("codebook", ["first", "second"])
def test_one_codebook_alone_is_named(codebook):
    slots = uniform_hits(heads=4, num_subkeys=16)
    best = slots[:, 1, 0]
    slots[:, 1, 0] = 3 * 16 + best % 16 if codebook == "first" else best // 16 * 16 + 3
    (said,), has_collapsed = judge(slots, 256, 16)
    assert has_collapsed
    assert said == f"in the {codebook} codebook of head 1 two tokens have one best sub-key in 100% of cases"
    assert judge(slots, 256, None) == ([], False)  # keys that are no product have none


def test_its_cost_does_not_grow_with_the_slots():
    assert spread(torch.arange(1000).view(500, 1, 2), 2**60).usage == pytest.approx(1)


def test_tokens_that_come_again_are_counted_once():
    points = 5 + torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    drift = torch.arange(40)[:, None, None] * 0.05  # in the end far from where it began
    again = (points + drift * torch.ones(32)).flatten(0, 1)
    assert first_of_alike(points).all()
    assert first_of_alike(again).sum() <= 100
    assert first_of_alike(again)[:50].all()
    assert first_of_alike(torch.ones(9, 32)).sum() == 1


# In an examination.


@pytest.mark.parametrize("norm", ["batch", "rms", "none"])
@pytest.mark.parametrize("num_subkeys", [6, 64])
def test_collapsed_query(make_block, batch, norm, num_subkeys, fails, only):
    block = make_block(query_norm=norm, num_subkeys=num_subkeys)
    with torch.no_grad():  # all queries almost equal
        if norm == "batch":
            block.mlp.query.norm.weight.fill_(1e-4)
            block.mlp.query.norm.bias.normal_()
        else:
            block.mlp.query.projections[0].weight.mul_(1e-4)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "usage", "the query has collapsed")
    only(report, "usage")


def test_equal_tokens_are_no_collapse(block, found):
    block.dropout.p = 0.0
    report = doctor(block, torch.ones(8, 16, 16))
    assert found(report, "usage").state == "skip"


def test_one_collapsed_head_and_half_a_query_are_seen(make_block, batch, fails):
    for first, last, says in ((0, 8, "of head 0 alone"), (8, 12, "in the first codebook of head 1")):
        block = make_block(heads=4, num_subkeys=16, query_norm="rms")
        with torch.no_grad():
            block.mlp.query.projections[0].weight[first:last] = 0
        finding = fails(doctor(block, batch), "usage", says)
        assert "query_norm='batch'" in finding.advice
