"""Replicas of a table in two processes: each step is that of one process with the micro-batches of both."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from memlayers import MemoryConfig, MemoryLayer, MemoryPlus
from memlayers.optim import MemoryAdamW, RowAdagrad, RowAdam, RowSGD

SIZES = (5, 3)  # tokens of a micro-batch, by rank


class Net(nn.Module):
    """Two memories of one table behind a linear map."""

    def __init__(self, kind=MemoryLayer, dtype=torch.float32, recompute=None, num_subkeys=20, **settings):
        super().__init__()
        torch.manual_seed(0)
        config = MemoryConfig(
            dim=8, heads=2, topk=2, num_subkeys=num_subkeys, query_dim=4, **{"query_norm": "rms", **settings}
        )
        self.linear = nn.Linear(8, 8)
        self.first = kind(config)
        self.second = kind(config, values=self.first.values)
        self.first.values.to(dtype)
        self.recompute = recompute

    def forward(self, x, mask=None):
        x = self.linear(x)
        for layer in (self.first, self.second):
            if self.recompute is None:
                x = x + layer(x, mask)
            else:
                x = x + checkpoint(layer, x, mask, use_reentrant=self.recompute)
        return x if mask is None else x[mask]


def batch(step, micro, rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    x = torch.randn(SIZES[rank], 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(SIZES[rank], generator=generator) < (0.8, 0.4)[rank]


def state_of(model, optimizer):
    """All that must be the same, as bytes: NaN is NaN, and -0 is not 0."""
    tensors = {name: value for name, value in model.state_dict().items() if "running" not in name}
    for number, state in enumerate(optimizer.state.values()):
        tensors |= {f"{name} {number}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same_bits = torch.equal(value.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        assert same_bits, f"{name}: {value}, {other[name]}"


def adamw(model, **settings):
    return MemoryAdamW(model, lr=1e-2, value_lr=5e-2, weight_decay=0.1, **settings)


KINDS = {
    "plain": ({}, {}),
    "clipped": ({}, {"value_max_grad_norm": 0.02}),
    "bfloat16, stochastic": ({"dtype": torch.bfloat16}, {"value_max_grad_norm": 0.02}),
    "moments in bfloat16": ({"dtype": torch.bfloat16}, {"value_moments": "bfloat16"}),
    "Memory+": ({"kind": MemoryPlus}, {}),
    "BatchNorm of each rank": ({"query_norm": "batch"}, {}),
    "checkpointing": ({"recompute": False}, {}),
    "reentrant checkpointing": ({"recompute": True}, {}),
}


def loss_of(model, step, micro, rank, *, is_masked=True, tokens=None):
    x, mask = batch(step, micro, rank)
    return model(x[:tokens].requires_grad_(), mask[:tokens] if is_masked else None).square().sum() / 5


def run(model, optimizer, losses):
    """A step for each list of losses."""
    for parts in losses:
        for loss in parts:
            loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return state_of(getattr(model, "module", model), optimizer)


def train_one_of_two(rank, net_settings, settings, steps, is_compiled=False):
    model = Net(**net_settings)
    optimizer = adamw(model, **settings)
    replica = DistributedDataParallel(model)
    called = torch.compile(replica, backend="aot_eager") if is_compiled else replica
    losses = [[partial(loss_of, called, step, 0, rank, is_masked=not is_compiled)] for step in range(steps)]
    state = run(replica, optimizer, losses)
    assert model.first.values.weight.requires_grad  # torch's checkpoints leave out the state of what is frozen
    return state


def train_alone(net_settings, settings, steps, is_masked=True):
    model = Net(**net_settings)
    optimizer = adamw(model, **settings)

    def loss(step, rank):
        return loss_of(model, step, 0, rank, is_masked=is_masked) / 2

    return run(model, optimizer, [[partial(loss, step, rank) for rank in range(2)] for step in range(steps)])


@pytest.mark.promise(
    "Several processes",
    "`DistributedDataParallel` and a row optimizer",
    "supported",
    "build `MemoryAdamW(model)` before; a step is that of one process with the micro-batches of all ranks, bit for bit",
)
@pytest.mark.parametrize(("net_settings", "settings"), KINDS.values(), ids=KINDS)
def test_two_ranks_are_one_process_with_two_micro_batches(pair, net_settings, settings):
    one, other = pair(train_one_of_two, net_settings, settings, 4)
    same(one, other)
    same(one, train_alone(net_settings, settings, 4))


@pytest.mark.slow
def test_a_compiled_replica_is_one_process_too(pair):
    one, other = pair(train_one_of_two, {}, {}, 3, True)
    same(one, other)
    same(one, train_alone({}, {}, 3, is_masked=False))


OTHERS = {
    "RowAdam": lambda model: RowAdam(model, lr=0.05),
    "RowAdagrad": lambda model: RowAdagrad(model, per_row=True, max_grad_norm=0.02),
    "RowSGD": lambda model: RowSGD(model, lr=0.5),
}


def accumulate_in_one_of_two(rank, kind, steps):
    model = Net().requires_grad_(False)
    model.first.values.requires_grad_(True)
    optimizer = OTHERS[kind](model)
    return run(model, optimizer, [[partial(loss_of, model, step, n, rank) for n in range(3)] for step in range(steps)])


@pytest.mark.parametrize("kind", OTHERS)
def test_accumulated_parts_stand_in_the_order_of_micro_batches_and_then_of_ranks(pair, kind):
    one, other = pair(accumulate_in_one_of_two, kind, 2)
    same(one, other)
    model = Net().requires_grad_(False)
    model.first.values.requires_grad_(True)
    order = [(micro, rank) for micro in range(3) for rank in range(2)]

    def loss(step, micro, rank):
        return loss_of(model, step, micro, rank) / 2

    same(one, run(model, OTHERS[kind](model), [[partial(loss, step, *at) for at in order] for step in range(2)]))


def train_long(rank, size, steps, dtype):
    """Accumulation, clipping, masks; ranks with fewer tokens, with none, and with masked ones alone."""
    model = Net(dtype=dtype)
    optimizer = adamw(model, value_max_grad_norm=0.02)
    replica = DistributedDataParallel(model)
    initial = model.first.values.weight.detach().clone()
    for step in range(steps):
        for micro in range(2):
            x, mask = batch(step, micro + 2 * rank, (rank + step) % 2)
            if (step + rank) % 5 == 0 or step == 1:  # in the second step nobody has a token
                x, mask = x[:0], mask[:0]
            elif (step + rank) % 5 == 1:
                mask = torch.zeros_like(mask)
            with replica.no_sync() if micro == 0 else nullcontext():
                (replica(x.requires_grad_(), mask).square().sum() / 10).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(initial, model.first.values.weight)
    return state_of(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_stay_the_same_with_uneven_and_empty_ranks(pair, dtype):
    one, other = pair(train_long, 2, 20, dtype)
    same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_stay_the_same_for_200_steps(size, tmp_path, start_ranks):
    with start_ranks(tmp_path, size) as call:
        for dtype in (torch.float32, torch.bfloat16):
            one, *others = call(train_long, size, 200, dtype)
            for other in others:
                same(one, other)


def train_by_hand(rank, pattern):
    """Without a wrapper, so that a rank may have no backward pass at all; dense gradients are summed here."""
    model = Net()
    optimizer = adamw(model)
    for step, who in enumerate(pattern):
        if rank in who:
            loss_of(model, step, 0, rank).backward()
        for name, parameter in model.named_parameters():
            if "values" not in name:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, optimizer)


def test_a_rank_that_recorded_nothing_makes_the_step_of_the_others(pair):
    pattern = [(0, 1), (0,), (1,)]
    one, other = pair(train_by_hand, pattern)
    same(one, other)
    model = Net()
    optimizer = adamw(model)
    for step, who in enumerate(pattern):
        for rank in who:
            (loss_of(model, step, 0, rank) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    same(one, state_of(model, optimizer))


def test_a_step_on_which_nobody_recorded_anything_leaves_tables_and_their_states_alone(pair):
    before, _ = pair(train_by_hand, [(0, 1)])
    one, other = pair(train_by_hand, [(0, 1), ()])
    same(one, other)
    names = [name for name in before if "values" in name or name.startswith(("exp_avg", "steps"))][-3:]
    names.append("first.values.weight")
    assert [before[name].shape[0] for name in names] == [400, 400, 400, 400]
    same({name: before[name] for name in names}, {name: one[name] for name in names})


def test_where_factors_are_more_than_the_table_its_sums_are_reduced(pair):
    """Nine slots: a dense gradient is the smaller message."""
    one, other = pair(train_one_of_two, {"num_subkeys": 3}, {"value_max_grad_norm": 0.02}, 3)
    same(one, other)
    alone = train_alone({"num_subkeys": 3}, {"value_max_grad_norm": 0.02}, 3)
    for name, value in alone.items():
        torch.testing.assert_close(one[name], value, msg=name, rtol=2e-4, atol=1e-6)


def hook_in_one_of_two(rank):
    model = Net()
    optimizer = RowAdam(model)
    seen = []
    model.first.values.register_row_hook(lambda gradient: seen.append((gradient.slots, gradient.norm())))
    loss_of(model, 0, 0, rank).backward()
    optimizer.step()
    return seen


def test_hooks_of_rows_see_what_all_ranks_recorded(pair):
    ((slots, norm),), ((other_slots, other_norm),) = pair(hook_in_one_of_two)
    model = Net()
    optimizer = RowAdam(model)
    for rank in range(2):
        (loss_of(model, 0, 0, rank) / 2).backward()
    gradient = model.first.values.row_gradient
    assert slots.tolist() == other_slots.tolist()
    assert norm == other_norm == gradient.norm()
    assert set(slots.tolist()) == {
        slot for part in gradient.held() for slot in part.slots_TK[part.weights_TK != 0].tolist()
    }
    del optimizer


def chosen_in_one_of_two(rank, rows_by_rank):
    model = Net()
    optimizer = adamw(model, value_max_grad_norm=0.02)
    replica = DistributedDataParallel(model)
    optimizer.choose_rows(rows_by_rank[rank])
    try:
        return run(replica, optimizer, [[partial(loss_of, replica, step, 0, rank)] for step in range(2)])
    except ValueError as error:
        return str(error)


def test_the_same_rows_are_chosen_on_all_ranks_or_the_step_is_refused(pair):
    rows = list(range(0, 400, 2))
    one, other = pair(chosen_in_one_of_two, [rows, rows])
    same(one, other)
    model = Net()
    optimizer = adamw(model, value_max_grad_norm=0.02)
    optimizer.choose_rows(rows)
    losses = [[lambda step=step, rank=rank: loss_of(model, step, 0, rank) / 2 for rank in range(2)] for step in (0, 1)]
    same(one, run(model, optimizer, losses))
    for said in pair(chosen_in_one_of_two, [rows, rows[1:]]):
        assert "replicas must step alike, but by rank the choice of rows is" in said


def frozen_in_one_of_two(rank, what):
    model = Net()
    table = model.first.values
    (table if what == "module" else table.weight).requires_grad_(False)
    before = table.weight.detach().clone()
    optimizer = adamw(model)
    replica = DistributedDataParallel(model)
    state = run(replica, optimizer, [[partial(loss_of, replica, step, 0, rank)] for step in range(2)])
    assert torch.equal(before, table.weight)
    return state


@pytest.mark.parametrize("what", ["module", "weight"])
def test_a_frozen_table_stays_as_it_is(pair, what):
    same(*pair(frozen_in_one_of_two, what))


def in_groups_of_one(rank):
    groups = [torch.distributed.new_group([number]) for number in range(2)]
    model = Net()
    optimizer = RowAdam(model, process_group=groups[rank])
    if rank == 0:  # alone: nobody else is asked
        loss_of(model, 0, 0, rank).backward()
        optimizer.step()
    try:
        RowAdam(Net(), process_group=groups[1 - rank]).step()
    except ValueError as error:
        return str(error)


def test_a_process_group_says_who_takes_part(pair):
    for message in pair(in_groups_of_one):
        assert "process_group must be a group that this process is in" in message
