import pytest
import torch
from torch.library import opcheck

from memlayers.ops.precision import wide_dtype
from memlayers.ops.read import dot, dot_reference, read, sum_rows

SIZES = [(11, 5, 3, 7), (4, 1, 1, 1), (50, 17, 13, 31), (3, 0, 2, 5)]  # S, T, K, V


def inputs(size, dtype=torch.float64, weight_dtype=None):
    slots, tokens, topk, width = size
    return (
        torch.randn(slots, width).to(dtype),
        torch.randint(slots, (tokens, topk)),
        torch.randn(tokens, topk).to(weight_dtype or dtype),
    )


def naive_read(table, slots, weights):
    return (table[slots] * weights[..., None]).sum(1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_read_and_its_gradients_match_the_gather(size):
    table, slots, weights = inputs(size)
    grad = torch.randn(size[1], size[3], dtype=torch.float64)
    results = []
    for function in (read, naive_read):
        leaves = [table.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = function(leaves[0], slots, leaves[1])
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_dot_and_its_gradients_match_the_gather(size):
    table, slots, grad = inputs(size)
    outputs = torch.randn(size[1], size[3], dtype=torch.float64)
    results = []
    for function in (dot, lambda t, s, y: (t[s] * y[:, None]).sum(-1)):
        leaves = [table.clone().requires_grad_(), outputs.clone().requires_grad_()]
        scores = function(leaves[0], slots, leaves[1])
        results.append([scores, *torch.autograd.grad(scores, leaves, grad)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_slots_and_weights_may_lie_anywhere(dtype):
    table, slots, weights = inputs((11, 5, 3, 7), dtype)
    apart_slots, apart_weights = (torch.stack([one, one], -1)[..., 0] for one in (slots, weights))
    assert not apart_slots.is_contiguous()
    assert not apart_weights.is_contiguous()
    results = []
    for leaves in ((slots, weights), (apart_slots, apart_weights)):
        weight = leaves[1].detach().requires_grad_()
        y = read(table, leaves[0], weight)
        results.append((y, *torch.autograd.grad(y.sum(), weight)))
    for result, expected in zip(*results, strict=True):
        assert torch.equal(result, expected)


def test_second_derivatives_of_all_three():
    table, slots, weights = inputs((6, 3, 4, 5))
    outputs = torch.randn(3, 5, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (table, weights, outputs)]
    for function, inner in (
        (lambda t, w: read(t, slots, w), leaves[:2]),
        (lambda t, y: dot(t, slots, y), leaves[::2]),
        (lambda w, y: sum_rows(slots, w, y, 6), leaves[1:]),
    ):
        assert torch.autograd.gradgradcheck(function, tuple(inner))


def test_gradcheck():
    table, slots, weights = inputs((6, 3, 4, 5))
    assert torch.autograd.gradcheck(lambda t, w: read(t, slots, w), (table.requires_grad_(), weights.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tables_are_summed_in_float32(dtype):
    # 4,096 ones of weight 1: bfloat16 sums stick at 256, float16 at 2,048.
    table = torch.ones(3, 5).to(dtype).requires_grad_()
    slots = torch.zeros(2, 4096, dtype=torch.int64)
    weights = torch.ones(2, 4096, requires_grad=True)
    y = read(table, slots, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.full((2, 5), 4096.0))
    y.sum().backward()
    assert table.grad.dtype == dtype
    assert torch.equal(table.grad[0].float(), torch.full((5,), 8192.0))
    assert torch.equal(weights.grad, torch.full((2, 4096), 5.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tables_match_the_gather_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr("memlayers.ops.read._CHUNK_ELEMENTS", 100)
    table, slots, weights = inputs((20, 9, 5, 7), dtype, torch.float32)
    outputs = torch.randn(9, 7)
    torch.testing.assert_close(read(table, slots, weights), naive_read(table.float(), slots, weights))
    torch.testing.assert_close(dot(table, slots, outputs), (table.float()[slots] * outputs[:, None]).sum(-1))


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_operations_keep_torch_s_rules(size):
    table, slots, weights = inputs(size, torch.float32)
    outputs = torch.randn(size[1], size[3])
    for tensor in (table, weights, outputs):
        tensor.requires_grad_()
    opcheck(torch.ops.memlayers.read.default, (table, slots, weights))
    opcheck(torch.ops.memlayers.dot.default, (table, slots, outputs))
    opcheck(torch.ops.memlayers.sum_rows.default, (slots, weights.detach(), outputs.detach(), size[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_rows_at_all(dtype):
    table, slots, weights = inputs((3, 2, 0, 5), dtype, torch.float32)
    assert torch.equal(read(table, slots, weights), torch.zeros(2, 5, dtype=wide_dtype(dtype)))
    assert dot(table, slots, torch.randn(2, 5)).shape == (2, 0)
    assert dot_reference(table, slots, torch.randn(2, 5)).shape == (2, 0)
