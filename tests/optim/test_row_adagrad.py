import pytest
import torch

from memlayers import RowAdagrad, ValueTable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_number_a_row_is_the_sum_of_its_mean_squared_gradients(dtype):
    table = ValueTable(6, 5, dtype=dtype)
    expected, sums = table.weight.detach().clone(), torch.zeros(6, dtype=dtype)
    optimizer = RowAdagrad([table], lr=0.3, eps=1e-3, per_row=True)
    for _ in range(5):
        slots, grads = torch.randperm(6)[:3], torch.randn(3, 5, dtype=dtype)
        table.row_gradient.add(slots[:, None], torch.ones(3, 1, dtype=dtype), grads)
        optimizer.step()
        sums[slots] += grads.square().mean(1)
        expected[slots] -= 0.3 * grads / (sums[slots].sqrt() + 1e-3)[:, None]
    torch.testing.assert_close(table.weight, expected)
    torch.testing.assert_close(optimizer.state[table.weight]["square_sum"], sums)


def test_its_own_settings_are_checked():
    table = ValueTable(3, 2)
    with pytest.raises(ValueError, match="eps must be a finite number above 0, got 0.0"):
        RowAdagrad([table], eps=0.0)
    assert table.row_gradient is None
