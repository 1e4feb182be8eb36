"""Rows of 8 and 4 bits: how they are rounded, and the references of what reads them."""

import pytest
import torch

from memlayers.ops.low_bits import code_bytes, dequantised, dot_low_bits, quantised, read_low_bits

EXACT = {8: torch.tensor([[-128.0, 127.0, 5.0, 0.0]]), 4: torch.tensor([[-8.0, 7.0, 5.0, 0.0]])}


def error(table, bits):
    """Root mean square, relative to the rows."""
    codes, scales = quantised(table, bits)
    return ((dequantised(codes, scales, table.shape[1], bits) - table).norm() / table.norm()).item()


@pytest.mark.parametrize("bits", [8, 4])
def test_what_integers_can_say_is_exact(bits):
    table = (EXACT[bits] * torch.tensor([[0.5], [-2.0], [1.0], [0.0], [2.0**-120]])).repeat(1, 40)
    codes, scales = quantised(table, bits)
    torch.testing.assert_close(dequantised(codes, scales, 160, bits), table, rtol=1e-6, atol=0.0)


def test_the_bytes_of_a_row():
    assert [code_bytes(1024, 8), code_bytes(1024, 4), code_bytes(17, 8), code_bytes(129, 4)] == [1024, 512, 32, 128]
    codes, scales = quantised(torch.randn(3, 1024), 4)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == ((3, 512), torch.uint8, (3,), torch.float32)


def test_the_scale_of_a_row_is_searched_and_not_that_of_its_largest_number():
    table = torch.randn(50, 1024)
    assert error(table, 8) < 0.0082
    assert error(table, 4) < 0.110
    largest = table.abs().amax(1, keepdim=True) / 7
    assert ((table / largest).round() * largest - table).norm() / table.norm() > 0.135
    # The scale is the least squares' one: moving it makes things worse.
    codes, scales = quantised(table, 4)
    best = (dequantised(codes, scales, 1024, 4) - table).square().sum(1)
    for factor in (0.99, 1.01):
        assert ((dequantised(codes, factor * scales, 1024, 4) - table).square().sum(1) > best).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tables_of_any_float_are_rounded(dtype):
    table = torch.randn(9, 40).to(dtype)
    for one, other in zip(quantised(table, 8), quantised(table.float(), 8), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    table = torch.randn(4, 8)
    table[2, 3] = value
    with pytest.raises(ValueError, match="must hold finite numbers, got NaN or infinite ones"):
        quantised(table, 8)


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits must be one of 8, 4, got 3"):
        quantised(torch.randn(2, 2), 3)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_the_rounded_rows(bits):
    codes, scales = quantised(torch.randn(20, 150), bits)
    table = dequantised(codes, scales, 150, bits).double()
    slots, weights = torch.randint(20, (5, 7)), torch.randn(5, 7, requires_grad=True)
    outputs = torch.randn(5, 150, requires_grad=True)
    read_low_bits(codes, scales, slots, weights, 150, bits).square().sum().backward()
    dot_low_bits(codes, scales, slots, outputs, bits).square().sum().backward()
    grads = weights.grad, outputs.grad
    weights, outputs = (one.detach().double().requires_grad_() for one in (weights, outputs))
    torch.einsum("tk,tkv->tv", weights, table[slots]).square().sum().backward()
    torch.einsum("tv,tkv->tk", outputs, table[slots]).square().sum().backward()
    torch.testing.assert_close(grads, (weights.grad.float(), outputs.grad.float()), rtol=1e-4, atol=1e-3)


def test_derivatives_of_any_kind_are_those_of_the_rounded_rows():
    codes, scales = quantised(torch.randn(20, 30), 8)
    slots, weights, outputs = torch.randint(20, (5, 7)), torch.randn(5, 7), torch.randn(5, 30)
    for of, given in (
        (lambda weights: read_low_bits(codes, scales, slots, weights, 30, 8), weights),
        (lambda outputs: dot_low_bits(codes, scales, slots, outputs, 8), outputs),
    ):
        _, tangent = torch.func.jvp(of, (given,), (given,))  # linear: in its own direction it is itself
        torch.testing.assert_close(tangent, of(given), rtol=1e-4, atol=1e-4)
