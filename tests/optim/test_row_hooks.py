"""Hooks of row gradients, and hooks on a table in row mode, which are refused."""

import pytest
import torch

from memlayers import ValueTable
from memlayers.optim import RowAdam, RowSGD


@pytest.mark.promise(
    "Gradients by hand",
    "changing a table's gradient in a hook",
    "changed",
    "`ValueTable.register_row_hook`: mask, scale",
)
def test_rows_that_a_hook_masks_keep_their_state():
    table = ValueTable(4, 2)
    optimizer = RowAdam([table])
    table.register_row_hook(lambda gradient: gradient.keep(torch.tensor([True, False, True, True])))
    table.read(torch.tensor([[0, 1]]), torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state[table.weight]["steps"].tolist() == [1, 0, 0, 0]


def test_row_hooks_refuse_what_is_no_mask_and_a_dense_table():
    table = ValueTable(4, 2)
    with pytest.raises(ValueError, match="build its row optimizer first"):
        table.register_row_hook(print)
    optimizer = RowSGD([table])
    for change, named in (
        (lambda gradient: gradient.keep(torch.ones(4)), "mask of dtype torch.bool"),
        (lambda gradient: gradient.scale(torch.ones(3)), r"shape \[4\].*got \[3\]"),
    ):
        handle = table.register_row_hook(change)
        table.read(torch.tensor([[0, 1]]), torch.ones(1, 2)).sum().backward()
        with pytest.raises(ValueError, match=named):
            optimizer.step()
        handle.remove()


@pytest.mark.promise(
    "Gradients by hand", "hooks on `table.weight` in row mode", "refused", "`ValueTable.register_row_hook`"
)
@pytest.mark.parametrize("when", ["before", "after", "compiled"])
def test_a_hook_on_the_table_is_refused(when):
    table = ValueTable(4, 2)
    read = torch.compile(table.read, backend="aot_eager") if when == "compiled" else table.read
    if when == "before":
        handle = table.weight.register_hook(lambda grad: grad)
        with pytest.raises(ValueError, match="register_row_hook"):
            RowSGD([table])
        handle.remove()
        return
    optimizer = RowSGD([table])
    table.weight.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="register_row_hook"):
        read(torch.tensor([[0, 1]]), torch.ones(1, 2)).sum().backward()
    assert optimizer is not None


def test_a_hook_after_accumulation_is_refused_at_the_step():
    """It is called, and what it does to a gradient that is None changes nothing."""
    table = ValueTable(4, 2)
    optimizer = RowSGD([table])
    before = table.weight.detach().clone()
    handle = table.weight.register_post_accumulate_grad_hook(lambda weight: None)
    table.read(torch.tensor([[0, 1]]), torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="register_row_hook"):
        optimizer.step()
    assert torch.equal(table.weight, before)
    handle.remove()
    optimizer.step()
    assert not torch.equal(table.weight, before)
