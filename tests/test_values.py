"""Who trains a table: ownership, and the life of a row gradient."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memlayers import RowAdam, ValueTable
from memlayers.values import modules_of, value_tables


def table_and_optimizer(slots=20, dim=3, **settings):
    table = ValueTable(slots, dim)
    return table, RowAdam([table], **settings)


def read(table, slots=((1, 2), (2, 5)), weight=1.0):
    slots = torch.tensor(slots)
    weights = torch.full(slots.shape, weight, requires_grad=True)
    return table.read(slots, weights)


def recorded_rows(table):
    summed = table.row_gradient.summed()
    if summed is None:
        return {}
    rows = torch.arange(len(table.weight)) if summed.rows_P is None else summed.rows_P
    return {
        int(row): grad[0].item() for row, live, grad in zip(rows, summed.live_P, summed.grad_PV, strict=True) if live
    }


def test_a_table_shows_its_size_and_whether_it_is_in_row_mode():
    assert repr(ValueTable(20, 3)).startswith("ValueTable(\n  slots=20, dim=3\n")
    table, _optimizer = table_and_optimizer()
    assert repr(table).startswith("ValueTable(\n  slots=20, dim=3, row mode\n")


def test_without_an_owner_backward_gives_a_dense_gradient():
    table = ValueTable(20, 3)
    read(table).sum().backward()
    assert table.weight.grad.sum(1).nonzero().flatten().tolist() == [1, 2, 5]
    assert [name for name, _ in table.named_parameters()] == ["weight", "companion.row_mark"]
    assert table.row_mark.grad.tolist() == [0.0]


def test_with_an_owner_grad_stays_none_and_rows_are_recorded():
    table, _optimizer = table_and_optimizer()
    read(table).sum().backward()
    assert table.weight.grad is None
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 5: 1.0}


@pytest.mark.promise(
    "Gradients by hand",
    "a second row optimizer on a table while the first lives",
    "refused",
    "`release()` on the first",
)
def test_a_second_owner_is_an_error_while_the_first_lives():
    table, optimizer = table_and_optimizer()
    with pytest.raises(ValueError, match="already has a row optimizer"):
        RowAdam([table])
    read(table).sum().backward()
    assert recorded_rows(table), "the first owner must not lose its table"
    del optimizer
    gc.collect()
    assert table.row_gradient.owner() is None
    RowAdam([table])


def test_an_optimizer_that_is_refused_one_table_takes_none():
    taken, _optimizer = table_and_optimizer()
    free = ValueTable(20, 3)
    with pytest.raises(ValueError, match="already has a row optimizer"):
        RowAdam([free, taken])
    assert free.row_gradient is None


def test_release_makes_it_dense_again():
    table, optimizer = table_and_optimizer()
    read(table).sum().backward()
    optimizer.release()
    read(table).sum().backward()
    assert table.weight.grad is not None
    assert table.row_mark.grad.tolist() == [0.0]
    RowAdam([table])


def test_backward_raises_when_the_owner_is_gone():
    table, optimizer = table_and_optimizer()
    loss = read(table).sum()
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="row optimizer is gone"):
        loss.backward()


@pytest.mark.parametrize(
    "how", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "shallow", "pickle"]
)
def test_a_copy_has_no_owner_and_is_dense(how):
    table, _optimizer = table_and_optimizer()
    read(table).sum().backward()
    copied = how(table)
    assert copied.row_gradient is None
    assert [name for name, parameter in copied.named_parameters() if parameter.requires_grad] == [
        "weight",
        "companion.row_mark",
    ]
    assert copied.row_mark is not table.row_mark
    assert copied.row_mark.grad is None
    read(copied).sum().backward()
    assert copied.weight.grad is not None
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 5: 1.0}


def test_a_shared_table_stays_shared_in_a_copy():
    table, _optimizer = table_and_optimizer()
    copied = copy.deepcopy(nn.ModuleList([table, table]))
    assert copied[0] is copied[1]


def test_state_dict_is_the_same_in_both_modes_and_loads_strictly():
    table, _optimizer = table_and_optimizer()
    assert list(table.state_dict()) == ["weight"]
    dense = ValueTable(20, 3)
    dense.load_state_dict(table.state_dict(), strict=True)
    table.load_state_dict(dense.state_dict(), strict=True)


def test_micro_batches_append():
    table, _optimizer = table_and_optimizer()
    read(table, ((1, 2),)).sum().backward()
    read(table, ((2, 3),)).sum().backward()
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 3: 1.0}


def test_two_reads_in_one_backward_are_both_recorded():
    """Two layers that share a table."""
    table, _optimizer = table_and_optimizer()
    (read(table, ((1, 2),)) + read(table, ((2, 3),))).sum().backward()
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 3: 1.0}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_zero_grad_discards_what_was_recorded(whose, set_to_none):
    table, optimizer = table_and_optimizer()
    model = nn.Sequential(table)
    before = table.weight.clone()
    read(table, ((1, 2),)).sum().backward()
    (optimizer if whose == "optimizer" else model).zero_grad(set_to_none=set_to_none)
    assert table.row_gradient.is_empty
    optimizer.step()
    assert torch.equal(table.weight, before)
    read(table, ((2, 3),)).sum().backward()
    assert recorded_rows(table) == {2: 1.0, 3: 1.0}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_step_leaves_nothing_behind(set_to_none):
    """zero_grad of the model alone, between two backward passes, with no step at all."""
    table, _optimizer = table_and_optimizer()
    for slots in (((1, 2),), ((3, 4),), ((5, 6),)):
        read(table, slots).sum().backward()
        read(table, slots).sum().backward()
        assert set(recorded_rows(table)) == set(slots[0])
        assert set(recorded_rows(table).values()) == {2.0}
        table.zero_grad(set_to_none=set_to_none)


def test_a_gradient_taken_on_the_side_is_not_recorded():
    table, _optimizer = table_and_optimizer()
    read(table, ((1, 2),)).sum().backward()
    weights = torch.ones(1, 2, requires_grad=True)
    torch.autograd.grad(table.read(torch.tensor([[7, 8]]), weights).sum(), weights)
    assert recorded_rows(table) == {1: 1.0, 2: 1.0}
    read(table, ((1, 3),)).sum().backward()
    assert recorded_rows(table) == {1: 2.0, 2: 1.0, 3: 1.0}


def test_clipping_all_gradients_neither_sees_nor_discards_rows():
    table, optimizer = table_and_optimizer()
    other = nn.Parameter(torch.ones(2))
    (read(table, ((1, 2),)).sum() + 1e-6 * other.sum()).backward()
    norm = nn.utils.clip_grad_norm_([other, *table.parameters()], 1e-9)
    assert norm.item() == pytest.approx(1e-6 * 2**0.5)
    before = table.weight.clone()
    optimizer.step()
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_a_table_in_row_mode_keeps_its_mark_alive(cast):
    table, _optimizer = table_and_optimizer()
    read(table).sum().backward()
    getattr(table, cast)()
    assert table.row_mark.dtype == table.weight.dtype != torch.float32
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 5: 1.0}
    table.zero_grad()
    read(table).sum().backward()
    assert set(recorded_rows(table)) == {1, 2, 5}


def test_a_table_made_in_inference_mode_is_cast_and_moved_as_any_module():
    with torch.inference_mode():
        table = ValueTable(20, 3)
        slots, weights = torch.randint(20, (4, 2)), torch.rand(4, 2)
    table.to(torch.bfloat16).to_empty(device="cpu")
    with torch.inference_mode():
        assert table.row_mark.tolist() == [0.0]
        table.weight.fill_(1.0)
        torch.testing.assert_close(table.read(slots, weights), weights.sum(1, keepdim=True).expand(4, 3))


def test_a_copy_walks_in_step_with_its_original():
    """Averaging pairs the parameters of a model and of its copy."""
    model = nn.Sequential(table_and_optimizer()[0], nn.LayerNorm(3))
    owner = RowAdam(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module[1].weight, torch.ones(3))
    assert owner is not None


@pytest.mark.parametrize("how", ["by name", "all, then the weight"])
def test_a_table_thawed_without_its_mark_trains(how):
    table, optimizer = table_and_optimizer()
    if how == "by name":
        for name, parameter in table.named_parameters():
            parameter.requires_grad_(name.endswith("weight"))
    else:
        table.requires_grad_(False)
        table.weight.requires_grad_(True)
    before = table.weight.detach().clone()
    read(table).sum().backward()
    optimizer.step()
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [1, 2, 5]


def test_a_frozen_table_records_nothing():
    table, _optimizer = table_and_optimizer()
    table.weight.requires_grad_(False)
    read(table).sum().backward()
    assert table.row_gradient.is_empty
    assert table.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_records_once(use_reentrant):
    table, _optimizer = table_and_optimizer()
    scale = torch.ones((), requires_grad=True)

    def block(scale):
        return scale * table.read(torch.tensor([[1, 2], [2, 5]]), torch.ones(2, 2))

    (checkpoint(block, scale, use_reentrant=use_reentrant).sum() + read(table, ((5, 6),)).sum()).backward()
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 5: 2.0, 6: 1.0}


def test_checkpointing_only_the_middle_one_of_three_reads_loses_none():
    """Reentrant checkpointing runs a backward pass inside another, between two records of it."""
    table, _optimizer = table_and_optimizer()
    scale = torch.ones((), requires_grad=True)

    def add(total, *slots):
        return total + table.read(torch.tensor([slots]), torch.ones(1, len(slots))).sum()

    total = add(scale, 1, 2)
    total = checkpoint(add, total, 2, 3, use_reentrant=True)
    add(total, 3, 4).backward()
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 3: 2.0, 4: 1.0}
    assert not table.row_gradient._passes


def test_what_is_computed_on_the_side_does_not_pile_up():
    table, _optimizer = table_and_optimizer()
    weights = torch.ones(1, 2, requires_grad=True)
    for _ in range(3):
        torch.autograd.grad(table.read(torch.tensor([[7, 8]]), weights).sum(), weights)
    assert not table.row_gradient._passes


def test_an_entry_of_weight_zero_is_no_read():
    table, optimizer = table_and_optimizer()
    for weights in ([[1.0, 1.0]], [[1.0, 0.0]]):
        table.read(torch.tensor([[1, 2]]), torch.tensor(weights, requires_grad=True)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[table.weight]["steps"][:4].tolist() == [0, 2, 1, 0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backward_records(backend):
    table, optimizer = table_and_optimizer()
    compiled = torch.compile(
        lambda scale, slots: (scale * table.read(slots, torch.ones(2, 2))).sum(), backend=backend, fullgraph=True
    )
    scale = torch.ones((), requires_grad=True)
    for slots in ([[1, 2], [2, 5]], [[3, 3], [3, 4]]):
        compiled(scale, torch.tensor(slots)).backward()
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 5: 1.0, 3: 3.0, 4: 1.0}
    optimizer.step()
    assert table.row_gradient.is_empty


def test_compiled_checkpointing_records_once():
    table, _optimizer = table_and_optimizer()

    def block(scale, slots):
        return scale * table.read(slots, torch.ones(2, 2))

    def model(scale, slots):
        return checkpoint(block, scale, slots, use_reentrant=False).sum()

    scale = torch.ones((), requires_grad=True)
    torch.compile(model, backend="aot_eager", fullgraph=True)(scale, torch.tensor([[1, 2], [2, 5]])).backward()
    assert recorded_rows(table) == {1: 1.0, 2: 2.0, 5: 1.0}


@pytest.mark.parametrize("mode", ["dense", "row mode", "without gradients"])
def test_the_slots_of_one_token_need_no_leading_shape(mode):
    table, optimizer = table_and_optimizer()
    if mode == "dense":
        optimizer.release()
    slots, weights = torch.tensor([1, 2, 1]), torch.tensor([0.5, 2.0, 1.0])
    with torch.set_grad_enabled(mode != "without gradients"):
        y = table.read(slots, weights)
    torch.testing.assert_close(y, weights @ table.weight[slots])
    if mode != "without gradients":
        y.sum().backward()
        grads = recorded_rows(table) if mode == "row mode" else table.weight.grad[:, 0]
        assert (float(grads[1]), float(grads[2])) == (1.5, 2.0)


def test_shapes_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"slots and weights .* \[2, 2\] and \[2, 3\]"):
        ValueTable(4, 2).read(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3))


@pytest.mark.parametrize(("slots", "dim"), [(0, 3), (3, 0)])
def test_an_empty_table_is_refused(slots, dim):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ValueTable(slots, dim)


def test_values_start_with_the_paper_s_deviation():
    assert ValueTable(1000, 64).weight.std().item() == pytest.approx(1 / 8, rel=0.02)


def test_fresh_rows_have_the_standard_deviation_that_is_asked_for():
    table = ValueTable(1000, 64, std=0.5)
    assert table.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert not ValueTable(10, 4, std=0).weight.any()
    with pytest.raises(ValueError, match="std must be .* at least 0, got -1"):
        ValueTable(10, 4, std=-1)


@pytest.mark.slow
def test_inductor_does_not_reuse_the_memory_of_what_is_recorded():
    """The gradient of `x` is as large as that of what is read, so its memory would be taken for it."""
    table = ValueTable(50, 32)
    optimizer = RowAdam([table])
    slots = torch.randint(50, (64, 4))
    first, second, x, weight = (
        torch.randn(*shape, requires_grad=True) for shape in ((32, 4), (32, 32), (64, 32), (64, 32))
    )

    def block(x, first, second):
        return table.read(slots, x @ first) @ second

    def rows(function):
        table.row_gradient.discard()
        (function(x, first, second) * weight).sum().backward()
        return table.row_gradient.summed().compact().grad_PV

    torch.testing.assert_close(rows(torch.compile(block, fullgraph=True)), rows(block), rtol=1e-4, atol=1e-4)
    assert optimizer is not None  # it owns the table


def test_without_gradients_a_table_in_row_mode_is_read_without_its_handle():
    """The handle is on the CPU, whatever the table is on: `torch.compile` makes no CUDA graph of what has it."""
    table = ValueTable(11, 7)
    slots, weights = torch.randint(11, (5, 3)), torch.randn(5, 3)
    expected = table.read(slots, weights)
    optimizer = RowAdam([table])
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode, Calls():
            assert torch.equal(table.read(slots, weights), expected)
    operations = torch.ops.memlayers
    assert [call for call in called if call.namespace == "memlayers"] == [
        operations.read.default,
        operations.read.default,
        operations.read_row_mode.default,
    ]
    table.read(slots, weights).sum().backward()
    assert not table.row_gradient.is_empty
    optimizer.step()


class Kept(nn.Module):
    """A module as PEFT's `modules_to_save` leaves it: the original, and the copies that are called."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})


def test_value_tables_are_found_once_and_in_order():
    first, second = ValueTable(4, 2), ValueTable(4, 2)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Identity(), first), "b": second, "c": nn.Sequential(second, first)})
    found = value_tables(model)
    assert [found.index(first), found.index(second)] == [0, 1]
    assert len(found) == 2
    assert value_tables(first) == [first]
    assert value_tables(nn.Linear(2, 2)) == []


def test_of_a_table_that_peft_has_copied_the_copy_is_found():
    table = ValueTable(4, 2)
    kept = Kept(table)
    copied = kept.modules_to_save["default"]
    assert value_tables(kept) == [copied]
    # Unless it stands elsewhere, too, where it is called.
    assert modules_of(nn.ModuleDict({"kept": kept, "whole": table}), ValueTable) == {
        "kept.modules_to_save.default": copied,
        "whole": table,
    }
