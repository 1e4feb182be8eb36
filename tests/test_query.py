import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from memlayers import MemoryConfig, MemoryLayer
from memlayers.query import HeadRMSNorm, MaskedBatchNorm, QueryNetwork

CONFIG = MemoryConfig(dim=8, heads=2, topk=2, num_subkeys=4, query_dim=4)


def norm_pair(heads=2, width=3):
    """Ours and torch's, with the same gains."""
    ours, torchs = MaskedBatchNorm(heads, width), nn.BatchNorm1d(heads * width)
    with torch.no_grad():
        torchs.weight.uniform_(0.5, 2)
        torchs.bias.normal_()
        ours.weight.copy_(torchs.weight.view(heads, width))
        ours.bias.copy_(torchs.bias.view(heads, width))
    return ours, torchs


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_is_torch_s_over_the_real_tokens(masked):
    ours, torchs = norm_pair()
    for _ in range(3):
        real = 5 + torch.randn(9, 2, 3)
        padding = torch.full((4, 2, 3), torch.nan)
        mask = torch.tensor([True] * 9 + [False] * 4) if masked else None
        query = torch.cat([real, padding]) if masked else real
        torch.testing.assert_close(ours(query, mask)[:9].flatten(1), torchs(real.flatten(1)))
    torch.testing.assert_close(ours.running_mean.flatten(), torchs.running_mean)
    torch.testing.assert_close(ours.running_var.flatten(), torchs.running_var)
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(real).flatten(1), torchs(real.flatten(1)))


def test_gradients_of_real_tokens_ignore_what_padding_holds():
    ours, torchs = norm_pair()
    real = torch.randn(6, 2, 3)
    grads = []
    for padding in (0.0, torch.nan):
        query = torch.cat([real, torch.full((2, 2, 3), padding)]).requires_grad_()
        mask = torch.arange(8) < 6
        ours(query, mask)[:6].square().sum().backward()
        grads.append(query.grad[:6])
    alone = real.clone().requires_grad_()
    torchs(alone.flatten(1)).square().sum().backward()
    torch.testing.assert_close(grads[0], alone.grad)
    torch.testing.assert_close(grads[1], alone.grad)


@pytest.mark.parametrize("real", [None, 0, 1], ids=["empty batch", "all padding", "one token"])
def test_too_few_tokens_leave_the_statistics_alone(real):
    norm = MaskedBatchNorm(2, 3)
    norm(torch.randn(0 if real is None else 4, 2, 3), None if real is None else torch.arange(4) < real)
    assert not norm.running_mean.any()
    assert torch.equal(norm.running_var, torch.ones(2, 3))


def test_one_token_in_training_is_an_error_and_not_in_evaluation():
    norm = MaskedBatchNorm(2, 3)
    with pytest.raises(ValueError, match=r"query_norm 'batch' needs more than one token .* got 1"):
        norm(torch.randn(1, 2, 3))
    assert norm.eval()(torch.randn(1, 2, 3)).shape == (1, 2, 3)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant, masked):
    plain = MaskedBatchNorm(2, 3)
    recomputed = copy.deepcopy(plain)
    query = torch.randn(7, 2, 3, requires_grad=True)
    mask = torch.arange(7) < 5 if masked else None
    plain(query, mask).square().sum().backward()
    checkpoint(recomputed, query, mask, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(recomputed.running_mean, plain.running_mean)
    torch.testing.assert_close(recomputed.running_var, plain.running_var)


def test_compiled_checkpointing_counts_once():
    plain = MaskedBatchNorm(2, 3)
    recomputed = copy.deepcopy(plain)
    query = torch.randn(7, 2, 3, requires_grad=True)
    plain(query).square().sum().backward()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(query):
        return checkpoint(recomputed, query, use_reentrant=False).square().sum()

    run(query).backward()
    torch.testing.assert_close(recomputed.running_mean, plain.running_mean)
    torch.testing.assert_close(recomputed.running_var, plain.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_that_are_assigned_in_16_bits_are_widened(dtype):
    norm = MaskedBatchNorm(2, 3)
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in norm.state_dict().items()}
    norm.load_state_dict(state, assign=True)
    assert norm.weight.dtype == dtype
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    for training in (True, False):
        assert norm.train(training)(torch.randn(9, 2, 3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_a_gain_with_strides_has_the_gradients_of_one_without(training):
    norm, x = MaskedBatchNorm(2, 3).train(training), torch.randn(9, 2, 3, requires_grad=True)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    (expected,) = torch.autograd.grad(norm(x).pow(3).sum(), x)
    norm.weight.data = torch.stack([norm.weight, 7 * norm.weight], -1).detach()[..., 0]
    assert not norm.weight.is_contiguous()
    torch.testing.assert_close(torch.autograd.grad(norm(x).pow(3).sum(), x)[0], expected)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_stay_float32_under_a_cast(cast):
    norm = MaskedBatchNorm(2, 3)
    norm(3 + torch.randn(50, 2, 3))
    mean = norm.running_mean.clone()
    norm.to(cast)
    assert norm.weight.dtype == cast
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_mean, mean)
    assert dict(norm.named_buffers())["running_mean"] is norm.running_mean
    assert norm(torch.randn(4, 2, 3, dtype=cast)).dtype == cast


def test_16_bit_queries_are_normalised_in_float32():
    """In bfloat16 the mean of 4,096 ones and twos would stick."""
    norm = MaskedBatchNorm(1, 1)
    query = torch.tensor([1.0, 2.0] * 2048, dtype=torch.bfloat16).view(-1, 1, 1)
    norm(query)
    assert norm.running_mean.item() == pytest.approx(0.1 * 1.5)


def test_rms_norm_is_torch_s_per_head():
    norm = HeadRMSNorm(2, 8)
    query = torch.randn(5, 2, 8)
    for size in (1.0, 1e-3):  # a small one is where eps counts
        torch.testing.assert_close(norm(size * query), nn.functional.rms_norm(size * query, (8,), eps=1e-6))


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_network_has_the_sizes_it_was_given(hidden, bias):
    config = MemoryConfig(
        dim=6, heads=2, topk=1, num_subkeys=2, query_dim=4, query_hidden=hidden, query_bias=bias, query_norm="none"
    )
    network = QueryNetwork(config)
    assert [projection.out_features for projection in network.projections] == [*hidden, 8]
    assert all((projection.bias is not None) == bias for projection in network.projections)
    x = torch.randn(3, 6)
    expected = x
    for projection in network.projections[:-1]:
        expected = projection(expected).relu()
    torch.testing.assert_close(network(x), network.projections[-1](expected).view(3, 2, 4))


@pytest.mark.parametrize("order", ["plain first", "masked first"])
def test_a_masked_and_a_plain_call_before_one_backward(order):
    norm = MaskedBatchNorm(2, 4)
    x, mask = torch.randn(9, 2, 4, requires_grad=True), torch.rand(9) > 0.3
    masks = (None, mask) if order == "plain first" else (mask, None)
    sum(norm(x, mask).square().sum() for mask in masks).backward()
    assert x.grad.isfinite().all()


def test_statistics_of_masked_tokens_are_float32_under_autocast():
    norm, exact = MaskedBatchNorm(2, 4), MaskedBatchNorm(2, 4)
    x, mask = torch.randn(500, 2, 4) + 3, torch.rand(500) > 0.3
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, mask)
    torch.testing.assert_close(y, exact(x, mask), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var, exact.running_var, rtol=1e-6, atol=1e-6)


class WithMasks(nn.Module):
    """A layer whose batches are inputs and masks in one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, batch):
        return self.layer(batch[0], batch[1])


@pytest.mark.promise(
    "Averages and copies", "`torch.optim.swa_utils.update_bn`", "supported", "cumulative averages over real tokens"
)
@pytest.mark.parametrize("masked", [True, False])
def test_update_bn_estimates_the_statistics_anew(masked):
    net = WithMasks(MemoryLayer(CONFIG)).eval()
    norm = net.layer.query.norm
    norm.running_mean.fill_(7.0)
    batches, found = [], []
    for _ in range(3):
        x = torch.randn(40, 8) * 3 + 2
        mask = torch.rand(40) < 0.6 if masked else torch.ones(40, dtype=torch.bool)
        batches.append([(x.masked_fill(~mask[:, None], 1e6), mask if masked else None)])
        with torch.no_grad():
            query = net.layer.query.projections[0](x[mask])
        found.append((query.mean(0), query.var(0)))
    padding = torch.randn(40, 8), torch.zeros(40, dtype=torch.bool)
    update_bn([*batches, [padding if masked else (torch.full((4, 8), torch.nan), None)]], net)
    mean, var = (torch.stack(stats).mean(0).view(2, 4) for stats in zip(*found, strict=True))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.momentum == 0.1
    assert not net.training
    assert {*net.state_dict()} == {*WithMasks(MemoryLayer(CONFIG)).state_dict()}
    assert "layer.query.norm.num_batches_tracked" not in net.state_dict()


@pytest.mark.promise(
    "Averages and copies", "`SyncBatchNorm.convert_sync_batchnorm` with `query_norm=\"batch\"`", "refused",
    "`query_norm=\"rms\"`, or convert before `add_memory`",
)  # fmt: skip
def test_sync_batch_norm_that_would_count_padding_is_refused():
    with pytest.raises(ValueError, match=r"query_norm 'batch' cannot become a SyncBatchNorm, .*'rms', or conv"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(8), MemoryLayer(CONFIG)))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(MemoryLayer(dataclasses.replace(CONFIG, query_norm="rms")))
    assert isinstance(converted, MemoryLayer)


def test_a_state_dict_of_old_and_one_of_now_are_the_same():
    norm = MaskedBatchNorm(2, 3)
    state = norm.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var"]
    assert state._metadata[""]["version"] == 1
    del state._metadata
    assert str(norm.load_state_dict(state)) == "<All keys matched successfully>"
    assert list(state) == ["weight", "bias", "running_mean", "running_var"]


@pytest.mark.promise(
    "Averages and copies", "a batch with NaN, skipped by the training loop", "supported",
    "it is in no running statistics",
)  # fmt: skip
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_leaves_the_running_statistics_as_they_are(masked, value):
    norm = MaskedBatchNorm(2, 3)
    mask = torch.arange(7) < 5 if masked else None
    norm(torch.randn(7, 2, 3), mask)
    before = copy.deepcopy(norm.state_dict())
    query = torch.randn(7, 2, 3)
    query[1, 0, 2] = value
    assert not norm(query, mask).isfinite().all()
    assert all(torch.equal(now, before[name]) for name, now in norm.state_dict().items())


def test_without_running_statistics_those_of_the_batch_count():
    net = MemoryLayer(CONFIG).eval()
    x, mask = torch.randn(7, 8), torch.arange(7) < 5
    expected = copy.deepcopy(net).train()(x, mask)
    torch.func.replace_all_batch_norm_modules_(net)
    torch.testing.assert_close(net(x, mask), expected)
    with torch.no_grad():
        torch.testing.assert_close(net(x, mask), expected.detach())
    assert net.double().query.norm.running_mean is None
