import gc

import pytest
import torch

from memlayers.ops.record import Part, RowGradient, sum_parts


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
    monkeypatch.setattr("memlayers.ops.record._CHUNK_ELEMENTS", 9)
    summed = sum_parts(parts(50, [(4, 5)]), 50)
    pieces = list(summed.chunks())
    assert len(pieces) > 3
    assert torch.equal(torch.cat([index for index, _, _ in pieces]), summed.rows_P)
    assert torch.equal(torch.cat([grad for _, _, grad in pieces]), summed.grad_PV)


def row_gradient(num_slots=50):
    owner = Owner()
    mark = torch.nn.Parameter(torch.zeros(1))
    gradient = RowGradient(owner, mark, num_slots)
    return gradient, owner, mark


def test_add_norm_scale_and_discard():
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


def test_norm_of_what_was_cleared_is_zero():
    gradient, _owner, mark = row_gradient()
    gradient.add(*parts(50, [(3, 4)])[0])
    mark.grad.zero_()
    assert gradient.is_empty
    assert gradient.norm() == 0


def test_consume_leaves_nothing():
    gradient, _owner, _ = row_gradient()
    gradient.add(*parts(50, [(3, 4)])[0])
    assert gradient.consume() is not None
    assert gradient.consume() is None


def test_factors_larger_than_a_dense_gradient_are_merged_and_go_on_adding():
    gradient, _owner, _ = row_gradient(num_slots=6)
    recorded = parts(6, [(3, 4), (1, 2), (5, 4), (1, 1)])
    for part in recorded:
        gradient.add(*part)
        assert sum(part.size for part in gradient._parts) <= 6 * 3
    assert gradient._merged is not None
    gradient.scale(2.0)
    total, live = spread_out(gradient.consume(), 6)
    torch.testing.assert_close(total, 2 * dense(recorded, 6))
    assert live == {slot for part in recorded for slot in part.slots_TK.flatten().tolist()}


def test_nothing_keeps_a_row_gradient_alive():
    gradient, owner, mark = row_gradient()
    number = int(gradient.handle[0])
    from memlayers.ops.record import _row_gradients

    assert number in _row_gradients
    del gradient, owner, mark
    gc.collect()
    assert number not in _row_gradients
