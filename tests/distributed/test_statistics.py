"""BatchNorm of the query over the real tokens of all ranks."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlayers import MemoryConfig, MemoryLayer
from memlayers.distributed import merge_statistics, sync_statistics
from memlayers.distributed.statistics import _merged
from memlayers.optim import MemoryAdamW


class Net(nn.Module):
    def __init__(self, dtype, query_norm="batch"):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        config = MemoryConfig(
            dim=8, heads=2, topk=3, num_subkeys=20, query_dim=4, query_norm=query_norm, query_bias=False
        )
        self.memory = MemoryLayer(config)
        self.to(dtype)

    def forward(self, x, mask):
        x = self.linear(x)
        return (x + self.memory(x, mask))[mask]


def batch(step, rank, dtype):
    """Masked unequally: one rank with one real token, with none, with no token at all."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn((7, 4)[rank], 8, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.arange(len(x)) < ((7, 2), (3, 1), (5, 0), (4, 4))[step % 4][rank]
    x[~mask] = 1e3  # nothing of it may come through
    return (x[:0], mask[:0]) if rank == 1 and step % 4 == 3 else (x, mask)


def train(model, optimizer, called, losses, steps):
    figures = None
    for step in range(steps):
        for loss in losses(called, step):
            loss.backward()
        if step == 0:
            figures = {name: one.grad.clone() for name, one in model.named_parameters() if "values" not in name}
        optimizer.step()
        optimizer.zero_grad()
    return figures, {name: value.clone() for name, value in model.state_dict().items()}


def in_one_of_two(rank, dtype, steps):
    model = Net(dtype)
    optimizer = MemoryAdamW(model, lr=1e-2, value_lr=1e-2)
    replica = DistributedDataParallel(sync_statistics(model))
    assert sync_statistics(copy.deepcopy(model)) is not model
    assert pickle.loads(pickle.dumps(model.memory.query.norm)).held_group.group is None

    def losses(called, step):
        return [called(*batch(step, rank, dtype)).square().sum() / 5]

    return train(model, optimizer, replica, losses, steps)


def alone(dtype, steps):
    """On the concatenated batch."""
    model = Net(dtype)
    optimizer = MemoryAdamW(model, lr=1e-2, value_lr=1e-2)

    def losses(called, step):
        whole = [torch.cat(both) for both in zip(batch(step, 0, dtype), batch(step, 1, dtype), strict=True)]
        return [called(*whole).square().sum() / 10]

    return train(model, optimizer, model, losses, steps)


@pytest.mark.promise(
    "Several processes",
    "BatchNorm of the query over the tokens of all ranks",
    "supported",
    "`memlayers.distributed.sync_statistics(model)`; without it each rank has its own, as under DDP",
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_ranks_train_as_one_process_on_the_concatenated_batch(pair, dtype, tolerance):
    steps = 1 if dtype == torch.float32 else 8
    (grads, state), (_, other) = pair(in_one_of_two, dtype, steps)
    expected_grads, expected = alone(dtype, steps)
    for name, value in expected_grads.items():
        assert (grads[name] - value).norm() <= tolerance * value.norm(), name
    for name, value in expected.items():
        assert torch.equal(state[name], other[name]), name
        if dtype == torch.float64:
            assert (state[name] - value).norm() <= 1e-9 * value.norm(), name


@pytest.mark.slow
def test_after_200_steps_too(pair):
    (_, state), _ = pair(in_one_of_two, torch.float64, 200)
    for name, value in alone(torch.float64, 200)[1].items():
        assert (state[name] - value).norm() <= 1e-9 * value.norm(), name


def of_its_own(rank):
    model = Net(torch.float64)
    x = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) + rank
    norm = model.memory.query.norm
    norm.momentum = 1.0
    y = model(x, torch.ones(50, dtype=torch.bool))
    before = norm.running_mean.clone()
    group = [dist.new_group([one]) for one in range(2)][rank]  # of this rank alone
    merge_statistics(model, group)
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(sync_statistics(copy.deepcopy(model), group)(x, torch.ones(50, dtype=torch.bool)), y)
    merge_statistics(model)
    return before, norm.running_mean, norm.running_var, x


def test_running_statistics_are_merged_into_those_of_the_mixture(pair):
    (own, mean, var, x), (its, other_mean, other_var, other_x) = pair(of_its_own)
    assert not torch.equal(own, its)
    assert torch.equal(mean, other_mean)
    assert torch.equal(var, other_var)
    model = Net(torch.float64)
    norm = model.memory.query.norm
    norm.momentum = 1.0
    model(torch.cat([x, other_x]), torch.ones(100, dtype=torch.bool))
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, norm.running_var, rtol=0.02, atol=0)  # unbiased with 50 tokens, not with 100


def test_in_one_process_nothing_changes():
    one, other = Net(torch.float32), sync_statistics(Net(torch.float32))
    merge_statistics(other)
    x, mask = batch(0, 0, torch.float32)
    assert torch.equal(one(x, mask), other(x, mask))
    assert torch.equal(one.memory.query.norm.running_var, other.memory.query.norm.running_var)


def test_a_model_without_batchnorm_is_refused():
    with pytest.raises(ValueError, match="model must have a memory with query_norm 'batch'"):
        sync_statistics(Net(torch.float32, "rms"))


def test_merged_statistics_are_those_of_all():
    pieces = [torch.randn(count, 3, dtype=torch.float64) + count for count in (4, 0, 1, 9)]
    sent = [
        torch.cat([torch.tensor([float(len(x))]).double(), x.sum(0) / max(1, len(x)), (x - x.mean(0)).square().sum(0)])
        for x in pieces
    ]
    count, mean, m2 = _merged(sent)
    whole = torch.cat(pieces)
    assert count == 14
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(m2 / count, whole.var(0, correction=0), rtol=1e-14, atol=0)
