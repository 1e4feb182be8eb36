"""The kernel of select against its reference."""

import pytest
import torch

from memlayers.ops import cpu
from memlayers.ops.select import select_pairs, select_reference

# N and K: tiny, odd, prime, one group of maxima and many, K = N, more candidates than are ranked by counting.
SIZES = [(2, 1), (3, 3), (7, 5), (31, 31), (64, 32), (65, 8), (100, 50), (127, 1), (128, 32), (257, 32), (300, 300)]
SIZES += [(512, 32), (512, 128), (1000, 33), (1024, 32), (2048, 64)]


def scores(kind, *shape):
    values = torch.randn(shape)
    if kind == "ties":  # exact sums, many of them equal
        return (values * 2).round() / 2
    if kind == "all equal":
        return torch.zeros(shape) * torch.where(values > 0, 1.0, -1.0)  # zeros of both signs
    if kind == "negative":
        return -values.abs() - 5
    if kind == "tiny and huge":
        return values * torch.exp2(torch.randint(-140, 120, shape).float())
    return values


@pytest.mark.parametrize("kind", ["normal", "ties", "all equal", "negative", "tiny and huge"])
@pytest.mark.parametrize(("num_subkeys", "topk"), SIZES, ids=str)
def test_it_is_the_reference(num_subkeys, topk, kind):
    first, second = scores(kind, 3, 21, num_subkeys), scores(kind, 3, 21, num_subkeys)
    found, expected = select_pairs(first, second, topk), select_reference(first, second, topk)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_it_takes_any_strides_and_leading_shape(threads):
    first, second = torch.randn(2, 4, 50, 60).transpose(1, 2)  # [50, 4, 60], as search has them
    expected = select_reference(first.contiguous(), second.contiguous(), 9)
    for shape in ((50, 4), (200,), (5, 10, 2, 2)):
        found = select_pairs(first.reshape(*shape, 60), second.reshape(*shape, 60), 9)
        assert [*found[0].shape] == [*shape, 9]
        assert torch.equal(found[1].view(50, 4, 9), expected[1])
    assert torch.equal(select_pairs(first, second, 9)[1], expected[1])
    assert torch.equal(select_pairs(first.mT.contiguous().mT, second, 9)[1], expected[1])
    assert select_pairs(first[:0], second[:0], 9)[0].shape == (0, 4, 9)


@pytest.mark.parametrize("num_subkeys", [40, 300])
def test_nan_and_infinity_leave_slots_in_range_and_other_rows_alone(num_subkeys):
    first, second = torch.randn(4, 6, num_subkeys), torch.randn(4, 6, num_subkeys)
    clean = select_pairs(first, second, 32)
    first[0, 0, 3], first[0, 1, :20] = torch.nan, -torch.inf
    second[0, 1, 5], second[0, 2] = torch.inf, torch.nan
    first[0, 3, 7], second[0, 3, 9] = torch.inf, -torch.inf
    found, expected = select_pairs(first, second, 32), select_reference(first, second, 32)
    assert found[1].min() >= 0
    assert found[1].max() < num_subkeys**2
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    for clean_part, part in zip(clean, found, strict=True):
        assert torch.equal(clean_part[1:], part[1:])
        assert torch.equal(clean_part[0, 4:], part[0, 4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores_are_widened(dtype):
    first, second = (torch.randn(1, 30, 128).to(dtype) for _ in range(2))  # ties everywhere
    found, expected = select_pairs(first, second, 32), select_reference(first.float(), second.float(), 32)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_gradients_are_the_reference_s():
    first, second = torch.randn(2, 3, 5, 40).requires_grad_().unbind()
    weight = torch.randn(3, 5, 8)
    grads = torch.autograd.grad((select_pairs(first, second, 8)[0] * weight).sum(), (first, second))
    expected = torch.autograd.grad((select_reference(first, second, 8)[0] * weight).sum(), (first, second))
    for grad, other in zip(grads, expected, strict=True):
        assert torch.equal(grad, other)


def test_operation_keeps_torch_s_rules():
    first, second = torch.randn(2, 3, 5, 40).requires_grad_().unbind()
    torch.library.opcheck(
        torch.ops.memlayers.select.default, (first.detach().requires_grad_(), second.detach().requires_grad_(), 8)
    )


def test_the_kernel_is_what_runs(monkeypatch):
    kernels = cpu.kernels("select")
    calls = []
    monkeypatch.setattr(kernels, "select_into", lambda *arguments, **_: calls.append(arguments))
    select_pairs(torch.randn(2, 3, 9), torch.randn(2, 3, 9), 4)
    assert len(calls) == 1


def test_shapes_that_do_not_fit_are_an_error():
    first = torch.randn(3, 5, 9)
    with pytest.raises(ValueError, match=r"one shape, got \[3, 5, 9\] and \[2, 5, 9\]"):
        select_pairs(first, first[:2], 4)
    for topk in (0, 10):
        with pytest.raises(ValueError, match=rf"topk must be in .* got {topk} and 9"):
            select_pairs(first, first, topk)
