"""Tables in columns over two and four processes: the step of one process, with a part of the table and its moments."""

import io
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus, ValueTable
from memlayers.distributed import check_replicas, shard_tables, traffic
from memlayers.distributed.agreement import own_part
from memlayers.distributed.whole import whole_tables
from memlayers.optim import MemoryAdamW, RowAdagrad, RowAdam, RowSGD
from memlayers.values import value_tables

WIDTH = 64
SIZES = (5, 3, 4, 2)  # tokens of a micro-batch, by rank


class Net(nn.Module):
    """Two memories of one table behind a linear map, side by side or one behind the other."""

    def __init__(
        self,
        kind=MemoryLayer,
        dtype=torch.float32,
        recompute=None,
        num_subkeys=20,
        width=WIDTH,
        is_chain=True,
        **settings,
    ):
        super().__init__()
        torch.manual_seed(0)
        config = MemoryConfig(
            dim=width, heads=2, topk=2, num_subkeys=num_subkeys, query_dim=4, **{"query_norm": "rms", **settings}
        )
        self.linear = nn.Linear(width, width)
        self.first = kind(config)
        self.second = kind(config, values=self.first.values)
        self.first.values.to(dtype)
        self.recompute, self.is_chain = recompute, is_chain

    def forward(self, x, mask=None):
        x = y = self.linear(x)
        for layer in (self.first, self.second):
            given = y if self.is_chain else x
            if self.recompute is None:
                y = y + layer(given, mask)
            else:
                y = y + checkpoint(layer, given, mask, use_reentrant=self.recompute)
        return y if mask is None else y[mask]


def in_columns(model, size=2, replicas=1):
    # Here: its import takes a second.
    from torch.distributed.device_mesh import init_device_mesh

    shape = (size,) if replicas == 1 else (replicas, size)
    return shard_tables(model, init_device_mesh("cpu", shape))


def batch(step, micro, rank, width=WIDTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    x = torch.randn(SIZES[rank], width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(SIZES[rank], generator=generator) < (0.8, 0.4, 0.9, 0.5)[rank]


def loss_of(model, step, micro, rank, *, width=WIDTH, dtype=torch.float32, is_masked=True):
    x, mask = batch(step, micro, rank, width, dtype)
    return model(x.requires_grad_(), mask if is_masked else None).square().sum() / 5


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else torch.as_tensor(tensor)


def state_of(model, optimizer):
    """All parameters and states, whole."""
    tensors = {name: value for name, value in model.state_dict().items() if "running" not in name}
    for number, state in enumerate(optimizer.state.values()):
        tensors |= {f"{name} {number}": value for name, value in state.items()}
    return {name: whole(value).detach().clone() for name, value in tensors.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same_bits = torch.equal(value.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        assert same_bits, f"{name}: {value}, {other[name]}"


def close(one, other, tolerance):
    """To a part of each tensor's norm."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = torch.linalg.vector_norm(value.double() - other[name].double())
        assert difference <= tolerance * (torch.linalg.vector_norm(other[name].double()) + 1e-6), (name, difference)


def said(error, function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except error as caught:
        return str(caught)
    return None


def adamw(model, **settings):
    return MemoryAdamW(model, lr=1e-2, value_lr=5e-2, weight_decay=0.1, **settings)


def frozen_but_for_the_table(model):
    model.requires_grad_(False)
    model.first.values.requires_grad_(True)
    return model


def steps(model, optimizer, losses):
    for parts in losses:
        for loss in parts:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(getattr(model, "module", model), optimizer)


def of_chosen_rows(model):
    optimizer = RowAdam(model, lr=0.05)
    optimizer.choose_rows(range(0, len(model.first.values.weight), 3))
    return optimizer


TABLE_ALONE = {
    "RowAdam": ({}, lambda model: RowAdam(model, lr=0.05)),
    "RowAdagrad": ({}, lambda model: RowAdagrad(model, lr=0.05)),
    "RowSGD, bfloat16": ({"dtype": torch.bfloat16}, lambda model: RowSGD(model, lr=0.5)),
    "bfloat16": ({"dtype": torch.bfloat16}, lambda model: RowAdam(model, lr=0.05)),
    "bfloat16, to the nearest": ({"dtype": torch.bfloat16}, lambda model: RowAdam(model, rounding="nearest")),
    "moments in bfloat16": ({"dtype": torch.bfloat16}, lambda model: RowAdam(model, lr=0.05, moments="bfloat16")),
    "Memory+": ({"kind": MemoryPlus}, lambda model: RowAdam(model, lr=0.05)),
    "chosen rows": ({}, of_chosen_rows),
}


def train_the_table_in_columns(rank, size, kind):
    settings, make = TABLE_ALONE[kind]
    model = frozen_but_for_the_table(in_columns(Net(is_chain=False, **settings), size))
    return steps(
        model, make(model), [[partial(loss_of, model, step, micro, rank) for micro in range(2)] for step in range(3)]
    )


def train_the_table_alone(size, kind):
    settings, make = TABLE_ALONE[kind]
    model = frozen_but_for_the_table(Net(is_chain=False, **settings))

    def loss(*at):
        return loss_of(model, *at) / size

    order = [(micro, rank) for micro in range(2) for rank in range(size)]
    return steps(model, make(model), [[partial(loss, step, *at) for at in order] for step in range(3)])


@pytest.mark.parametrize("kind", TABLE_ALONE)
def test_a_table_in_columns_is_one_of_one_process_with_the_micro_batches_of_all_ranks(pair, kind):
    """Bit for bit, and so are its moments and the counts of reads; with masks, accumulation, and two layers a table.

    Only the table is trained: the gradients of weights are sums over columns, which are rounded in another order.
    """
    one, other = pair(train_the_table_in_columns, 2, kind)
    same(one, other)
    same(one, train_the_table_alone(2, kind))


ALL_TRAINED = {
    "plain": ({}, {}),
    "clipped": ({}, {"value_max_grad_norm": 0.02}),
    "Memory+": ({"kind": MemoryPlus}, {}),
    "columns that do not divide": ({"width": 65}, {}),
    "BatchNorm of each rank": ({"query_norm": "batch"}, {}),
    "checkpointing": ({"recompute": False}, {}),
    "reentrant checkpointing": ({"recompute": True}, {}),
}


def train_all_in_columns(rank, size, net_settings, settings, count, dtype=torch.float32, *, is_compiled=False):
    model = in_columns(Net(**net_settings).to(dtype), size)
    optimizer = adamw(model, **settings)
    replica = DistributedDataParallel(model)
    called = torch.compile(replica, backend="aot_eager") if is_compiled else replica
    how = {"width": net_settings.get("width", WIDTH), "dtype": dtype, "is_masked": not is_compiled}
    return steps(replica, optimizer, [[partial(loss_of, called, step, 0, rank, **how)] for step in range(count)])


def train_all_alone(size, net_settings, settings, count, dtype=torch.float32, *, is_masked=True):
    model = Net(**net_settings).to(dtype)
    how = {"width": net_settings.get("width", WIDTH), "dtype": dtype, "is_masked": is_masked}

    def loss(step, rank):
        return loss_of(model, step, 0, rank, **how) / size

    return steps(
        model, adamw(model, **settings), [[partial(loss, step, rank) for rank in range(size)] for step in range(count)]
    )


@pytest.mark.promise(
    "Several processes",
    "tables in columns: each rank holds some columns of a table and of its moments",
    "supported",
    "`shard_tables(model, mesh)`, then `MemoryAdamW(model)`, then `DistributedDataParallel`; a step is that of one "
    "process to rounding",
)
@pytest.mark.parametrize(("net_settings", "settings"), ALL_TRAINED.values(), ids=ALL_TRAINED)
def test_a_step_under_ddp_is_that_of_one_process(pair, net_settings, settings):
    """In float64: Adam makes much of rounding where a gradient is nearly zero."""
    one, other = pair(train_all_in_columns, 2, net_settings, settings, 3, torch.float64)
    same(one, other)
    close(one, train_all_alone(2, net_settings, settings, 3, torch.float64), 1e-9)


@pytest.mark.slow
def test_200_steps_in_float64_are_those_of_one_process(pair):
    one, other = pair(train_all_in_columns, 2, {}, {"value_max_grad_norm": 0.02}, 200, torch.float64)
    same(one, other)
    close(one, train_all_alone(2, {}, {"value_max_grad_norm": 0.02}, 200, torch.float64), 1e-9)


@pytest.mark.slow
def test_four_ranks(tmp_path, start_ranks):
    with start_ranks(tmp_path, 4) as call:
        for settings in ({}, {"width": 66}):
            one, *others = call(train_all_in_columns, 4, settings, {}, 20, torch.float64)
            for other in others:
                same(one, other)
            close(one, train_all_alone(4, settings, {}, 20, torch.float64), 1e-9)
        for kind in TABLE_ALONE:
            same(call(train_the_table_in_columns, 4, kind)[3], train_the_table_alone(4, kind))


@pytest.mark.slow
def test_a_compiled_model_is_one_process_too(pair):
    one, other = pair(train_compiled, 3)
    same(one, other)
    close(one, train_all_alone(2, {}, {}, 3, torch.float64, is_masked=False), 1e-9)


def train_compiled(rank, count):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute")  # torch looks at it itself
        return train_all_in_columns(rank, 2, {}, {}, count, torch.float64, is_compiled=True)


def train_in_16_bits(rank, size):
    """The table is moved to its dtype when it is in columns (or not); the rest runs under autocast."""
    model = Net(is_chain=False)
    if size > 1:
        in_columns(model, size)
    model.first.values.bfloat16()
    frozen_but_for_the_table(model)

    def loss(step, rank):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, step, 0, rank) / (1 if size > 1 else 2)

    ranks = [rank] if size > 1 else [0, 1]
    return steps(
        model, RowAdam(model, lr=0.05), [[partial(loss, step, number) for number in ranks] for step in range(2)]
    )


def test_a_table_in_columns_may_change_its_dtype_and_run_under_autocast(pair):
    one, other = pair(train_in_16_bits, 2)
    same(one, other)
    assert one["first.values.weight"].dtype == torch.bfloat16
    same(one, train_in_16_bits(0, 1))


def gradients_in_columns(rank, dtype):
    model = in_columns(Net().to(dtype))
    optimizer = RowAdam(model)
    loss_of(model, 0, 0, rank, dtype=dtype).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if "values" not in name:
            dist.all_reduce(parameter.grad)
            found[name] = parameter.grad / 2
    table = model.first.values
    columns_SC = own_part(table.weight).zero_()
    for slots, weights, grads in table.row_gradient.held():
        for token in range(len(grads)):
            columns_SC.index_add_(0, slots[token], weights[token, :, None].to(dtype) * grads[token] / 2)
    found["row gradient"] = whole(table.weight).detach().clone()
    assert torch.allclose(table.row_gradient.norm() / 2, found["row gradient"].norm())
    del optimizer
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"])
def test_gradients_are_those_of_the_concatenated_batch(pair, dtype, tolerance):
    one, other = pair(gradients_in_columns, dtype)
    same(one, other)
    model = Net().to(dtype)
    parts = [batch(0, 0, rank, dtype=dtype) for rank in range(2)]
    x, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    (model(x, mask).square().sum() / 10).backward()
    alone = {name: parameter.grad for name, parameter in model.named_parameters() if "values" not in name}
    close(one, {**alone, "row gradient": model.first.values.weight.grad}, tolerance)


def train_unevenly(rank, dtype):
    """Ranks with fewer tokens, with none, and with masked ones alone; in the second step nobody has any."""
    model = in_columns(Net(dtype=dtype))
    optimizer = adamw(model, value_max_grad_norm=0.02)
    replica = DistributedDataParallel(model)
    before = state_of(model, optimizer)["first.values.weight"]
    for step in range(10):
        for micro in range(2):
            x, mask = batch(step, micro + 2 * rank, (rank + step) % 2)
            if (step + rank) % 5 == 0 or step == 1:
                x, mask = x[:0], mask[:0]
            elif (step + rank) % 5 == 1:
                mask = torch.zeros_like(mask)
            with replica.no_sync() if micro == 0 else nullcontext():
                (replica(x.requires_grad_(), mask).square().sum() / 10).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            counts = optimizer.state[model.first.values.weight]["steps"].clone()
    after = state_of(model, optimizer)
    assert not torch.equal(before, after["first.values.weight"])
    assert not torch.equal(counts, optimizer.state[model.first.values.weight]["steps"])
    return after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_may_have_fewer_tokens_or_none(pair, dtype):
    one, other = pair(train_unevenly, dtype)
    same(one, other)
    assert torch.isfinite(one["first.values.weight"]).all()


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(one) and not hasattr(one, "placements") and not one.is_meta:
                self.most = max(self.most, one.untyped_storage().nbytes())
        return result


@contextmanager
def few_rows_at_a_time():
    from memlayers.distributed import columns

    before, columns.CHUNK_ELEMENTS = columns.CHUNK_ELEMENTS, 1000
    yield
    columns.CHUNK_ELEMENTS = before


def measured(rank):
    config = MemoryConfig(dim=32, heads=2, topk=2, num_subkeys=40, query_dim=4, query_norm="rms")
    with Largest() as largest, few_rows_at_a_time():
        table = ValueTable(config.slots, 32, device="meta")
        model = in_columns(MemoryLayer(config, values=table))
        optimizer = MemoryAdamW(model, value_max_grad_norm=0.1)
        for _ in range(2):
            model(torch.randn(5, 32)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    weight = model.values.weight
    tensors = [weight, *(state for state in optimizer.state[weight].values() if state.ndim == 2)]
    kept = [own_part(tensor).untyped_storage().nbytes() for tensor in tensors]
    return largest.most, kept


def test_a_rank_holds_its_share_of_a_table_and_never_makes_a_whole_one(pair):
    for most, kept in pair(measured):
        assert most == 1600 * 16 * 4  # where the table is 1600 x 32
        assert kept == [1600 * 16 * 4] * 3


def fresh(rank, width):
    torch.manual_seed(3)
    with few_rows_at_a_time():
        return whole(in_columns(ValueTable(100, width, device="meta")).weight).detach()


@pytest.mark.parametrize("width", [32, 7])
def test_a_table_without_storage_gets_the_values_of_one_process(pair, width):
    for found in pair(fresh, width):
        torch.manual_seed(3)
        assert torch.equal(found, ValueTable(100, width).weight)


def loaded_whole(rank, weights, optimizer_state):
    model = in_columns(Net())
    optimizer = adamw(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    return state_of(model, optimizer)


def test_whole_weights_and_states_are_loaded_into_columns(pair):
    torch.manual_seed(5)
    model = Net()
    model.first.values.reset_parameters()
    optimizer = adamw(model)
    loss_of(model, 0, 0, 0).backward()
    optimizer.step()
    for found in pair(loaded_whole, model.state_dict(), optimizer.state_dict()):
        same(found, state_of(model, optimizer))


def hooked(rank):
    model = in_columns(Net())
    optimizer = RowAdam(model, max_grad_norm=0.01)
    seen = []
    model.first.values.register_row_hook(lambda gradient: seen.append((gradient.slots, gradient.norm())))
    loss_of(model, 0, 0, rank).backward()
    optimizer.step()
    return seen


def test_hooks_of_rows_see_the_norm_over_all_columns(pair):
    ((slots, norm),), ((other_slots, other_norm),) = pair(hooked)
    model = Net()
    optimizer = RowAdam(model)
    for rank in range(2):
        (loss_of(model, 0, 0, rank) / 2).backward()
    assert slots.tolist() == other_slots.tolist() == sorted(set(slots.tolist()))
    assert norm == other_norm
    torch.testing.assert_close(norm, model.first.values.row_gradient.norm())
    del optimizer


def finite_by_rank(rank):
    """Rank 1 has a token whose gradient is infinite in the first column."""
    model = in_columns(Net())
    optimizer = RowAdam(model)
    loss_of(model, 0, 0, rank).backward()
    before = bool(model.first.values.row_gradient.is_finite())
    y = model.first(batch(0, 0, rank)[0])
    (y[0, 0] * (torch.inf if rank == 1 else 1)).backward()
    after = bool(model.first.values.row_gradient.is_finite())
    del optimizer
    return before, after


def test_all_ranks_see_whether_a_gradient_is_finite(pair):
    assert pair(finite_by_rank) == [(True, False), (True, False)]


def copied(rank):
    model = in_columns(Net())
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = RowAdam(model)
    copy = deepcopy(model)
    steps(model, optimizer, [[partial(loss_of, model, 0, 0, rank)]])
    average.update_parameters(model)
    average.update_parameters(model)
    with torch.no_grad():
        same_loss = torch.equal(loss_of(average.module, 1, 0, rank), loss_of(model, 1, 0, rank))
        other_loss = torch.equal(loss_of(copy, 1, 0, rank), loss_of(model, 1, 0, rank))
    return same_loss, other_loss, said(RuntimeError, loss_of(copy, 0, 0, rank).backward)


def test_copies_read_columns_of_their_own_and_have_no_optimizer(pair):
    for same_loss, other_loss, message in pair(copied):
        assert same_loss
        assert not other_loss
        assert "build its row optimizer" in message


def watched(rank):
    """What an alarm says of a step that writes rows, and of one that writes none."""
    from memlayers.diagnosis.alarms import Monitor
    from memlayers.diagnosis.subjects import find_subjects

    model = in_columns(Net())
    optimizer = RowAdam(model, lr=0.1)
    answers = []
    with Monitor(find_subjects(model)[0], window=16) as monitor:
        for _ in range(2):
            loss_of(model, 0, 0, rank).backward()
            monitor.note_rows()
            optimizer.step()
            answers.append(monitor.written())
            optimizer.param_groups[0]["value_lr"] = 0.0
    return answers


def test_alarms_look_at_the_columns_of_their_rank(pair):
    for fine, (check, message) in pair(watched):
        assert fine is None
        assert check == "written"
        assert "wrote none of" in message


def scaled_by_rank(rank, factors):
    model = in_columns(Net())
    optimizer = RowAdam(model)
    loss_of(model, 0, 0, rank).backward()
    model.first.values.row_mark.grad.mul_(factors[rank])
    return said(RuntimeError, optimizer.step)


def loaded_from_another_rank(rank, what):
    """As where one rank writes what `torch.save` takes, and all read it."""
    model = in_columns(Net())
    optimizer = RowAdam(model)
    steps(model, optimizer, [[partial(loss_of, model, 0, 0, rank)]])
    file = io.BytesIO()
    torch.save((model if what == "weights" else optimizer).state_dict(), file)
    files = [None, None]
    dist.all_gather_object(files, file.getvalue())
    read = torch.load(io.BytesIO(files[0 if what != "own state" else rank]), weights_only=False)
    (model if what == "weights" else optimizer).load_state_dict(read)
    if what == "weights":
        optimizer.release()
        optimizer = RowAdam(model)
    loss_of(model, 0, 0, rank).backward()
    return said(RuntimeError, optimizer.step)


def test_columns_of_another_rank_are_refused(pair):
    assert pair(loaded_from_another_rank, "own state") == [None, None]
    for what in ("weights", "state"):
        for message in pair(loaded_from_another_rank, what):
            assert "two ranks hold the same columns" in message
            assert "torch.distributed.checkpoint" in message


def test_a_gradient_that_is_not_scaled_alike_on_all_ranks_is_refused(pair):
    assert pair(scaled_by_rank, [0.5, 0.5]) == [None, None]
    for message in pair(scaled_by_rank, [0.5, 0.25]):
        assert "was not scaled alike on all ranks" in message
        assert "scale the loss before backward" in message


def frozen(rank):
    model = in_columns(Net().double())
    table = model.first.values
    table.requires_grad_(False)
    before = own_part(table.weight).clone()
    optimizer = adamw(model)
    replica = DistributedDataParallel(model)
    state = steps(
        replica, optimizer, [[partial(loss_of, replica, step, 0, rank, dtype=torch.float64)] for step in range(2)]
    )
    assert torch.equal(before, own_part(table.weight))
    return state


def test_a_frozen_table_stays_as_it_is_and_the_rest_is_trained(pair):
    one, other = pair(frozen)
    same(one, other)
    model = Net().double()
    model.first.values.requires_grad_(False)

    def loss(step, rank):
        return loss_of(model, step, 0, rank, dtype=torch.float64) / 2

    losses = [[partial(loss, step, rank) for rank in range(2)] for step in range(2)]
    close(one, steps(model, adamw(model), losses), 1e-9)


def refused(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from memlayers.diagnosis import doctor

    mesh = init_device_mesh("cpu", (2,))
    config = MemoryConfig(dim=8, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms")
    answers = {
        "no table": said(ValueError, shard_tables, nn.Linear(2, 2), mesh),
        "experts": said(ValueError, shard_tables, Experts(config), mesh),
        "wrapped": said(ValueError, shard_tables, DistributedDataParallel(Net()), mesh),
        "sharded": said(ValueError, shard_tables, fully_shard(Net(), mesh=mesh), mesh),
        "too few columns": said(ValueError, shard_tables, ValueTable(10, 1), mesh),
    }
    model = Net()
    optimizer = RowAdam(model)
    answers["owned"] = said(ValueError, shard_tables, model, mesh)
    optimizer.release()
    shard_tables(model, mesh)
    answers["twice"] = said(ValueError, shard_tables, model, mesh)
    answers["no optimizer"] = said(RuntimeError, loss_of(model, 0, 0, rank).backward)
    answers["one number a row"] = said(ValueError, RowAdagrad, model, per_row=True)
    answers["a group"] = said(ValueError, RowAdam, model, process_group=dist.group.WORLD)
    answers["a mixture"] = said(ValueError, RowAdam, [model.first.values, ValueTable(5, 5)])
    optimizer = RowAdam(model)
    answers["alone"] = said(RuntimeError, doctor, model, torch.randn(30, WIDTH), optimizer=optimizer)
    loss_of(model, 0, 0, rank).backward()
    optimizer.step()
    whole_model = Net()
    answers["a state in columns"] = said(ValueError, RowAdam(whole_model).load_state_dict, optimizer.state_dict())
    model.first.values.weight.grad = torch.ones_like(model.first.values.weight)
    answers["dense"] = said(RuntimeError, optimizer.step)
    return answers


def at_different_places(rank, what):
    """Rank 0 evaluates or saves alone, while the others train."""
    model = in_columns(Net())
    optimizer = RowAdam(model)
    if rank == 1:
        return said(RuntimeError, loss_of, model, 0, 0, rank)
    if what == "evaluation":
        return said(RuntimeError, torch.no_grad()(loss_of), model, 0, 0, rank)
    del optimizer
    with tempfile.TemporaryDirectory() as folder:
        return said(RuntimeError, whole_tables(value_tables(model), folder).__enter__)


def test_a_rank_that_evaluates_or_saves_alone_is_told_so(pair):
    for what, where in {"evaluation": "a pass without gradients", "save": "a save"}.items():
        for message in pair(at_different_places, what):
            assert f"got rank 0 in {where}, rank 1 in a forward pass" in message


REFUSED = {
    "no table": "at least one value table, got none",
    "experts": "must be plain ones, got ExpertTable: keep these as replicas",
    "wrapped": "not be wrapped in DistributedDataParallel yet: shard_tables comes first",
    "sharded": "call shard_tables before fully_shard",
    "too few columns": "a table of width 1 cannot be divided among 2 ranks: use a smaller mesh",
    "owned": "build it after shard_tables",
    "twice": "shard_tables is called once",
    "no optimizer": "build its row optimizer (MemoryAdamW",
    "one number a row": "per_row must be False for tables in columns",
    "a group": "process_group must be None for tables in columns",
    "a mixture": "must all be in columns of one mesh, or none",
    "alone": "examine the model (doctor) before shard_tables",
    "a state in columns": "must be whole, or in columns of as many ranks as the table, 1, got 2",
    "dense": "call zero_grad() and leave weight.grad alone",
}


@pytest.mark.promise(
    "Several processes",
    "tables in columns of `Experts`, with `RowAdagrad(per_row=True)` or without a row optimizer",
    "refused",
    "keep replicas of the tables; `RowAdagrad` with numbers an element, `RowAdam`; build the optimizer",
)
def test_what_is_refused_says_the_remedy(pair):
    for answers in pair(refused):
        assert answers.keys() == REFUSED.keys()
        for what, text in REFUSED.items():
            assert text in str(answers[what]), (what, answers[what])


def under_fsdp(rank):
    """The rest of the model is sharded by rows of its weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = shard_tables(Net().double(), mesh)
    table = model.first.values
    optimizer = adamw(model)
    fully_shard(model, mesh=mesh, ignored_params={table.weight, table.row_mark})
    assert type(optimizer.param_groups[0]["params"][0]) is nn.Parameter
    optimizer.release()
    optimizer = adamw(model)  # FSDP has replaced the other parameters
    return steps(model, optimizer, [[partial(loss_of, model, step, 0, rank, dtype=torch.float64)] for step in range(3)])


@pytest.mark.promise(
    "Several processes",
    "FSDP2 (`fully_shard`) around a model with tables in columns",
    "supported",
    "`shard_tables(model, mesh)`, then `fully_shard(model, ignored_params={table.weight, table.row_mark})`, then the "
    "optimizer",
)
def test_fsdp_shards_the_rest_of_a_model(pair):
    one, other = pair(under_fsdp)
    same(one, other)
    close(one, train_all_alone(2, {}, {}, 3, torch.float64), 1e-9)


def clipped_under_fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = shard_tables(Net(), mesh)
    table = model.first.values
    fully_shard(model, mesh=mesh, ignored_params={table.weight, table.row_mark})
    optimizer = adamw(model)
    loss_of(model, 0, 0, rank).backward()
    before = [part.weights_TK for part in table.row_gradient.held()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found a non-scalar tensor")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    after = [part.weights_TK for part in table.row_gradient.held()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    optimizer.step()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def test_clipping_under_fsdp_leaves_row_gradients_alone(pair):
    model = Net()
    optimizer = adamw(model)
    for rank in range(2):
        (loss_of(model, 0, 0, rank) / 2).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    assert pair(clipped_under_fsdp) == [pytest.approx(norm, rel=1e-4)] * 2
    del optimizer


def counted(rank):
    """Bytes that a rank receives, by what it calls of torch.distributed."""
    received = {"bytes": 0}
    all_gather, all_to_all = dist.all_gather, dist.all_to_all_single

    def gathered(tensors, tensor, **settings):
        received["bytes"] += sum(one.nbytes for one in tensors) - tensor.nbytes
        return all_gather(tensors, tensor, **settings)

    def exchanged(output, given, output_sizes, input_sizes, **settings):
        received["bytes"] += output.nbytes - output_sizes[rank] * output.element_size()
        return all_to_all(output, given, output_sizes, input_sizes, **settings)

    config = MemoryConfig(dim=1024, heads=4, topk=32, num_subkeys=32, query_dim=8, query_norm="rms")
    model = in_columns(MemoryLayer(config))
    optimizer = RowAdam(model)
    dist.all_gather, dist.all_to_all_single = gathered, exchanged
    try:
        model(torch.randn(64, 1024)).square().sum().backward()
        optimizer.step()
    finally:
        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all
    return received["bytes"]


def test_the_bytes_on_the_wire_are_those_that_are_calculated(pair):
    calculated = traffic(slots=1024, width=1024, rows=128, tokens=64, ranks=2).columns
    assert calculated == 64 * 5632
    for received in pair(counted):
        assert calculated <= received <= calculated + 200  # and some numbers
        assert received <= 64 * 5700


def train_replicas_of_columns(rank, kind):
    settings, make = TABLE_ALONE[kind]
    model = frozen_but_for_the_table(in_columns(Net(is_chain=False, **settings), 2, replicas=2))
    return steps(
        model, make(model), [[partial(loss_of, model, step, micro, rank) for micro in range(2)] for step in range(3)]
    )


def train_all_in_replicas_of_columns(rank, from_other_weights):
    model = in_columns(Net().double(), 2, replicas=2)
    if from_other_weights and rank >= 2:
        own_part(model.first.values.weight).add_(1)
    optimizer = adamw(model, value_max_grad_norm=0.02)
    replica = DistributedDataParallel(model)
    state = steps(
        replica, optimizer, [[partial(loss_of, replica, step, 0, rank, dtype=torch.float64)] for step in range(3)]
    )
    mesh = model.first.values.weight.device_mesh
    assert check_replicas(model, optimizer) == []
    assert check_replicas(model, optimizer, group=mesh.get_group(0)) == []
    if rank == 3:
        own_part(model.first.values.weight)[0, 0] += 1
    found = check_replicas(model, optimizer, group=mesh.get_group(0))
    return state, found


def one_of_two_columns_fails(rank):
    """Of four ranks one has a gradient that it cannot follow: none makes the step."""
    model = in_columns(Net(), 2, replicas=2)
    optimizer = RowAdam(model)
    loss_of(model, 0, 0, rank).backward()
    if rank == 3:
        model.first.values.row_mark.grad = torch.ones(1)
    before = own_part(model.first.values.weight).clone()
    message = said(RuntimeError, optimizer.step)
    assert torch.equal(before, own_part(model.first.values.weight))
    return message


@pytest.mark.slow
@pytest.mark.promise(
    "Several processes",
    "columns inside of a node, replicas of them across nodes",
    "supported",
    "`shard_tables(model, mesh)` with a mesh of two dimensions, (replicas, columns)",
)
def test_replicas_of_columns_on_a_mesh_of_two_dimensions(tmp_path, start_ranks):
    with start_ranks(tmp_path, 4) as call:
        for kind in TABLE_ALONE:
            one, *others = call(train_replicas_of_columns, kind)
            for other in others:
                same(one, other)
            same(one, train_the_table_alone(4, kind))
        for from_other_weights in (True, False):
            (one, _), *others = call(train_all_in_replicas_of_columns, from_other_weights)
            for other, _ in others:
                same(one, other)
            assert [found for _, found in others] == [["first.values.weight"], [], ["first.values.weight"]]
        close(one, train_all_alone(4, {}, {"value_max_grad_norm": 0.02}, 3, torch.float64), 1e-9)
        for message in call(one_of_two_columns_fails):
            assert "a value table in row mode has a dense gradient beside its row gradient" in message
