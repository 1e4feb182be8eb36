import importlib.util

import pytest
import torch
import torch.nn.functional as F

from memlayers.bench import limits

CPU = torch.device("cpu")


def keeping(function, outputs):
    """`function`, which notes where it wrote."""

    def call(*arguments, out):
        outputs.append(out)
        return function(*arguments, out=out)

    return call


def test_all_ways_to_multiply_give_one_product(tiny, monkeypatch):
    for make in (limits.query_projection, limits.key_products):
        outputs = []
        with monkeypatch.context() as patch:
            for name in ("mm", "matmul"):
                patch.setattr(torch, name, keeping(getattr(torch, name), outputs))
            results = []
            for call in make(tiny, CPU).values():
                outputs.clear()
                call()
                results.append(torch.stack([output.clone() for output in outputs]).flatten())
        assert len(results) >= 2
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)


def test_flops(tiny):
    # 64 tokens, 2 heads of width 16, dim 32, 16 sub-keys: a multiplication and an addition each.
    assert limits.product_flops(tiny) == (2 * 64 * 32 * 32, 2 * 64 * 2 * 2 * 8 * 16)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_rows_are_summed_and_updated(kernels, request):
    if kernels == "torch":
        request.getfixturevalue("without_numba")
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("Numba is not installed")
    sums, updates = limits.row_kernels(CPU)
    assert all(("Numba" in name) == (kernels == "numba") for name in (*sums, *updates))
    table_SV, slots_TR = torch.randn(50, 7), torch.randint(50, (3, 13))
    for name, kernel in sums.items():
        output_TV = torch.full((3, 7), torch.nan)
        returned = kernel(table_SV, slots_TR, output_TV)
        result = returned if kernels == "torch" else output_TV
        torch.testing.assert_close(result, F.embedding(slots_TR, table_SV).sum(1), msg=name)
    for kernel in updates.values():
        tables = [torch.ones(50, 7) for _ in range(3)]
        kernel(*tables, torch.tensor([4, 9]))
        for table_SV in tables:
            assert (table_SV != 1).any(1).nonzero().flatten().tolist() == [4, 9]


def test_streams(monkeypatch, without_numba):
    monkeypatch.setattr(limits, "_STREAM_BYTES", 2**21)
    seen = []

    def sum_rows(table_SV, slots_TR, output_TV):
        seen.append((table_SV.nbytes, sorted(slots_TR.flatten().tolist()) == list(range(len(table_SV)))))

    (reads, size), (updates, updated) = limits.streams(CPU, {"ours": sum_rows}).values()
    for call in (*reads.values(), *updates.values()):
        call()
    assert seen == [(2**21, True)]
    assert (size, updated) == (2**21, 7 * 2**21)


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(limits, "_STREAM_BYTES", 2**10)
    call, moved = limits.copy(CPU)
    assert moved == 2 * 2**10
    assert torch.equal(call(), torch.ones(2**8))
