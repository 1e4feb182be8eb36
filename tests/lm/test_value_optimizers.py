import pytest
import torch

from memlayers.lm.value_optimizers import DenseRule, SparseRule
from memlayers.optim import RowAdam
from memlayers.values import ValueTable


def trained(rule, reads):
    """The weights of a table after each step; `reads` are the slots of each."""
    torch.manual_seed(0)
    table = ValueTable(8, 4)
    optimizer = rule(table, lr=0.1, betas=(0.9, 0.98))
    weights = [table.weight.detach().clone()]
    for slots in reads:
        table.read(slots, torch.rand(slots.shape)).backward(torch.randn(len(slots), 4))
        optimizer.step()
        optimizer.zero_grad()
        weights.append(table.weight.detach().clone())
        assert table.weight.grad is None
    return weights


@pytest.mark.parametrize("rule", [DenseRule, SparseRule])
def test_where_all_rows_are_read_in_every_step_all_rules_are_one(rule):
    reads = [torch.stack([torch.randperm(8), torch.randperm(8)]) for _ in range(3)]
    for ours, theirs in zip(trained(RowAdam, reads), trained(rule, reads), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("rule", "moves"), [(RowAdam, False), (SparseRule, False), (DenseRule, True)])
def test_adam_alone_moves_rows_that_are_not_read(rule, moves):
    first, second, third = trained(rule, [torch.arange(8)[None], torch.arange(4)[None]])
    assert not torch.equal(first[4:], second[4:])
    assert torch.equal(second[4:], third[4:]) is not moves
    assert not torch.equal(second[:4], third[:4])


def test_the_rule_of_the_step_corrects_a_row_less_than_its_own_count():
    # A row that is read for the first time in the third step: by its own count both moments are new.
    reads = [torch.arange(4)[None], torch.arange(4)[None], torch.arange(8)[None]]
    rows, sparse = trained(RowAdam, reads), trained(SparseRule, reads)
    torch.testing.assert_close(rows[3][:4], sparse[3][:4])
    assert not torch.allclose(rows[3][4:], sparse[3][4:])


@pytest.mark.parametrize("rule", [RowAdam, DenseRule, SparseRule])
def test_a_rate_that_a_schedule_has_at_zero_moves_nothing_and_counts_as_a_step(rule):
    table = ValueTable(8, 4)
    optimizer = rule(table, lr=0.1, schedule_values=True)
    before = table.weight.detach().clone()
    for rate, moves in ((0.0, False), (0.1, True)):
        optimizer.param_groups[0]["lr"] = rate
        table.read(torch.arange(8)[None], torch.ones(1, 8)).backward(torch.ones(1, 4))
        optimizer.step()
        assert torch.equal(table.weight, before) is not moves
