import pytest
import torch

from memlayers.ops.gpu import search as kernels
from memlayers.ops.search import half_scores, search, search_backward, search_backward_reference
from memlayers.ops.select import select_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A unit in the last place, of results that are rounded once from sums in float32 of rounded factors.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def inputs(tokens, heads, num_subkeys, half, device, dtype=torch.float32):
    query_THQ = torch.randn(tokens, heads, 2 * half).to(device, dtype)
    return query_THQ, torch.randn(2, heads, num_subkeys, half).to(device, dtype)


def small_integers(tokens, heads, num_subkeys, half, device, dtype=torch.float32):
    """Their products are exact in any order, and mostly tie."""
    query_THQ = torch.randint(-2, 3, (tokens, heads, 2 * half)).to(device, dtype)
    return query_THQ, torch.randint(-2, 3, (2, heads, num_subkeys, half)).to(device, dtype)


SHAPES = [(1, 1, 1, 1, 1), (3, 1, 7, 3, 7), (2, 2, 61, 5, 6), (1, 1, 40, 4, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_finds_what_the_reference_finds(shape, dtype, device):
    *sizes, topk = shape
    query, keys = small_integers(*sizes, device, dtype)
    scores, slots = search(query, keys, topk)
    first_HTN, second_HTN = half_scores(query.float(), keys.float())
    expected, expected_slots = select_reference(first_HTN, second_HTN, topk)
    assert torch.equal(slots, expected_slots.transpose(0, 1))
    assert torch.equal(scores, expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_in_float64(shape, dtype, device):
    *sizes, topk = shape
    query, keys = inputs(*sizes, device, dtype)
    slots = torch.randint(sizes[2] ** 2, (*query.shape[:2], topk), device=device)
    grad = torch.randn(slots.shape, device=device)
    grads = search_backward(grad, slots, query, keys)
    expected = search_backward_reference(grad.double(), slots, query.double(), keys.double())
    for found, wanted, given in zip(grads, expected, (query, keys), strict=True):
        assert found.dtype == given.dtype
        assert found.is_contiguous()
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens_at_once", [1, 2])
def test_blocks_of_tokens_change_nothing(tokens_at_once, monkeypatch, device):
    query, keys = small_integers(3, 1, 11, 3, device)
    whole = search(query, keys, 4)
    grad = torch.randint(-3, 4, (3, 1, 4)).to(device).float()
    whole_grads = search_backward(grad, whole[1], query, keys)
    monkeypatch.setattr(kernels, "GPU_BLOCK", (2 * 11 * tokens_at_once + 5, 0))
    assert all(map(torch.equal, search(query, keys, 4), whole))
    assert all(map(torch.equal, search_backward(grad, whole[1], query, keys), whole_grads))


def test_a_gradient_that_is_not_wanted_is_empty(device):
    query, keys = inputs(3, 2, 9, 2, device)
    scores, slots = torch.randn(3, 2, 4, device=device), torch.randint(81, (3, 2, 4), device=device)
    both = search_backward(scores, slots, query, keys)
    only_query = search_backward(scores, slots, query, keys, True, False)
    only_keys = search_backward(scores, slots, query, keys, False, True)
    assert torch.equal(only_query[0], both[0])
    assert torch.equal(only_keys[1], both[1])
    assert only_query[1].numel() == only_keys[0].numel() == 0


def test_gradients_of_equal_subkeys_are_added_up(device):
    """All slots of a row of the grid have one first sub-key."""
    query, keys = inputs(1, 1, 4, 1, device)
    slots = torch.tensor([[[4, 5, 6, 7]]], device=device)
    grad = torch.tensor([[[1.0, 2, 4, 8]]], device=device)
    _, grad_keys = search_backward(grad, slots, query, keys)
    first, second = query[0, 0].tolist()
    assert grad_keys[0, 0, :, 0].tolist() == pytest.approx([0, 15 * first, 0, 0])
    assert grad_keys[1, 0, :, 0].tolist() == pytest.approx([second, 2 * second, 4 * second, 8 * second])


def test_slots_outside_the_table_have_no_gradient(device):
    query, keys = inputs(1, 1, 4, 1, device)
    slots = torch.tensor([[[-1, 16, 2**40, 3]]], device=device)
    _, grad_keys = search_backward(torch.ones(1, 1, 4, device=device), slots, query, keys)
    assert grad_keys[0, 0, :, 0].tolist() == pytest.approx([query[0, 0, 0].item(), 0, 0, 0])


def test_no_tokens(device):
    query, keys = (given.requires_grad_() for given in inputs(0, 2, 9, 2, device))
    scores, slots = search(query, keys, 4)
    grads = torch.autograd.grad(scores.sum(), (query, keys))
    assert scores.shape == slots.shape == (0, 2, 4)
    assert grads[0].shape == query.shape
    assert not grads[1].any()


def test_autograd_goes_through_the_kernels(device):
    query, keys = (given.requires_grad_() for given in inputs(2, 2, 9, 4, device))
    scores, slots = search(query, keys, 3)
    grad = torch.randn_like(scores)
    grads = torch.autograd.grad(scores, (query, keys), grad)
    torch.testing.assert_close(grads, search_backward_reference(grad, slots, query, keys))


def test_autocast_does_not_interfere(device):
    query, keys = inputs(2, 1, 9, 4, device)
    expected = search(query, keys, 3)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = search(query, keys, 3)
    assert all(map(torch.equal, found, expected))


def test_strided_queries(device):
    query, keys = small_integers(2, 1, 9, 4, device)
    strided = torch.stack([query, query]).permute(1, 2, 3, 0).flatten(2)[..., ::2]
    assert not strided.is_contiguous()
    expected = search(query, keys, 3)
    assert all(map(torch.equal, search(strided, keys, 3), expected))
    grads = [search_backward(expected[0], expected[1], given, keys) for given in (query, strided)]
    assert all(map(torch.equal, *grads))


def test_second_derivatives(device):
    query, keys = (given.requires_grad_() for given in inputs(2, 1, 5, 2, device))
    grad = torch.randn(2, 1, 3, device=device, requires_grad=True)
    scores, slots = search(query, keys, 3)
    first = torch.autograd.grad(scores, (query, keys), grad, create_graph=True)
    found = torch.autograd.grad(sum(part.square().sum() for part in first), (grad, query, keys))
    expected = search_backward_reference(grad, slots, query, keys)
    wanted = torch.autograd.grad(sum(part.square().sum() for part in expected), (grad, query, keys))
    torch.testing.assert_close(found, wanted)


def test_it_is_deterministic(device):
    query, keys = inputs(9, 1, 16, 4, device)
    scores = torch.randn(9, 1, 8, device=device)
    slots = torch.randint(16**2, (9, 1, 8), device=device)
    results = [search_backward(scores, slots, query, keys) for _ in range(2)]
    assert all(map(torch.equal, *results))
