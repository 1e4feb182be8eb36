"""The kernels of rows of 8 and 4 bits against their references."""

import pytest
import torch

from memlayers import MemoryConfig, MemoryLayer, quantize_memory
from memlayers.layer import try_infer
from memlayers.ops import cpu
from memlayers.ops.low_bits import code_bytes, dot_low_bits, dot_reference, quantised, read_low_bits, read_reference

# S, V, T, K: widths of whole groups, between and below; one row, no token, enough tokens to share out rows.
SIZES = [(50, 1024, 5, 128), (50, 7, 5, 13), (40, 200, 3, 1), (30, 128, 9, 64), (3, 1, 2, 5), (5, 64, 0, 3)]
SIZES += [(200, 300, 70, 33), (9, 513, 4, 31)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_they_are_the_references(sizes, bits, threads):
    num_slots, width, num_tokens, topk = sizes
    codes = torch.randint(256, (num_slots, code_bytes(width, bits)), dtype=torch.uint8)
    scales = torch.randn(num_slots) / 2 ** (bits - 1)
    slots, weights = torch.randint(num_slots, (num_tokens, topk)), torch.randn(num_tokens, topk)
    y = read_low_bits(codes, scales, slots, weights, width, bits)
    assert (y.dtype, y.is_contiguous()) == (torch.float32, True)
    torch.testing.assert_close(y, read_reference(codes, scales, slots, weights, width, bits), rtol=1e-5, atol=3e-5)
    outputs = torch.randn(num_tokens, width)
    expected = dot_reference(codes, scales, slots, outputs, bits)
    torch.testing.assert_close(dot_low_bits(codes, scales, slots, outputs, bits), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_integer_is_itself(bits):
    count = 2**bits
    integers = torch.arange(-count // 2, count // 2).float().repeat(1, 300 // count + 1)
    codes, scales = quantised(integers, bits)
    y = read_low_bits(codes, scales, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), integers.shape[1], bits)
    torch.testing.assert_close(y, integers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 5])
@pytest.mark.parametrize("bits", [8, 4])
def test_slots_out_of_range_are_an_error_and_no_memory_is_read(bad, bits):
    codes, scales = quantised(torch.randn(5, 16), bits)
    slots = torch.randint(5, (3, 4))
    slots[1, 2] = bad
    with pytest.raises(IndexError, match=r"slots must be in \[0, 5\), got"):
        read_low_bits(codes, scales, slots, torch.randn(3, 4), 16, bits)
    with pytest.raises(IndexError, match=r"slots must be in \[0, 5\), got"):
        dot_low_bits(codes, scales, slots, torch.randn(3, 16), bits)


def test_codes_of_another_width_never_reach_the_kernels():
    codes, scales = quantised(torch.randn(5, 64), 8)
    with pytest.raises(Exception, match="size"):
        read_low_bits(codes, scales, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), 1000, 8)


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 90])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_as_one_operation_is_the_layer_that_calls_its_parts(tokens, bits, threads):
    layer = MemoryLayer(MemoryConfig(dim=48, value_dim=200, heads=3, topk=5, num_subkeys=12, query_dim=14))
    layer(torch.randn(50, 48) * 3 + 1)
    quantize_memory(layer.eval(), bits)
    x = torch.randn(tokens, 48)
    expected = layer(x).detach()  # with gradients, the parts run
    with torch.no_grad():
        assert try_infer(layer, x) is not None
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 9])
def test_a_layer_in_bfloat16(tokens):
    layer = MemoryLayer(MemoryConfig(dim=48, value_dim=200, heads=3, topk=5, num_subkeys=12, query_dim=14))
    layer(torch.randn(50, 48) * 3 + 1)
    quantize_memory(layer.eval(), 4).bfloat16()
    x = torch.randn(tokens, 48).bfloat16()
    with torch.no_grad():
        y = try_infer(layer, x)
    weights, slots = zip(*(parts(layer, x[i : i + 1]) for i in range(tokens)), strict=True)
    expected = layer.values.read(torch.cat(slots), torch.cat(weights))
    assert ((y - expected).abs() > 1e-2).any(1).float().mean() < 0.5  # of rounded queries a slot may be another one


def parts(layer, x):
    scores, slots = layer.keys(layer.query(x))
    return layer.weigh(scores).flatten(1), slots.flatten(1)


def test_without_kernels_the_reference_runs(monkeypatch):
    codes, scales = quantised(torch.randn(20, 33), 4)
    slots, weights = torch.randint(20, (4, 6)), torch.randn(4, 6)
    y = read_low_bits(codes, scales, slots, weights, 33, 4)
    monkeypatch.setattr(cpu, "kernels", lambda operation: None)
    torch.testing.assert_close(read_low_bits(codes, scales, slots, weights, 33, 4), y, rtol=1e-5, atol=1e-5)
