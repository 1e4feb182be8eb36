"""The state dicts of torch.distributed.checkpoint, in one process: the moments of tables survive, as with AdamW."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from memlayers import MemoryConfig, MemoryLayer
from memlayers.optim import MemoryAdamW, RowAdagrad, RowAdam

KINDS = {
    "MemoryAdamW": lambda model: MemoryAdamW(model, lr=1e-2, value_lr=0.05, weight_decay=0.1),
    "MemoryAdamW, bfloat16": lambda model: MemoryAdamW(model, lr=1e-2, value_lr=0.05, value_moments="bfloat16"),
    "RowAdam": lambda model: RowAdam(model, lr=0.05),
    "RowAdagrad": lambda model: RowAdagrad(model, lr=0.05, per_row=True, max_grad_norm=1.0),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
KINDS_OF = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
FLAT = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])


def net(shared=False):
    torch.manual_seed(0)
    config = MemoryConfig(dim=8, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms")
    first = MemoryLayer(config)
    return nn.Sequential(nn.Linear(8, 8), first, MemoryLayer(config, values=first.values if shared else None))


def train(model, optimizer, steps, seed=0):
    for step in range(steps):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * seed + step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_by_name(model, optimizer):
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def same_state(one, other):
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert state.keys() == other[name].keys(), name
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name][key])), (name, key)
            assert getattr(value, "dtype", None) == getattr(other[name][key], "dtype", None), (name, key)


@pytest.mark.promise(
    "Checkpoints of PyTorch", "`torch.distributed.checkpoint` in one process, nested and flattened", "supported", ""
)
@KINDS_OF
@pytest.mark.parametrize(
    ("flat", "full"), [(False, False), (True, False), (False, True)], ids=["nested", "flat", "full, on the CPU"]
)
def test_a_run_goes_on_from_a_distributed_checkpoint_as_it_would_have(make, flat, full, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=full, cpu_offload=full)
    model = net()
    optimizer = make(model)
    train(model, optimizer, 3)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)

    other = net()
    second = make(other)
    weights, state = get_state_dict(other, second, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        other, second, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    same_state(state_by_name(model, optimizer), state_by_name(other, second))
    for one, its in ((model, optimizer), (other, second)):
        train(one, its, 2, seed=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    same_state(state_by_name(model, optimizer), state_by_name(other, second))


@FLAT
def test_the_optimizer_alone_with_a_table_of_two_layers(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = net(shared=True), net(shared=True)
    optimizer, second = KINDS["MemoryAdamW"](model), KINDS["MemoryAdamW"](other)
    train(model, optimizer, 2)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, second, state, options=options)
    same_state(state_by_name(model, optimizer), state_by_name(other, second))
    steps = second.state[other[1].values.weight]["steps"]
    assert steps.dtype == torch.int32
    assert steps.any()


@KINDS_OF
def test_asking_a_new_optimizer_for_its_state_changes_no_weight(make):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make(model)
    get_optimizer_state_dict(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["MemoryAdamW", "RowAdam"])
def test_chosen_rows_and_all_moments_come_back_where_rows_were_chosen_before_the_first_step(kind, tmp_path):
    model = net(shared=True)
    optimizer = KINDS[kind](model)
    optimizer.choose_rows([1, 2, 3])
    train(model, optimizer, 3)
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path)
    other = KINDS[kind](model := net(shared=True))
    other.choose_rows([0])
    state = get_optimizer_state_dict(model, other)
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, other, optim_state_dict=state)
    assert [rows.tolist() for rows in other.chosen_rows.values()] == [[1, 2, 3]]
    states = [list(one.state_dict()["state"].values()) for one in (optimizer, other)]
    assert len(states[0]) == len(states[1])
    for mine, others in zip(*states, strict=True):
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(others[name])) for name in mine)
