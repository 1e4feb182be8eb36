import pytest
import torch

from memlayers.ops import cpu
from memlayers.ops.rounding import hash32, round_to_bfloat16
from memlayers.ops.row_step import row_sgd_


def plain_hash(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_the_hash_is_murmur_s_finaliser_on_the_lower_32_bits():
    values = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 2**32 + 5, 2**63 - 1]
    expected = [plain_hash(value % 2**32) for value in values]
    assert hash32(torch.tensor(values)).tolist() == expected
    assert plain_hash(1) == 0x514E28B7  # as published


@pytest.mark.parametrize(("stream", "step"), [(0, 0x9E3779B1), (1, 0x85EBCA6B), (2, 0xC2B2AE35)])
def test_each_element_adds_16_bits_of_its_row_s_sequence(stream, step):
    slots, seed = torch.tensor([3, 4_000_000_000]), 5
    values = torch.randn(2, 70)
    rounded = round_to_bfloat16(values, slots, seed, stream)
    for row, slot in enumerate(slots.tolist()):
        of_row = plain_hash((slot + plain_hash(seed)) % 2**32)
        if stream:
            of_row = plain_hash((of_row + stream) % 2**32)
        for v in range(70):
            bits = values[row, v].view(torch.int32).item() % 2**32
            random = ((of_row + v) * step % 2**32) >> 16
            assert rounded[row, v].view(torch.int16).item() % 2**16 == (bits + random) >> 16


def test_it_goes_to_one_of_the_two_neighbours_and_leaves_what_is_one():
    values = torch.randn(50, 33) * 10.0 ** torch.randint(-20, 20, (50, 33))
    rounded = round_to_bfloat16(values, torch.arange(50), 1)
    below = (values.view(torch.int32) >> 16 << 16).view(torch.float32)  # towards zero
    above = (below.view(torch.int32) + 2**16).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    assert torch.equal(round_to_bfloat16(below, torch.arange(50), 1).float(), below)
    assert 0.4 < (rounded == below).float().mean() < 0.6


@pytest.mark.parametrize("part", [0.03, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("over", ["seeds", "slots", "columns"])
def test_it_is_right_on_average(part, over):
    """`part` of the way from -1.5 to its neighbour; within 5 standard errors of 20,000 roundings."""
    number = 20_000
    value = torch.tensor(-1.5 - part * 2**-7)
    if over == "seeds":
        rounded = torch.cat([round_to_bfloat16(value.expand(10, 10), torch.arange(10), seed) for seed in range(200)])
    elif over == "slots":
        rounded = round_to_bfloat16(value.expand(number, 1), torch.arange(number), 3)
    else:
        rounded = round_to_bfloat16(value.expand(1, number), torch.tensor([7]), 3)
    went = (rounded.float() != -1.5).double().mean().item()
    assert abs(went - part) < 5 * (part * (1 - part) / number) ** 0.5


def test_the_same_seed_rounds_the_same_and_another_otherwise():
    values, slots = torch.randn(20, 16), torch.arange(20)
    first = round_to_bfloat16(values, slots, 4)
    assert torch.equal(first, round_to_bfloat16(values, slots, 4))
    assert torch.equal(first[5:], round_to_bfloat16(values[5:], slots[5:], 4)), "a row depends on its slot alone"
    assert not torch.equal(first, round_to_bfloat16(values, slots, 5))
    assert not torch.equal(first, round_to_bfloat16(values, slots + 1, 4))


def test_streams_of_one_seed_round_independently_of_each_other():
    value = torch.tensor(-1.5 - 0.5 * 2**-7).expand(100, 200)
    ups = [round_to_bfloat16(value, torch.arange(100), 3, stream) != -1.5 for stream in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = (ups[one] & ups[other]).double().mean().item()
        assert abs(both - 0.25) < 5 * (0.25 * 0.75 / value.numel()) ** 0.5
    rounded = round_to_bfloat16(torch.full((1, 1), 0.3), torch.tensor([3]), 5, 2)
    row = plain_hash((plain_hash((3 + plain_hash(5)) % 2**32) + 2) % 2**32)
    bits = torch.tensor(0.3).view(torch.int32).item() + (row * 0xC2B2AE35 % 2**32 >> 16)
    assert rounded.view(torch.int16).item() == bits >> 16


SPECIAL = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, -1e-45, 3.3895e38, -3.3895e38, 1.0]


def test_what_is_not_finite_stays_what_it_is():
    rounded = round_to_bfloat16(torch.tensor([SPECIAL] * 50), torch.arange(50), 1)
    assert (rounded[:, 0] == torch.inf).all()
    assert (rounded[:, 1] == -torch.inf).all()
    assert rounded[:, 2].isnan().all()
    # A NaN whose bits are all in what is cut off.
    hidden = torch.tensor([[0x7F800001, -(2**31) + 0x7F80FFFF]], dtype=torch.int32).view(torch.float32)
    assert round_to_bfloat16(hidden, torch.tensor([0]), 1).isnan().all()


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
@pytest.mark.parametrize("width", [1, 7, 16, 67, 131])
def test_the_kernel_gives_the_same_bits(width):
    """Each row is its own gradient, exactly: 0 - 1 * g."""
    slots = torch.cat([torch.arange(99), torch.randperm(900)[:50] + 99])
    grads = torch.randn(149, width) * 10.0 ** torch.randint(-30, 30, (149, width))
    special = torch.tensor(SPECIAL * 20)[: grads.shape[1]]
    grads[7] = special
    grads[8, 0], grads[9, 0] = torch.inf, -torch.inf
    table = torch.zeros(1000, width, dtype=torch.bfloat16)
    row_sgd_(table, [slots[:, None]], [torch.ones(149, 1)], [grads], lr=1.0, seed=2**33 + 9)
    expected = round_to_bfloat16(0.0 - grads, slots, 2**33 + 9)
    isnan = expected.isnan()
    assert torch.equal(table[slots].isnan(), isnan)
    bits, expected_bits = table[slots].view(torch.int16), expected.view(torch.int16)
    assert torch.equal(bits.masked_fill(isnan, 0), expected_bits.masked_fill(isnan, 0))
