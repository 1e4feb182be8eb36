"""The kernels of read, dot and sum_rows against their references."""

import pytest
import torch

from memlayers import MemoryConfig, MemoryLayer, RowAdam
from memlayers.ops import cpu
from memlayers.ops.read import dot, dot_reference, read, read_reference, sum_rows

# S, V, T, K: odd and prime widths, a vector and more, one row, one column, no token, enough tokens to share out rows.
SIZES = [(50, 1024, 5, 128), (50, 7, 5, 13), (40, 67, 3, 1), (30, 131, 9, 64), (3, 1, 2, 5), (5, 64, 0, 3)]
SIZES += [(200, 16, 70, 33), (100, 300, 65, 17), (9, 257, 4, 31)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(sizes, dtype=torch.float32):
    num_slots, width, num_tokens, topk = sizes
    table = torch.randn(num_slots, width).to(dtype)
    return table, torch.randint(num_slots, (num_tokens, topk)), torch.randn(num_tokens, topk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_read_is_the_reference(sizes, dtype, threads):
    table, slots, weights = arguments(sizes, dtype)
    y = read(table, slots, weights)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, read_reference(table.double(), slots, weights.double()).float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_dot_is_the_reference(sizes, dtype, threads):
    table, slots, _ = arguments(sizes, dtype)
    outputs = torch.randn(len(slots), table.shape[1])
    expected = dot_reference(table.double(), slots, outputs.double()).float()
    torch.testing.assert_close(dot(table, slots, outputs), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_the_reference_s(sizes):
    table, slots, weights = arguments(sizes)
    if not len(slots):
        return
    grads = {}
    for name, function in (("kernel", read), ("reference", read_reference)):
        table.requires_grad_().grad, weights.requires_grad_().grad = None, None
        function(table, slots, weights).square().sum().backward()
        grads[name] = table.grad, weights.grad
    for grad, expected in zip(grads["kernel"], grads["reference"], strict=True):
        torch.testing.assert_close(grad, expected, rtol=2e-4, atol=2e-3)


def test_every_float16_and_bfloat16_is_widened_exactly():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        for row in (bits, bits[:-1]):  # in vectors, and with a rest that fills none
            table = row.view(dtype)[None].contiguous()
            y = read(table, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
            assert torch.equal(y.isnan(), table.isnan())
            assert torch.equal(y.nan_to_num(1.0), table.float().nan_to_num(1.0))


@pytest.mark.parametrize("bad", [-1, 5])
def test_slots_out_of_range_are_an_error_and_no_memory_is_read(bad):
    table, slots, weights = arguments((5, 16, 3, 4))
    slots[1, 2] = bad
    for call in (
        lambda: read(table, slots, weights),
        lambda: dot(table, slots, torch.randn(3, 16)),
        lambda: sum_rows(slots, weights, torch.randn(3, 16), 5),
    ):
        with pytest.raises(IndexError, match=r"slots must be in \[0, 5\), got"):
            call()


def test_results_do_not_depend_on_threads_or_runs():
    table, slots, weights = arguments((400, 200, 300, 40))
    outputs = torch.randn(300, 200)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(
            (read(table, slots, weights), dot(table, slots, outputs), sum_rows(slots, weights, outputs, 400))
        )
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_a_table_of_more_than_2_31_elements():
    """Sparsely: 2.2 G elements of which a few rows are ever touched, so they take no memory."""
    slots, width = 2**21 + 2**17, 1024
    table = _untouched(slots, width)
    rows = torch.tensor([0, 2**21 - 1, 2**21, slots - 1])
    values = torch.randn(4, width)
    table[rows] = values.half()
    y = read(table, rows[None], torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    expected = (values.half().float() * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]).sum(0, keepdim=True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dot(table, rows[None], y), (values.half().float() @ y.T).T, rtol=1e-5, atol=1e-2)


def _untouched(slots, width):
    torch.use_deterministic_algorithms(False)  # which would fill it
    return torch.empty(slots, width, dtype=torch.float16)


def test_without_kernels_the_reference_runs(monkeypatch):
    table, slots, weights = arguments((20, 33, 4, 6))
    y = read(table, slots, weights)
    monkeypatch.setattr(cpu, "kernels", lambda operation: None)
    torch.testing.assert_close(read(table, slots, weights), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_makes_no_difference(default):
    """Of the whole layer, forward, backward, step and inference."""
    results = []
    for dtype in (torch.float32, default):
        torch.manual_seed(0)
        layer = MemoryLayer(MemoryConfig(dim=16, heads=2, topk=4, num_subkeys=8, query_dim=8))
        optimizer, x = RowAdam(layer, max_grad_norm=1.0), torch.randn(30, 16)
        torch.set_default_dtype(dtype)
        try:
            y = layer(x)
            y.square().sum().backward()
            optimizer.step()
            layer.eval()
            with torch.no_grad():
                results.append(
                    [y.detach(), layer.keys.weight.grad, layer.values.weight.detach(), layer(x[:2]), layer(x)]
                )
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_slots_of_32_bits():
    table, slots, weights = arguments((20, 33, 4, 6))
    assert torch.equal(read(table, slots.int(), weights), read(table, slots, weights))
    outputs = torch.randn(4, 33)
    assert torch.equal(dot(table, slots.int(), outputs), dot(table, slots, outputs))
