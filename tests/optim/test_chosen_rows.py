"""Rows that were not chosen stay as they are, with their states, whatever else a loop does."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from memlayers import Experts, MappedFile, MemoryConfig, MemoryLayer, RowAdagrad, RowAdam, RowSGD, ValueTable
from memlayers.optim import MemoryAdamW

RULES = {
    "SGD": RowSGD,
    "Adagrad": RowAdagrad,
    "Adagrad by row": partial(RowAdagrad, per_row=True),
    "Adam": RowAdam,
    "Adam, moments in bfloat16": partial(RowAdam, moments="bfloat16"),
}
CHOSEN = [3, 4, 11, 19]


def table_of(dtype=torch.float32):
    torch.manual_seed(0)
    return ValueTable(24, 6, dtype=dtype)


def backward(table, step, micro=0):
    generator = torch.Generator().manual_seed(10 * step + micro)
    slots = torch.randint(24, (5, 3), generator=generator)
    weights = torch.randn(5, 3, generator=generator).requires_grad_()
    (table.read(slots, weights) * torch.randn(5, 6, generator=generator)).sum().backward()


def tensors(table, optimizer):
    """The table and its states of a row each, in bits."""
    found = {"weight": table.weight.detach(), **optimizer.state[table.weight]}
    return {name: one.clone().view(len(one), -1).view(torch.uint8) for name, one in found.items()}


def changed(before, after):
    return {name: (before[name] != one).any(1).nonzero().flatten().tolist() for name, one in after.items()}


@pytest.mark.promise(
    "Gradients by hand",
    "training some rows of a table and no others",
    "supported",
    "`optimizer.choose_rows`; the others, and their states, stay as they are, bit for bit",
)
@pytest.mark.parametrize("steps", [12, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_only_chosen_rows_and_their_states_move(rule, dtype, steps):
    """Under accumulation, clipping and a resume in the middle, with states that were there before the choice."""
    table = table_of(dtype)
    optimizer = RULES[rule]([table], lr=0.05, max_grad_norm=0.5)
    for step in range(4):
        backward(table, step)
        optimizer.step()
    optimizer.choose_rows(CHOSEN)
    before = tensors(table, optimizer)
    for step in range(steps):
        for micro in range(2):
            backward(table, step, micro)
        optimizer.step()
        optimizer.zero_grad()
        if step == steps // 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.release()
            optimizer = RULES[rule]([table], lr=0.05, max_grad_norm=0.5)
            optimizer.load_state_dict(saved)
    assert optimizer.chosen_rows[table].tolist() == CHOSEN
    assert changed(before, tensors(table, optimizer)) == dict.fromkeys(before, CHOSEN)


@pytest.mark.parametrize("rule", RULES)
def test_the_step_is_the_one_of_a_loss_that_reads_the_chosen_rows_alone(rule):
    """Also the norm that clips is theirs."""
    weights = []
    for is_chosen in (True, False):
        table = table_of()
        optimizer = RULES[rule]([table], lr=0.05, max_grad_norm=0.1)
        if is_chosen:
            optimizer.choose_rows({table: torch.tensor(CHOSEN)})
        else:
            table.register_row_hook(lambda gradient: gradient.keep(torch.isin(torch.arange(24), torch.tensor(CHOSEN))))
        for step in range(5):
            backward(table, step)
            optimizer.step()
        weights.append(table.weight.detach().clone())
    assert torch.equal(*weights)


def test_gradients_of_other_rows_that_are_not_finite_do_no_harm():
    table = table_of()
    optimizer = RowAdam([table], max_grad_norm=1.0)
    optimizer.choose_rows([1])
    weights = torch.tensor([[1.0], [float("nan")]])
    table.row_gradient.add(torch.tensor([[1], [2]]), weights, torch.ones(2, 6))
    optimizer.step()
    assert table.weight.isfinite().all()
    assert optimizer.state[table.weight]["steps"].nonzero().flatten().tolist() == [1]


@pytest.mark.promise(
    "Gradients by hand",
    "a learning rate for each row of a table",
    "supported",
    "`choose_rows` of `RowSGD` with rates in [0, 1], as `slot_rates` returns them; Adam and Adagrad refuse them",
)
def test_rows_move_by_their_shares_of_the_learning_rate():
    """Also after a resume; a row of rate 0 stays bit for bit, though its gradient is not finite."""
    table = table_of()
    rate_S = torch.linspace(0, 1, 24)
    optimizer = RowSGD([table], lr=2.0)
    optimizer.choose_rows({table: rate_S})
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.release()
    optimizer = RowSGD([table], lr=2.0)
    optimizer.load_state_dict(saved)
    before = table.weight.detach().clone()
    weights = torch.ones(24, 1)
    weights[0] = float("nan")
    table.row_gradient.add(torch.arange(24)[:, None], weights, torch.ones(24, 6))
    optimizer.step()
    torch.testing.assert_close(before - table.weight.detach(), (2 * rate_S)[:, None].expand(24, 6))
    assert torch.equal(before[0], table.weight[0])
    assert optimizer.chosen_rows[table].tolist() == list(range(1, 24))


@pytest.mark.parametrize("rule", ["Adagrad", "Adagrad by row", "Adam"])
def test_rates_are_refused_where_the_rule_would_undo_them(rule):
    """Also those of a state that is loaded."""
    table = table_of()
    optimizer = RowSGD([table])
    optimizer.choose_rows(torch.full((24,), 0.5))
    state = copy.deepcopy(optimizer.state_dict())["state"]
    optimizer.release()
    optimizer = RULES[rule]([table])
    with pytest.raises(ValueError, match="rates of rows are for RowSGD, got some for a Row"):
        optimizer.choose_rows({table: torch.full((24,), 0.5)})
    with pytest.raises(ValueError, match="rates of rows are for RowSGD"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    assert optimizer.chosen_rows is None


def test_a_gradient_that_was_set_on_the_table_moves_chosen_rows_only():
    table = table_of()
    optimizer = RowSGD([table], lr=1.0)
    optimizer.choose_rows(CHOSEN)
    before = table.weight.detach().clone()
    table.weight.grad = torch.ones(24, 6)
    optimizer.step()
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == CHOSEN


def test_more_than_one_dense_gradient_is_merged_and_still_filtered():
    table = table_of()
    optimizer = RowAdam([table])
    optimizer.choose_rows(torch.arange(24) < 2)
    for micro in range(12):
        backward(table, 0, micro)
    assert table.row_gradient.is_merged
    optimizer.step()
    assert optimizer.state[table.weight]["steps"].tolist() == [1, 1] + [0] * 22


def test_a_choice_holds_until_the_next_one_or_none():
    table = table_of()
    optimizer = RowSGD([table], lr=1.0)
    seen = []
    for step, rows in enumerate(([2, 5], "the same", [], None)):
        if rows != "the same":
            optimizer.choose_rows(rows)
        before = table.weight.detach().clone()
        table.row_gradient.add(torch.arange(24)[:, None], torch.ones(24, 1), torch.ones(24, 6) * (step + 1))
        optimizer.step()
        seen.append((table.weight != before).any(1).sum().item())
    assert seen == [2, 2, 0, 24]
    assert optimizer.chosen_rows is None


def test_a_choice_before_the_first_step_is_saved_and_the_state_is_made_as_ever():
    table = table_of()
    optimizer = RowAdam([table])
    optimizer.choose_rows(CHOSEN)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.release()
    optimizer = RowAdam([table])
    optimizer.load_state_dict(saved)
    backward(table, 0)
    optimizer.step()
    assert optimizer.chosen_rows[table].tolist() == CHOSEN
    assert list(optimizer.state[table.weight]) == ["exp_avg", "exp_avg_sq", "steps"]


def test_a_loaded_state_without_a_choice_leaves_the_one_that_was_made():
    table = table_of()
    optimizer = RowAdam([table])
    backward(table, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.choose_rows(CHOSEN)
    optimizer.load_state_dict(saved)
    assert optimizer.chosen_rows[table].tolist() == CHOSEN


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([24], r"rows must be in \[0, 24\), got 24 to 24"),
        ([-1, 3], r"rows must be in \[0, 24\), got -1 to 3"),
        ([0.5], r"whole numbers, or a mask .*, or rates \[24\], got torch.float32 of \[1\]"),
        (torch.full((24,), 1.5), r"rates in \[0, 1\]"),
        (torch.full((24,), float("nan")), r"rates in \[0, 1\]"),
        (torch.ones(23, dtype=torch.bool), r"mask of bool of shape \[24\].* got torch.bool of \[23\]"),
        ({}, "must name each of the 1 tables, if with no slot, got none for 1"),
        ({"values": [1]}, "by value table, got an entry for a str"),
        ({ValueTable(24, 6): [1]}, "tables that this optimizer trains, got some of another"),
    ],
)
def test_rows_that_no_table_has_are_refused_and_the_choice_stays(rows, named):
    table = table_of()
    optimizer = RowSGD([table])
    optimizer.choose_rows([7])
    with pytest.raises(ValueError, match=named):
        optimizer.choose_rows(rows)
    assert optimizer.chosen_rows[table].tolist() == [7]


def test_frozen_tables_are_ignored_and_several_tables_need_a_mapping():
    first, second, frozen = (table_of() for _ in range(3))
    frozen.weight.requires_grad_(False)
    optimizer = RowSGD([first, second])
    optimizer.choose_rows({first: [1], second: [], frozen: [3]})
    assert {table: rows.tolist() for table, rows in optimizer.chosen_rows.items()} == {first: [1], second: []}
    with pytest.raises(ValueError, match="a mapping from each value table to its slots.*trains 2 tables, got a list"):
        optimizer.choose_rows([1])
    optimizer.release()
    with pytest.raises(ValueError, match="trains none"):
        optimizer.choose_rows([1])


@pytest.mark.parametrize("kind", [MemoryLayer, Experts])
def test_the_optimizer_of_a_whole_model_passes_the_choice_on(kind):
    """The tables of experts have the same slots; everything else is trained."""
    layer = kind(MemoryConfig(dim=6, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms"))
    optimizer = MemoryAdamW(layer, lr=0.1, value_lr=0.1)
    tables = [module for module in layer.modules() if isinstance(module, ValueTable)]
    optimizer.choose_rows({table: [0, 1, 2, 3] for table in tables})
    before = copy.deepcopy(layer.state_dict())
    for _ in range(2):
        layer(torch.randn(40, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in layer.state_dict().items():
        moved = (value != before[name]).flatten(1 if value.ndim > 1 else 0).any(-1)
        if name in ("values.weight", "values.inputs.weight"):
            assert moved.nonzero().flatten().max() < 4
        assert moved.any(), name
    copied = MemoryAdamW(copy.deepcopy(layer), lr=0.1, value_lr=0.1)
    copied.load_state_dict(optimizer.state_dict())
    assert [rows.tolist() for rows in copied.chosen_rows.values()] == [[0, 1, 2, 3]] * len(tables)
    with pytest.raises(ValueError, match="trains none"):
        MemoryAdamW(nn.Linear(2, 2)).choose_rows([1])


def test_tables_in_files_are_chosen_from_as_well(tmp_path):
    layer = MemoryLayer(
        MemoryConfig(dim=6, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms"),
        values=MappedFile(tmp_path / "table"),
    )
    optimizer = RowAdam(layer)

    def rows_now():
        return layer.values._files.rows(np.arange(16))  # those that nobody has read yet, too

    before = torch.as_tensor(rows_now()).clone()
    for rows in ([], [0, 1, 2, 3]):
        optimizer.choose_rows(rows)
        layer(torch.randn(40, 6)).square().sum().backward()
        optimizer.step()
        moved = (torch.as_tensor(rows_now()) != before).any(1).nonzero().flatten().tolist()
        assert set(moved) <= set(rows)
        assert bool(moved) == bool(rows)
    saved = optimizer.state_dict()
    optimizer.choose_rows(None)
    optimizer.load_state_dict(saved)
    assert optimizer.chosen_rows[layer.values].tolist() == [0, 1, 2, 3]
