import copy

import pytest
import torch
from torch import nn

from memlayers import RowAdam, ValueTable


def reads(num_slots, tokens=4, topk=3, dtype=torch.float64):
    return torch.randint(num_slots, (tokens, topk)), torch.randn(tokens, topk, dtype=dtype)


def loss_of(table, slots, weights):
    y = table.read(slots, weights.clone().requires_grad_())
    return (y - torch.arange(y.numel(), dtype=y.dtype).view_as(y)).square().sum()


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_is_torch_s_on_one_table(limit):
    table = ValueTable(30, 4, dtype=torch.float64)
    twin = copy.deepcopy(table)
    slots, weights = reads(30)
    # eps of the gradient's size, or Adam's first step would hide any scale.
    optimizer = RowAdam([table], lr=0.1, eps=1.0, max_grad_norm=limit)
    adam = torch.optim.Adam(twin.parameters(), lr=0.1, eps=1.0)
    loss_of(table, slots, weights).backward()
    loss_of(twin, slots, weights).backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), limit)
    assert (norm > limit) == (limit < 1)
    optimizer.step()
    adam.step()
    touched = slots.flatten().unique()
    torch.testing.assert_close(table.weight[touched], twin.weight[touched], rtol=1e-9, atol=1e-9)


def test_the_first_step_of_a_row_read_late_is_as_large_as_one_read_early():
    table = ValueTable(3, 1)
    optimizer = RowAdam([table], lr=0.1)
    for slot in [0] * 30 + [1]:
        before = table.weight.detach().clone()
        loss_of(table, torch.tensor([[slot]]), torch.ones(1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (table.weight - before)[1].abs().item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"betas": (0.9, 1.0)}, r"betas .* \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
        ({"betas": 0.9}, r"betas .* got 0.9"),
    ],
)
def test_its_own_settings_are_checked(settings, named):
    table = ValueTable(3, 2)
    with pytest.raises(ValueError, match=named):
        RowAdam([table], **settings)
    assert table.row_gradient is None
