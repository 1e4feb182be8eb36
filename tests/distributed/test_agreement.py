"""Ranks do the same or nothing: what one of them cannot do, none does, and what differs at the start is rank 0's."""

import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from memlayers import MemoryConfig, MemoryLayer
from memlayers.diagnosis import doctor
from memlayers.diagnosis.alarms import Monitor
from memlayers.diagnosis.subjects import find_subjects
from memlayers.distributed import check_replicas
from memlayers.distributed.agreement import Ranks, fingerprint
from memlayers.optim import MemoryAdamW, RowAdam


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = MemoryConfig(dim=6, heads=2, topk=2, num_subkeys=10, query_dim=4, query_norm="rms")
    model = nn.Sequential(nn.Linear(6, 6), MemoryLayer(config), MemoryLayer(config))
    for layer in model[1:]:
        layer.values.to(dtype)
    return model


def train(model, optimizer, rank, steps=1):
    for step in range(steps):
        model(torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tables(model, optimizer):
    found = []
    for layer in model[1:]:
        weight = layer.values.weight
        found += [weight.detach().clone(), *(state.clone() for state in optimizer.state[weight].values())]
    return found


def same(one, other):
    assert len(one) == len(other) > 0
    assert [torch.equal(first, second) for first, second in zip(one, other, strict=True)] == [True] * len(one)


def test_one_process_is_no_group():
    assert Ranks.of() is None


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (130, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_a_fingerprint_sees_each_bit_and_where_it_stands(shape, dtype):
    tensor = torch.randn(shape).mul(10).to(dtype)
    first = fingerprint(tensor)
    assert first == fingerprint(tensor.clone())
    flat = torch.cat([tensor.flatten()[:1], tensor.flatten()])
    assert first == fingerprint(flat[1:].view(shape))  # words of 8 bytes begin elsewhere there
    assert -(2**63) <= first < 2**63
    other = tensor.clone()
    other[-1, -1] += 1
    swapped = tensor.roll(1, 0)
    assert len({first, fingerprint(other), fingerprint(swapped), fingerprint(torch.zeros_like(tensor))}) == 4


def from_different_seeds(rank, dtype):
    model = net(seed=rank, dtype=dtype)
    optimizer = RowAdam(model, lr=0.1)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("memlayers").addHandler(handler)
    train(model, optimizer, rank, 3)
    logging.getLogger("memlayers").removeHandler(handler)
    return tables(model, optimizer), messages


@pytest.mark.promise(
    "Several processes",
    "tables that differ between ranks at the first step",
    "supported",
    "they become those of rank 0, as DDP does with other parameters, and the log says so",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_that_differ_at_the_first_step_become_those_of_rank_0(pair, dtype):
    (one, messages), (other, _) = pair(from_different_seeds, dtype)
    same(one, other)
    assert messages == [
        "replicas differed and are as rank 0's from here on: the weight of table 0, the weight of table 1"
    ]


def with_a_state_of_rank(rank, loads):
    """Trains, and goes on in a new optimizer into which only one rank loads the old one's state."""
    model = net()
    optimizer = MemoryAdamW(model, lr=0.0, value_lr=0.1)
    train(model, optimizer, rank, 2)
    state = optimizer.state_dict()
    optimizer.release()
    optimizer = MemoryAdamW(model, lr=0.0, value_lr=0.1)
    optimizer.load_state_dict(state)
    if rank != loads:
        optimizer.state.clear()
    train(model, optimizer, rank)
    return tables(model, optimizer), optimizer.state[model[1].values.weight]["steps"].max()


@pytest.mark.parametrize(("loads", "least"), [(0, 3), (1, 1)])
def test_states_are_those_of_rank_0_as_well(pair, loads, least):
    (one, steps), (other, _) = pair(with_a_state_of_rank, loads)
    same(one, other)
    assert (steps > 1) == (least > 1)


def with_another_state(rank, kind):
    """Goes on in the same optimizer from a state that differs between ranks."""
    model = net()
    optimizer = RowAdam(model) if kind == "RowAdam" else MemoryAdamW(model, lr=0.0)
    train(model, optimizer, rank)
    state = optimizer.state_dict()
    for one in state["state"].values():
        one["exp_avg"] = one["exp_avg"] + rank
    optimizer.load_state_dict(state)
    train(model, optimizer, rank)
    return tables(model, optimizer)


@pytest.mark.parametrize("kind", ["RowAdam", "MemoryAdamW"])
def test_what_was_loaded_is_compared_at_the_next_step(pair, kind):
    same(*pair(with_another_state, kind))


def with_a_fault(rank, kind):
    model = net()
    optimizer = RowAdam(model)
    train(model, optimizer, rank)
    before = tables(model, optimizer)
    if rank == 1 and kind == "fault":
        model(torch.randn(3, 6)).square().mean().backward()
        model[1].values.row_mark.grad = torch.ones(1)
    if rank == 1 and kind == "settings":
        optimizer.param_groups[0]["value_lr"] = 0.5
    if rank == 1 and kind == "steps":
        optimizer.param_groups[0]["updates"] += 1
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        same(before, tables(model, optimizer))
        return type(error).__name__, str(error)


def test_what_one_rank_cannot_do_no_rank_does(pair):
    (kind, other), (_, own) = pair(with_a_fault, "fault")
    assert kind == "RuntimeError"
    assert own.startswith("a value table in row mode has a dense gradient beside its row gradient")
    assert other == f"rank 1 cannot make this step, so no rank makes it: {own}"


@pytest.mark.parametrize(("kind", "text"), [("settings", "value_lr is [0.001, 0.5]"), ("steps", "updates is [1, 2]")])
def test_settings_that_differ_are_refused_on_all_ranks(pair, kind, text):
    for answer in pair(with_a_fault, kind):
        assert answer == ("ValueError", f"replicas must step alike, but by rank {text}")


def idle(rank, who):
    """Only one rank ever has a gradient, or none."""
    model = net()
    optimizer = MemoryAdamW(model)
    for step in range(3):
        if rank == who:
            model(torch.randn(3, 6)).square().mean().backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return step, str(error)


def test_a_rank_without_gradients_is_no_other_model_unless_all_are(pair):
    assert pair(idle, 1) == [None, None]
    for step, message in pair(idle, None):
        assert step == 1
        assert message.startswith("no parameter of this optimizer has ever had a gradient")


def through_a_checkpoint(rank, folder):
    """torch's checkpoints ask an optimizer without a state for one by a step on gradients of zero."""
    model = net()
    optimizer = MemoryAdamW(model, lr=0.0, value_lr=0.1)  # nobody reduces dense gradients here
    train(model, optimizer, rank, 2)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    second = net(seed=5)
    other = MemoryAdamW(second, lr=0.0, value_lr=0.1)
    before = second[1].values.weight.detach().clone()
    weights, state = get_state_dict(second, other)
    assert torch.equal(before, second[1].values.weight)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(second, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    same(tables(model, optimizer), tables(second, other))
    train(model, optimizer, rank, 2)
    train(second, other, rank, 2)
    same(tables(model, optimizer), tables(second, other))
    return tables(model, optimizer)


@pytest.mark.promise(
    "Checkpoints of PyTorch", "`torch.distributed.checkpoint` of replicas in several processes", "supported", ""
)
def test_replicas_go_on_from_a_distributed_checkpoint(pair, tmp_path):
    same(*pair(through_a_checkpoint, str(tmp_path)))


def drifted(rank):
    model = net()
    optimizer = RowAdam(model)
    train(model, optimizer, rank, 2)
    (bias,) = [one for name, one in model.named_parameters() if name == "0.bias"]
    before = check_replicas(model, optimizer)
    with torch.no_grad():
        if rank == 1:
            model[1].values.weight[7, 3] += 1e-6
            optimizer.state[model[2].values.weight]["exp_avg"][5] = 1
            bias[0] = 7
    return before, check_replicas(model, optimizer), check_replicas(model, rows=10)


def test_replicas_that_drifted_apart_are_named(pair):
    for before, after, ten_rows in pair(drifted):
        assert before == []
        assert after == ["0.bias", "1.values.weight", "exp_avg of 2.values.weight"]
        assert ten_rows == ["0.bias"]  # the seventh of 100 is not among them
    assert check_replicas(net()) == []


def watched(rank):
    model = net()
    optimizer = RowAdam(model)
    monitors = [Monitor(subject, window=64) for subject in find_subjects(model)]
    train(model, optimizer, rank)
    before = [monitor.replicas(optimizer) for monitor in monitors]
    if rank == 1:
        optimizer.state[model[2].values.weight]["exp_avg"][5] = 1
    return before, [monitor.replicas(optimizer) for monitor in monitors]


@pytest.mark.promise(
    "Several processes",
    "replicas that drift apart under `MemoryAlarms`",
    "supported",
    "a look compares memories and their moments between processes, and warns",
)
def test_alarms_say_that_replicas_have_drifted_apart(pair):
    alarm = "replicas", "the processes have drifted apart, and differ in exp_avg of values.weight"
    assert pair(watched) == [([None, None], [None, alarm])] * 2


def examined(rank):
    model = net()
    optimizer = MemoryAdamW(model, value_lr=0.1)
    train(model, optimizer, rank)
    before = tables(model, optimizer)
    if rank == 1:  # alone: nobody else is asked
        report = doctor(model, torch.randn(30, 6), optimizer=optimizer)
        assert [finding for finding in report.findings if finding.check == "written"]
    same(before, tables(model, optimizer))
    train(model, optimizer, rank)
    return tables(model, optimizer)


def test_the_doctor_examines_one_rank_and_leaves_the_replicas_the_same(pair):
    same(*pair(examined))
