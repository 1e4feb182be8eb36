"""The kernels of search against their references."""

from types import SimpleNamespace

import pytest
import torch

from memlayers.ops import exported
from memlayers.ops.cpu import search as kernels
from memlayers.ops.search import search, search_backward, search_backward_reference, search_reference

# T, H, N, C, K
SIZES = [(5, 2, 7, 3, 7), (70, 3, 64, 16, 32), (130, 1, 33, 67, 5), (1, 4, 512, 256, 32), (3, 2, 2, 1, 1)]
SIZES += [(700, 4, 512, 64, 32), (0, 2, 8, 4, 3), (9, 1, 100, 130, 100)]


def arguments(sizes):
    num_tokens, heads, num_subkeys, half, topk = sizes
    return torch.randn(num_tokens, heads, 2 * half), torch.randn(2, heads, num_subkeys, half), topk


def exact(query, keys, topk):
    """On a grid, where products and sums are exact, so that slots compare."""
    return (query * 2).round() / 2, (keys * 2).round() / 2, topk


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_reference(sizes, threads):
    query, keys, topk = exact(*arguments(sizes))
    found, expected = search(query, keys, topk), search_reference(query, keys, topk)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_blocks_of_tokens_make_no_difference(monkeypatch):
    query, keys, topk = exact(*arguments((130, 2, 20, 8, 9)))
    whole = kernels.search(query, keys, topk)
    monkeypatch.setattr(kernels, "CPU_BLOCK", (2 * 2 * 20 * 7, 1))
    blocks = kernels.search(query, keys, topk)
    assert all(torch.equal(one, other) for one, other in zip(whole, blocks, strict=True))


@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sizes[0]], ids=str)
def test_gradients_are_the_reference_s(sizes, threads):
    query, keys, topk = arguments(sizes)
    _, slots = search(query, keys, topk)
    grad = torch.randn(slots.shape)
    found = search_backward(grad, slots, query, keys)
    expected = search_backward_reference(*(part.double() for part in (grad,)), slots, query.double(), keys.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


def test_gradients_through_autograd_match_those_of_plain_operations():
    query, keys, topk = arguments((40, 3, 32, 10, 8))
    query.requires_grad_()
    keys.requires_grad_()
    scores, slots = search(query, keys, topk)
    weight = torch.randn(scores.shape)
    grads = torch.autograd.grad((scores * weight).sum(), (query, keys))
    head = torch.arange(3)[None, :, None]
    first, second = query.unflatten(-1, (2, 10)).unbind(2)
    plain = (first[:, :, None] * keys[0][head, slots // 32]).sum(-1)
    plain = plain + (second[:, :, None] * keys[1][head, slots % 32]).sum(-1)
    for grad, other in zip(grads, torch.autograd.grad((plain * weight).sum(), (query, keys)), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_depend_on_threads():
    query, keys, topk = arguments((200, 2, 64, 70, 16))
    _, slots = search(query, keys, topk)
    grad = torch.randn(slots.shape)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(search_backward(grad, slots, query, keys))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_queries(dtype):
    query, keys, topk = (part.to(dtype) if torch.is_tensor(part) else part for part in arguments((20, 2, 64, 16, 8)))
    query.requires_grad_()
    keys.requires_grad_()
    scores, slots = search(query, keys, topk)
    assert scores.dtype == torch.float32
    wide, _ = search(query.float(), keys.float(), topk)
    torch.testing.assert_close(scores, wide, rtol=2e-2, atol=2e-2)
    scores.sum().backward()
    assert query.grad.dtype == keys.grad.dtype == dtype
    expected = search_backward(torch.ones_like(scores), slots, query.detach().float(), keys.detach().float())
    torch.testing.assert_close(query.grad.float(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(keys.grad.float(), expected[1], rtol=2e-2, atol=5e-2)


# Whole tiles of the matrix units (32 sub-keys, 32 elements), with tokens that fill the last ones or not; and what fills
# none.
OF_16_BITS = [(1, 2, 32, 32, 8), (16, 1, 64, 32, 5), (17, 3, 96, 64, 32), (150, 4, 512, 128, 32), (40, 2, 64, 30, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [*OF_16_BITS, (0, 2, 32, 32, 3), (20, 2, 33, 32, 3)], ids=str)
def test_scores_of_16_bits_are_the_float32_scores_of_the_same_numbers(sizes, dtype, threads, monkeypatch):
    """As near as sums in another order: rounded to bfloat16 they would differ by 2**-9 of themselves."""
    monkeypatch.setattr(kernels, "CPU_BLOCK", (2 * sizes[1] * sizes[2] * 50, 1))  # several blocks of tokens
    query, keys, topk = arguments(sizes)
    query, keys = query.to(dtype), keys.to(dtype)
    scores, _slots = search(query, keys, topk)
    expected, _ = search_reference(query.double(), keys.double(), topk)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    strided, _ = search(query.transpose(0, 1).contiguous().transpose(0, 1), keys, topk)
    assert torch.equal(strided, scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", [search, search_reference, exported.search], ids=["kernel", "reference", "exported"])
def test_scores_of_16_bits_do_not_tie(path, dtype):
    """Rounded to bfloat16 two thirds of the 32 scores of a row are equal to others."""
    query, keys, topk = arguments((60, 2, 512, 64, 32))
    scores, _ = path(query.to(dtype), keys.to(dtype), topk)
    distinct = [len(set(row.tolist())) for row in scores.flatten(0, 1)]
    assert sum(distinct) > 31.9 * len(distinct)


def test_matrix_units_are_left_as_they_were(threads):
    """Products of PyTorch's, which use them too, are right before and after."""
    if kernels.matrix_units() is None:
        pytest.skip("this processor has no matrix units, or they may not be used")
    one, other = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    before = one @ other
    query, keys, topk = (part.bfloat16() if torch.is_tensor(part) else part for part in arguments(OF_16_BITS[2]))
    assert kernels.matrix_units().takes(query, keys)
    for _ in range(3):
        search(query, keys, topk)
        assert torch.equal(one @ other, before)


@pytest.mark.parametrize("takes", [True, False])
def test_matrix_units_search_what_they_take(takes, monkeypatch):
    query, keys, topk = arguments((5, 2, 7, 3, 7))
    asked = []
    units = SimpleNamespace(takes=lambda *given: takes, search=lambda *given: asked.append(given) or "found")
    monkeypatch.setattr(kernels, "matrix_units", lambda: units)
    found = kernels.search(query, keys, topk)
    assert (found == "found") is takes
    assert asked == ([(query, keys, topk, False)] if takes else [])


@pytest.mark.parametrize("bad", [-1, 49])
def test_slots_out_of_range_are_an_error(bad):
    query, keys, topk = arguments((5, 2, 7, 3, 7))
    slots = search(query, keys, topk)[1].clone()
    slots[3, 1, 2] = bad
    with pytest.raises(IndexError, match=r"slots must be in \[0, 49\), got"):
        search_backward(torch.randn(slots.shape), slots, query, keys)


def test_operations_keep_torch_s_rules():
    query, keys, topk = arguments((6, 2, 9, 4, 3))
    torch.library.opcheck(torch.ops.memlayers.search.default, (query.requires_grad_(), keys.requires_grad_(), topk))
    grad, slots = torch.randn(6, 2, 3), torch.randint(81, (6, 2, 3))
    torch.library.opcheck(torch.ops.memlayers.search_backward.default, (grad, slots, query.detach(), keys.detach()))


@pytest.mark.parametrize("wanted", ["query", "keys"])
def test_a_gradient_that_nobody_wants_is_not_computed(wanted, monkeypatch):
    query, keys, topk = arguments((20, 2, 16, 5, 4))
    leaf = {"query": query, "keys": keys}[wanted].requires_grad_()
    scores, slots = search(query, keys, topk)
    (grad,) = torch.autograd.grad(scores.sum(), leaf)
    both = search_backward(torch.ones_like(scores), slots, query.detach(), keys.detach())
    assert torch.equal(grad, both[wanted == "keys"])
    one = search_backward(
        torch.ones_like(scores), slots, query.detach(), keys.detach(), wanted == "query", wanted == "keys"
    )
    assert one[wanted == "query"].numel() == 0


def test_second_derivatives():
    query, keys, _ = (part.double() if torch.is_tensor(part) else part for part in arguments((3, 2, 6, 2, 3)))
    grad, slots = torch.randn(3, 2, 3, dtype=torch.float64), torch.randint(36, (3, 2, 3))
    inputs = (grad.requires_grad_(), query.requires_grad_(), keys.requires_grad_())
    torch.autograd.gradcheck(lambda grad, query, keys: search_backward(grad, slots, query, keys), inputs)
