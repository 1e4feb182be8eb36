import gc

import pytest
import torch

from memlayers import RowAdam, ValueTable
from memlayers.ops import cpu
from memlayers.ops.row_gradient import RowGradient
from memlayers.ops.row_sum import Part, sum_parts


class Owner:
    """Anything that can be weakly referenced."""


def parts(num_slots, sizes, width=3):
    return [
        Part(torch.randint(num_slots, (tokens, topk)), torch.randn(tokens, topk), torch.randn(tokens, width))
        for tokens, topk in sizes
    ]


def dense(parts, num_slots, width=3):
    total = torch.zeros(num_slots, width)
    for part in parts:
        contributions = part.weights_TK[..., None] * part.grad_TV[:, None]
        total.index_add_(0, part.slots_TK.flatten(), contributions.flatten(0, 1))
    return total


def spread_out(summed, num_slots, width=3):
    rows = torch.arange(num_slots) if summed.rows_P is None else summed.rows_P
    assert len(set(rows.tolist())) == len(rows)
    total = torch.zeros(num_slots, width)
    total[rows] = summed.grad_PV
    return total, set(rows[summed.live_P].tolist())


@pytest.mark.parametrize("sizes", [[(2, 3)], [(2, 3), (1, 5)], [(40, 5)], [(1, 1)]], ids=str)
@pytest.mark.parametrize("num_slots", [1, 13, 50])
def test_sums_are_exact_distinct_and_know_which_rows_were_read(sizes, num_slots):
    recorded = parts(num_slots, sizes)
    summed = sum_parts(recorded, num_slots)
    total, live = spread_out(summed, num_slots)
    torch.testing.assert_close(total, dense(recorded, num_slots))
    assert live == {slot for part in recorded for slot in part.slots_TK.flatten().tolist()}
    assert not summed.grad_PV[~summed.live_P].any()
    assert len(summed.grad_PV) == min(num_slots, sum(tokens * topk for tokens, topk in sizes))


def test_chunks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr("memlayers.ops.row_sum._CHUNK_ELEMENTS", 9)
    summed = sum_parts(parts(50, [(4, 5)]), 50)
    pieces = list(summed.chunks())
    assert len(pieces) > 3
    assert torch.equal(torch.cat([index for index, _, _ in pieces]), summed.rows_P)
    assert torch.equal(torch.cat([grad for _, _, grad in pieces]), summed.grad_PV)


def row_gradient(num_slots=50):
    owner = Owner()
    weight, mark = torch.nn.Parameter(torch.zeros(num_slots, 3)), torch.nn.Parameter(torch.zeros(1))
    gradient = RowGradient(owner, weight, mark)
    return gradient, owner, mark


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(cpu, "kernels", lambda operation: None)


def test_add_norm_scale_and_discard(path):
    gradient, _owner, _ = row_gradient()
    recorded = parts(50, [(3, 4), (2, 4)])
    for part in recorded:
        gradient.add(*part)
    torch.testing.assert_close(gradient.norm(), dense(recorded, 50).norm())
    gradient.scale(0.5)
    torch.testing.assert_close(gradient.norm(), 0.5 * dense(recorded, 50).norm())
    gradient.discard()
    assert gradient.is_empty
    assert gradient.norm() == 0
    assert gradient.consume() is None


def test_norm_of_what_was_cleared_is_zero(path):
    gradient, _owner, mark = row_gradient()
    gradient.add(*parts(50, [(3, 4)])[0])
    mark.grad.zero_()
    assert gradient.is_empty
    assert gradient.norm() == 0


def test_consume_gives_what_was_recorded_and_leaves_nothing():
    gradient, _owner, _ = row_gradient()
    recorded = parts(50, [(3, 4), (2, 5)])
    for part in recorded:
        gradient.add(*part)
    consumed = gradient.consume()
    for part, expected in zip(consumed, recorded, strict=True):
        assert all(one is other for one, other in zip(part, expected, strict=True))
    assert gradient.consume() is None
    assert gradient.is_empty


def test_factors_larger_than_a_dense_gradient_are_merged_and_go_on_adding():
    gradient, _owner, _ = row_gradient(num_slots=8)
    recorded = parts(7, [(3, 4), (1, 2), (5, 4), (1, 1), (1, 3)])  # slot 7 is never read
    merges = 0
    for part in recorded:
        gradient.add(*part)
        merges += len(gradient._parts) == 1
        assert sum(part.size for part in gradient._parts) <= 2 * 8 * 3 + 2 * 8
    assert 2 <= merges < len(recorded)
    gradient.scale(2.0)
    torch.testing.assert_close(gradient.norm(), 2 * dense(recorded, 8).norm())
    consumed = gradient.consume()
    assert consumed[0].slots_TK.flatten().tolist() == list(range(8))
    total, live = spread_out(sum_parts(consumed, 8), 8)
    torch.testing.assert_close(total, 2 * dense(recorded, 8))
    assert live == {slot for part in recorded for slot in part.slots_TK.flatten().tolist()}


def test_a_scaled_merged_gradient_keeps_its_scale_and_its_reads_when_merged_again():
    gradient, _owner, _ = row_gradient(num_slots=6)
    first, second = parts(3, [(9, 4), (9, 4)])
    second.slots_TK.add_(2)
    gradient.add(*first)
    gradient.scale(0.5)
    gradient.add(*second)
    assert len(gradient._parts) == 1
    total, live = spread_out(gradient.summed(), 6)
    assert live == {0, 1, 2, 3, 4}
    torch.testing.assert_close(total, 0.5 * dense([first], 6) + dense([second], 6))


def test_nothing_keeps_a_row_gradient_alive():
    gradient, owner, mark = row_gradient()
    number = int(gradient.handle[0])
    from memlayers.ops.row_gradient import _row_gradients

    assert number in _row_gradients
    del gradient, owner, mark
    gc.collect()
    assert number not in _row_gradients


def test_what_is_recorded_is_a_copy():
    """A compiled backward reuses the memory of arguments as soon as the operation has returned."""
    table = ValueTable(6, 3)
    optimizer = RowAdam([table])
    slots, weights = torch.tensor([[0, 2]]), torch.tensor([[1.0, 2.0]], requires_grad=True)
    y = table.read(slots, weights)
    grad = torch.ones_like(y)
    y.backward(grad)
    for argument in (slots, weights.data, grad):
        argument.zero_()
    (part,) = optimizer._tables[0].row_gradient.consume()
    assert part.slots_TK.tolist() == [[0, 2]]
    assert part.weights_TK.tolist() == [[1.0, 2.0]]
    assert part.grad_TV.tolist() == [[1.0, 1.0, 1.0]]


def test_a_backward_inside_a_cuda_graph_is_refused(monkeypatch):
    table = ValueTable(5, 3)
    rows = RowAdam([table])
    monkeypatch.setattr("memlayers.ops.row_gradient._is_captured", lambda tensor: True)
    y = table.read(torch.tensor([[1, 2]]), torch.ones(1, 2, requires_grad=True))
    with pytest.raises(RuntimeError, match="CUDA graph would replay this backward without recording"):
        y.sum().backward()
    rows.release()
    table.read(torch.tensor([[1, 2]]), torch.ones(1, 2)).sum().backward()
    assert table.weight.grad is not None
