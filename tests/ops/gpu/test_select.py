import pytest
import torch

from memlayers.ops.gpu import select as kernels
from memlayers.ops.select import select_pairs, select_reference

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, interpreted


def normal(*shape):
    return torch.randn(shape)


def ties(*shape):
    return torch.randint(-2, 3, shape).float()


def signed_zeros(*shape):
    return torch.zeros(shape) * torch.randn(shape).sign()


def clusters(*shape):
    """Scores that differ in their last bits only."""
    return 1 + 1e-7 * torch.randint(9, shape) * torch.randn(shape).sign()


def extremes(*shape):
    """Infinities of both signs, whose sums are NaN, and NaN."""
    scores, chance = torch.randn(shape), torch.rand(shape)
    for most, value in ((0.3, torch.inf), (0.2, -torch.inf), (0.05, torch.nan)):
        scores[chance < most] = value
    return scores


def check(first, second, topk):
    scores, slots = select_pairs(first, second, topk)
    expected, expected_slots = select_reference(first.float(), second.float(), topk)
    assert scores.dtype == torch.float32
    assert torch.equal(slots, expected_slots)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [normal, ties, clusters], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("num_subkeys", "topk"), [(1, 1), (2, 2), (3, 1), (7, 5), (16, 16), (97, 6), (128, 4)])
def test_it_is_the_reference(num_subkeys, topk, kind, device):
    check(*kind(2, 1, num_subkeys).to(device), topk)


@pytest.mark.parametrize(("num_subkeys", "topk"), [(1024, 32), (61, 33), (1000, 8), (4096, 16)])
def test_it_is_the_reference_at_sizes_in_use(num_subkeys, topk, device):
    check(*normal(2, 1, num_subkeys).to(device), topk)


@pytest.mark.parametrize("kind", [signed_zeros, extremes], ids=lambda kind: kind.__name__)
def test_special_values_have_the_place_that_the_reference_gives_them(kind, device):
    check(*kind(2, 2, 64).to(device), 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [normal, ties], ids=lambda kind: kind.__name__)
def test_scores_of_16_bits(dtype, kind, device):
    check(*kind(2, 1, 200).to(device, dtype), 8)


def test_slots_of_the_largest_table_survive(device):
    first, second = normal(2, 1, 2**16).to(device)
    first[0, -1] = second[0, -1] = 100
    scores, slots = select_pairs(first, second, 16)
    assert slots[0, 0] == 2**32 - 1
    assert scores[0, 0] == 200


@pytest.mark.parametrize(
    "strided",
    [
        pytest.param(lambda half_ABN: half_ABN.transpose(0, 1), id="rows-turned"),
        pytest.param(lambda half_ABN: half_ABN[:, :1], id="a-part-of-the-rows"),
        pytest.param(lambda half_ABN: half_ABN[..., 1:], id="not-aligned"),
        pytest.param(lambda half_ABN: half_ABN[..., ::2], id="scores-apart"),
        pytest.param(lambda half_ABN: half_ABN[0, 0], id="one-row"),
        pytest.param(lambda half_ABN: half_ABN[:0], id="no-row"),
    ],
)
def test_strided_inputs(strided, device):
    check(*(strided(half) for half in normal(2, 1, 2, 24).to(device)), 3)


def test_softmax_of_the_scores(device):
    first, second = normal(2, 2, 1, 37).to(device)
    weights, slots = kernels.select(first, second, 7, softmax=True)
    expected, expected_slots = select_reference(first, second, 7)
    assert torch.equal(slots, expected_slots)
    torch.testing.assert_close(weights, expected.softmax(-1))


def test_gradients_are_those_of_the_reference(device):
    halves = [half.to(device).requires_grad_() for half in normal(2, 3, 19)]
    grad = normal(3, 6).to(device)
    grads = torch.autograd.grad(select_pairs(*halves, 6)[0], halves, grad)
    expected = torch.autograd.grad(select_reference(*halves, 6)[0], halves, grad)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("topk", [0, 5])
def test_a_topk_out_of_range_is_an_error(topk, device):
    with pytest.raises(ValueError, match=f"topk must be in .* got {topk} and 4"):
        kernels.select(*normal(2, 1, 1, 4).to(device), topk)


def test_halves_of_two_shapes_are_an_error(device):
    with pytest.raises(ValueError, match="one shape"):
        kernels.select(normal(1, 1, 4).to(device), normal(1, 2, 4).to(device), 1)


def test_it_takes_what_the_kernel_knows():
    assert kernels.takes(4, 4, torch.float32, torch.float16)
    assert not kernels.takes(4, 4, torch.float64)
    assert not kernels.takes(4, 1000, torch.float32)
    assert not kernels.takes(2**13, 64, torch.float32)
