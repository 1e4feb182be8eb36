import pytest
import torch

from memlayers import RowAdam, ValueTable
from memlayers.ops.gpu import read as kernels
from memlayers.ops.read import dot, read
from memlayers.ops.registry import references

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# S, T, K, V: a row in parts of a warp, in a warp and a masked one, in two programs of two warps; nothing to do.
SIZES = [
    (11, 5, 3, 7),
    (4, 1, 1, 1),
    (50, 2, 13, 131),
    (97, 2, 37, 300),
    (60, 1, 130, 64),
    (40, 2, 9, 1024),
    (3, 0, 2, 5),
    (3, 2, 0, 5),
]


@pytest.fixture(autouse=True)
def _only_the_kernels(monkeypatch):
    def reference(*_):
        raise AssertionError("the reference was used")

    for name in ("read", "read_row_mode", "dot"):
        monkeypatch.setitem(references, name, reference)


def inputs(size, dtype, device):
    slots, tokens, topk, width = size
    return (
        torch.randn(slots, width).to(dtype).to(device),
        torch.randint(slots, (tokens, topk)).to(device),
        torch.randn(tokens, topk).to(device),
        torch.randn(tokens, width).to(device),
    )


def exact_read(table, slots, weights):
    return (table.double()[slots] * weights.double()[..., None]).sum(1)


def exact_dot(table, slots, outputs):
    return (table.double()[slots] * outputs.double()[:, None]).sum(-1)


def assert_close(result, expected):
    """A rounding of float32 in each of many sums."""
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_read_and_dot_match_float64(size, dtype, device):
    table, slots, weights, outputs = inputs(size, dtype, device)
    assert_close(read(table, slots, weights), exact_read(table, slots, weights))
    assert_close(dot(table, slots, outputs), exact_dot(table, slots, outputs))


@pytest.mark.parametrize("size", [(50, 2, 37, 300), (30, 3, 5, 64), (20, 1, 9, 1024)], ids=str)
def test_many_tokens_are_read_in_wider_blocks(size, device, monkeypatch):
    monkeypatch.setattr(kernels, "_FEW_PROGRAMS", 0)
    for dtype in DTYPES:
        table, slots, weights, _ = inputs(size, dtype, device)
        assert_close(read(table, slots, weights), exact_read(table, slots, weights))


@pytest.mark.parametrize(
    ("topk", "width", "itemsize", "blocks"),
    [
        (128, 1024, 2, (256, 8, 1)),
        (128, 1024, 4, (128, 8, 1)),
        (128, 768, 2, (256, 8, 1)),
        (128, 64, 2, (64, 32, 1)),
        (4, 64, 2, (64, 4, 1)),
    ],
    ids=str,
)
def test_a_thread_has_eight_loads_of_16_bytes_in_flight(topk, width, itemsize, blocks):
    assert kernels.read_blocks(2**14, topk, width, itemsize) == blocks


def test_a_few_tokens_are_spread_over_more_programs():
    assert kernels.read_blocks(1, 128, 1024, 2) == (64, 128, 8)
    assert kernels.read_blocks(16, 128, 1024, 4) == (32, 128, 8)
    assert kernels.read_blocks(1, 32, 1024, 2) == (64, 32, 8)


@pytest.mark.parametrize(("operation", "exact"), [(read, exact_read), (dot, exact_dot)], ids=["read", "dot"])
def test_gradients_match_float64(operation, exact, device):
    """That of the factor is made by the other kernel; that of the table by `sum_rows`."""
    table, slots, weights, outputs = inputs((30, 5, 7, 33), torch.float32, device)
    factor, grad = (weights, outputs) if operation is read else (outputs, weights)
    leaves = table.requires_grad_(), factor.requires_grad_()
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(operation(leaves[0], slots, leaves[1]), leaves, grad)
    expected = torch.autograd.grad(exact(leaves64[0], slots, leaves64[1]), leaves64, grad.double())
    for result, wanted in zip(grads, expected, strict=True):
        assert_close(result, wanted)


def test_row_mode_reads_and_differentiates_the_same(device):
    table = ValueTable(30, 33).to(device)
    slots, weights = torch.randint(30, (5, 7)).to(device), torch.randn(5, 7).to(device).requires_grad_()
    expected = torch.autograd.grad(table.read(slots, weights).square().sum(), weights)
    optimizer = RowAdam([table])
    torch.testing.assert_close(torch.autograd.grad(table.read(slots, weights).square().sum(), weights), expected)
    assert optimizer is not None


def test_inputs_of_any_layout_and_of_narrow_dtypes(device):
    wide, slots, weights, outputs = inputs((30, 5, 7, 48), torch.bfloat16, device)
    table = wide[::2, 5:38]
    slots, weights, outputs = slots.t()[:, :4] // 2, weights.t()[:, :4], outputs[:, 7:40].t()[:, :1].t()
    assert not any(given.is_contiguous() for given in (table, slots, weights))
    for narrow in (torch.float32, torch.float16, torch.bfloat16):
        given = weights.to(narrow)
        assert_close(read(table, slots, given), exact_read(table, slots, given))
        given = outputs.to(narrow).expand(7, -1)
        assert_close(dot(table, slots.int(), given), exact_dot(table, slots, given))


def test_slots_outside_of_the_table_are_loud_and_not_loaded(device):
    table, slots, weights, outputs = inputs((20, 6, 5, 40), torch.float32, device)
    expected_read, expected_dot = exact_read(table, slots, weights), exact_dot(table, slots, outputs)
    for token, wrong in enumerate((20, -1, 2**40, -(2**62))):
        slots[token, token] = wrong
    weights[3, 3] = 0.0
    result, d = read(table, slots, weights), dot(table, slots, outputs)
    assert result[:3].isnan().all()
    assert not result[3:].isnan().any()
    assert_close(result[4:], expected_read[4:])
    is_wrong = torch.eye(6, 5, dtype=torch.bool, device=device)
    is_wrong[4:] = False
    assert torch.equal(d.isnan(), is_wrong)
    assert_close(d[~is_wrong], expected_dot[~is_wrong])


def test_a_nan_of_the_table_reaches_only_who_reads_it(device):
    table, slots, weights, _ = inputs((20, 6, 5, 40), torch.float32, device)
    slots.clamp_(max=18)[2, 1] = 19
    table[19, 3] = float("nan")
    assert read(table, slots, weights).isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.slow  # the interpreter copies what it is given
def test_rows_beyond_two_to_the_31_elements(device):
    table = torch.zeros(2**26 + 8, 32, dtype=torch.bfloat16, device=device)  # 4 GB that nobody touches
    table[-3], table[5] = 2.0, 1.0
    slots = torch.tensor([[2**26 + 5, 5], [5, 2**26 + 4]], device=device)
    y = read(table, slots, torch.ones(2, 2, device=device))
    assert torch.equal(y, torch.tensor([[3.0], [1.0]], device=device).expand(2, 32))
    assert torch.equal(dot(table, slots, y), torch.tensor([[192.0, 96.0], [32.0, 0.0]], device=device))


def test_a_float64_table_is_the_reference_s():
    assert not kernels.takes(torch.empty(3, 4, dtype=torch.float64))
    assert not kernels.takes(torch.empty(4, 3).t())
    assert kernels.takes(torch.empty(3, 8)[:, :4])


def test_the_launches_are_known_without_data():
    """From meta tensors, as tools compile them that have no GPU."""
    table, slots = torch.empty(2**24, 1024, device="meta"), torch.empty(7, 3, dtype=torch.int64, device="meta")
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", lambda kernel, grid, *_, **__: launched.append(grid))
        kernels.read(table, slots, slots.float())
        kernels.dot(table, slots, torch.empty(7, 1024, device="meta"))
    assert launched == [(7 * 32,), (7,)]
