import copy
import json
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memlayers import Hits, MemoryConfig, MemoryLayer, UsageMeter


def make(heads=2, topk=3, num_subkeys=4):
    return MemoryLayer(MemoryConfig(dim=8, heads=heads, topk=topk, num_subkeys=num_subkeys, query_dim=4))


def hits(slots, scores=None):
    """slots: [T, H, K]."""
    slots = torch.tensor(slots)
    return Hits(torch.zeros(slots.shape) if scores is None else torch.tensor(scores), slots)


def test_uniform_use_has_no_divergence():
    meter = UsageMeter(make(heads=1, topk=1))
    meter.add(hits([[[slot]] for slot in range(16)]))
    figures = meter.report().overall
    assert figures.usage == figures.count_usage == figures.top1_usage == 100
    assert figures.kl == pytest.approx(0)
    assert figures.gini == pytest.approx(0)
    assert (figures.slots_50, figures.slots_90, figures.slots_99) == (8, 15, 16)


def test_one_slot_only_diverges_by_the_log_of_the_slots():
    meter = UsageMeter(make(heads=1, topk=1))
    meter.add(hits([[[5]]] * 10))
    figures = meter.report().overall
    assert figures.usage == 100 / 16
    assert figures.kl == pytest.approx(math.log(16))
    assert figures.gini == pytest.approx(15 / 16)
    assert (figures.slots_50, figures.slots_99) == (1, 1)


def test_weights_and_counts_differ_by_the_softmax():
    meter = UsageMeter(make(heads=1, topk=2))
    meter.add(hits([[[3, 7]]], [[[math.log(3.0), 0.0]]]))
    figures = meter.report().overall
    # Weighted z = (3/4, 1/4), counted z = (1/2, 1/2).
    assert figures.kl == pytest.approx(math.log(16) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures.count_kl == pytest.approx(math.log(16) - math.log(2))
    assert figures.top1_usage == 100 / 16
    assert (figures.slots_50, figures.count_slots_50, figures.count_slots_90) == (1, 1, 2)
    # Pairwise definition: mean absolute difference over twice the mean.
    z = torch.zeros(16, dtype=torch.float64)
    z[3], z[7] = 0.75, 0.25
    assert figures.gini == pytest.approx((z[:, None] - z[None]).abs().mean().item() / (2 * z.mean().item()))


def test_a_weight_that_underflows_counts_as_read_but_not_as_used():
    meter = UsageMeter(make(heads=1, topk=2))
    meter.add(hits([[[3, 7]]], [[[0.0, -1e4]]]))
    figures = meter.report().overall
    assert figures.usage == 100 / 16
    assert figures.count_usage == 200 / 16


def test_heads_are_reported_apart_and_together():
    meter = UsageMeter(make(heads=2, topk=1))
    meter.add(hits([[[1], [2]], [[3], [2]]]))
    report = meter.report()
    assert report.tokens == 2
    assert [head.usage for head in report.heads] == [200 / 16, 100 / 16]
    assert report.overall.usage == 300 / 16
    assert json.loads(json.dumps(report.to_dict()))["overall"]["usage"] == 300 / 16


def test_streaming_equals_one_batch_and_the_definition():
    layer = make().eval()
    x = torch.randn(40, 8)
    meters = [UsageMeter(layer), UsageMeter(layer)]
    with meters[0]:
        layer(x)
    with meters[1]:
        for part in x.split(7):
            layer(part)
    whole, streamed = (meter.report() for meter in meters)
    assert whole.tokens == streamed.tokens == 40
    assert whole.overall.kl == pytest.approx(streamed.overall.kl, abs=1e-6)  # products differ with the batch's shape
    assert whole.overall.usage == streamed.overall.usage
    scores, slots = layer.keys(layer.query(x))
    z = torch.zeros(16).index_add_(0, slots.flatten(), scores.softmax(-1).flatten()).double()
    z /= z.sum()
    assert whole.overall.kl == pytest.approx((math.log(16) + torch.special.xlogy(z, z).sum()).item(), abs=1e-6)
    assert whole.overall.usage == pytest.approx(100 * (z > 0).double().mean().item())


def test_padding_is_not_counted():
    layer = make().eval()
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    with UsageMeter(layer) as padded:
        layer(x, mask=mask)
    with UsageMeter(layer) as real:
        layer(x[mask == 1])
    assert padded.report().tokens == 7
    assert padded.report().overall.kl == pytest.approx(real.report().overall.kl, abs=1e-6)
    assert padded.report().overall.count_usage == real.report().overall.count_usage


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_counted(use_reentrant):
    layer = make()
    x = torch.randn(6, 8, requires_grad=True)
    with UsageMeter(layer) as meter:
        checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert meter.report().tokens == 6


def test_it_counts_in_a_compiled_layer():
    layer = make().eval()
    x = torch.randn(6, 8)
    with UsageMeter(layer) as expected:
        layer(x)
    with UsageMeter(layer) as meter:
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert meter.report() == expected.report()


def test_it_changes_nothing_and_leaves_nothing():
    layer = make().eval()
    x = torch.randn(6, 8)
    before, y = set(vars(layer)), layer(x)
    hooks = copy.copy(layer._forward_pre_hooks)
    with UsageMeter(layer):
        assert torch.equal(layer(x), y)
    assert set(vars(layer)) == before
    assert layer._forward_pre_hooks == hooks
    assert not layer.keys._forward_hooks


def test_attaching_twice_counts_once_and_reset_forgets():
    layer = make().eval()
    meter = UsageMeter(layer).attach()
    meter.attach()
    layer(torch.randn(6, 8))
    assert meter.report().tokens == 6
    meter.reset()
    with pytest.raises(ValueError, match="at least one measured token, got 0"):
        meter.report()
    meter.detach()
    layer(torch.randn(6, 8))
    assert int(meter._tokens) == 0


def test_it_counts_where_a_compiled_layer_is_checkpointed():
    layer = make()
    x = torch.randn(6, 8, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1])

    def run(x):
        return checkpoint(layer, x, mask, use_reentrant=False)

    with UsageMeter(layer) as meter:
        torch.compile(run, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert meter.report().tokens == 5


def test_a_mask_is_that_of_one_call():
    layer = make().eval()
    with UsageMeter(layer) as meter:
        layer(torch.randn(4, 8), mask=torch.tensor([1, 0, 0, 0]))
        layer.keys(layer.query(torch.randn(4, 8)))
    assert meter.report().tokens == 5


def test_a_call_of_more_tokens_than_the_mask_holds(monkeypatch):
    monkeypatch.setattr(UsageMeter, "MOST_TOKENS", 4)
    layer = make().eval()
    with UsageMeter(layer) as meter:
        layer(torch.randn(6, 8), mask=torch.tensor([1, 1, 1, 1, 1, 0]))
        layer(torch.randn(3, 8))
    assert meter.report().tokens == 8


def test_the_first_of_the_k_counts_as_the_best():
    meter = UsageMeter(make(heads=1, topk=2))
    meter.add(hits([[[1, 2]], [[1, 3]]]))
    assert meter.report().overall.top1_usage == 100 / 16


def test_totals_of_another_memory_are_refused():
    meter, other = UsageMeter(make(heads=1)), UsageMeter(make(heads=2))
    with pytest.raises(ValueError, match=r"usage must hold weight_HS of shape \[1, 16\], got \[2, 16\]"):
        meter.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"usage must hold weight_HS of shape \[1, 16\], got None"):
        meter.load_state_dict({})


def test_totals_follow_a_layer_that_is_moved():
    layer = make().eval()
    with UsageMeter(layer) as meter:
        layer(torch.randn(4, 8))
        layer.to("meta")(torch.empty(4, 8, device="meta"))
    assert {total.device.type for total in meter.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev])
def test_a_transform_of_torch_is_told_to_detach_it(transform):
    layer = make().eval()
    meter = UsageMeter(layer).attach()
    with pytest.raises(ValueError, match=r"in a transform of torch.func .*: detach\(\) it, or leave its `with` block"):
        transform(layer)(torch.randn(2, 3, layer.config.dim))
    meter.detach()
    transform(layer)(torch.randn(2, 3, layer.config.dim))
