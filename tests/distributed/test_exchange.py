"""What crosses the wire: the bytes of row gradients, and the order in which they are summed."""

import pytest
import torch

from memlayers.distributed import exchange
from memlayers.distributed.exchange import Held, packed, unpacked
from memlayers.ops.row_sum import Part


def part(tokens, topk, width, dtype=torch.float32, weights=torch.float32, slots=1000):
    generator = torch.Generator().manual_seed(tokens)
    return Part(
        torch.randint(slots, (tokens, topk), generator=generator),
        torch.randn(tokens, topk, generator=generator).to(weights),
        torch.randn(tokens, width, generator=generator).to(dtype),
    )


def test_what_is_unpacked_is_what_was_packed():
    tables = [torch.empty(1000, 5), torch.empty(1000, 3, dtype=torch.float64), torch.empty(7, 1)]
    held = [
        Held([part(3, 2, 5, weights=torch.bfloat16), part(0, 2, 5), part(1, 7, 5)], 3),
        Held([part(5, 3, 3, torch.float64, torch.float64)], 1),
        Held([], 0),
    ]
    for expected, found in zip(held, unpacked(packed(held, tables), tables), strict=True):
        assert found.passes == expected.passes
        for one, other in zip(expected.parts, found.parts, strict=True):
            for factor, same in zip(one, other, strict=True):
                assert factor.dtype == same.dtype
                assert torch.equal(factor, same)


def test_a_token_takes_5120_bytes_of_which_few_are_not_factors():
    """128 rows of width 1024: a slot takes 4 bytes and a weight 4, the gradient of the output 4 an element."""
    table = torch.empty(1000, 1024)
    assert len(packed([Held([part(64, 128, 1024)], 1)], [table])) == 64 * 5120 + 16 + 40


@pytest.mark.parametrize(
    ("passes", "order"),
    [
        ((2, 2), [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]),
        ((1, 1), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),
        ((2, 4), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),
        ((3, 3), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),  # four parts of three passes
        ((0, 0), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),  # added by hand
    ],
)
def test_the_order_is_that_of_micro_batches_where_ranks_have_as_many(passes, order):
    by_rank = [Held([(rank, number) for number in range(4)], passes[rank]) for rank in range(2)]
    assert list(exchange.in_order([by_rank[0], Held([], 0), by_rank[1]])) == order
