import copy
from functools import partial

import pytest
import torch

from memlayers import RowAdagrad, RowAdam, RowSGD, ValueTable
from memlayers.ops import gpu, row_step
from memlayers.ops.gpu import rows
from memlayers.ops.read import sum_rows
from memlayers.ops.registry import references
from memlayers.ops.rounding import round_to_bfloat16
from memlayers.ops.row_step import row_adagrad_, row_adam_, row_sgd_
from memlayers.ops.row_sum import parts_of, row_norm

RULES = ["adam", "adagrad", "row adagrad", "sgd"]
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
ADAGRAD = {"lr": 0.1, "eps": 1e-6}
# Slots, [(tokens, rows a token) of each part], width.
CASES = [
    (13, [(4, 3)], 1),
    (5, [(9, 4)], 3),
    (50, [(9, 3), (0, 3), (2, 1)], 16),
    (1, [(23, 1)], 67),
    (41, [(4, 5), (3, 2)], 257),
    (3, [(6, 2)], 600),  # more columns than a program has
]
# Lengths of the runs of one slot each, where a block has 4 entries.
RUNS = [[4, 4, 8], [3, 1, 4], [1, 7, 9, 3], [46], [2] * 6, [5, 3, 8], [1]]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Many borders in few entries."""
    monkeypatch.setattr(rows, "block_length", lambda count: 4)
    monkeypatch.setattr(rows, "_BLOCK", 16)


def operation(rule, num_slots, width, device, dtype=torch.float32, state_dtype=torch.float32):
    """(operation with its settings, [table, *states])."""
    table = torch.randn(num_slots, width).to(dtype)
    moments = [(torch.rand(num_slots, width) + 0.5).to(state_dtype) for _ in range(2)]
    if rule == "adam":
        tensors = [table, *moments, torch.randint(5, (num_slots,), dtype=torch.int32)]
    else:
        tensors = [table] + {"sgd": [], "adagrad": moments[:1], "row adagrad": [torch.rand(num_slots) + 0.5]}[rule]
    step = {"adam": partial(row_adam_, **ADAM), "sgd": partial(row_sgd_, lr=0.1)}
    return step.get(rule, partial(row_adagrad_, **ADAGRAD)), [tensor.to(device) for tensor in tensors]


def factors(num_slots, sizes, width, device, dtype=torch.float32):
    """Three lists; a fifth of the weights are zero, and their slots anything."""
    parts = []
    for tokens, topk in sizes:
        is_read = torch.rand(tokens, topk) > 0.2
        slots = torch.where(is_read, torch.randint(num_slots, (tokens, topk)), num_slots + 7)
        parts.append((slots, torch.randn(tokens, topk) * is_read, torch.randn(tokens, width).to(dtype)))
    return [[one.to(device) for one in column] for column in zip(*parts, strict=True)]


def copies(tensors, dtype=None):
    return [t.to(dtype, copy=True) if dtype is not None and t.is_floating_point() else t.clone() for t in tensors]


def read_slots(slots, weights, grads):
    return torch.cat([s[w != 0] for s, w in zip(slots, weights, strict=True)]).unique()


def expected_of(rule, tensors, gradient, max_norm=None):
    """The reference in float64, on the CPU."""
    results = [tensor.cpu() for tensor in copies(tensors, torch.float64)]
    wide = [
        [one.cpu().to(torch.float64) if one.is_floating_point() else one.cpu() for one in column] for column in gradient
    ]
    settings = {"adam": ADAM, "sgd": {"lr": 0.1}}.get(rule, ADAGRAD)
    function = getattr(row_step, rule.replace(" ", "_"))
    parts = parts_of(*wide)
    if parts:
        row_step.step_(row_step.Step(function, results[0], tuple(results[1:]), parts, max_norm, -1, settings))
    return results


def assert_close(results, expected, tolerance=5e-6):
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.to(one.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rule", "case"),
    [("adam", case) for case in CASES] + [(rule, case) for rule in RULES[1:] for case in (CASES[1], CASES[4])],
    ids=str,
)
def test_it_does_what_the_reference_does_in_float64(rule, case, device):
    step, tensors = operation(rule, case[0], case[2], device)
    gradient = factors(*case, device)
    results = copies(tensors)
    max_norm = 0.3 * row_norm(*gradient, case[0]).item()
    step(*results, *gradient, max_norm=max_norm)
    assert_close(results, expected_of(rule, tensors, gradient, max_norm))
    assert not torch.equal(results[0], tensors[0])


@pytest.mark.parametrize(("rule", "runs"), [("adagrad", runs) for runs in RUNS] + [("row adagrad", RUNS[2])], ids=str)
def test_runs_may_end_anywhere_in_a_block(rule, runs, device):
    """One entry a token; the entries of weight zero fill the blocks behind them."""
    slots = torch.repeat_interleave(torch.arange(len(runs)) * 2, torch.tensor(runs))
    order = torch.randperm(len(slots) + 6)
    slots, weights = torch.cat([slots, torch.zeros(6).long()])[order], (order < len(slots)).float() * 0.7
    gradient = [slots[:, None].to(device)], [weights[:, None].to(device)], [torch.randn(len(order), 3).to(device)]
    step, tensors = operation(rule, 2 * len(runs), 3, device)
    results = copies(tensors)
    step(*results, *gradient)
    assert_close(results, expected_of(rule, tensors, gradient))
    for one, before in zip(results, tensors, strict=True):
        assert torch.equal(one[1::2], before[1::2]), "a row that was not read"
    norm = torch.zeros(len(runs) * 2, 3).index_add_(0, slots, weights[:, None] * gradient[2][0].cpu()).norm()
    torch.testing.assert_close(row_norm(*gradient, 2 * len(runs)).cpu(), norm)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize(
    "kind", ["float16", "bfloat16", "16-bit gradient", "mixed gradients", "columns first", "rows apart", "expanded"]
)
def test_each_dtype_and_layout(rule, kind, device):
    dtype = getattr(torch, kind, torch.float32)
    step, tensors = operation(rule, 30, 6, device, dtype)
    slots, weights, grads = factors(30, [(5, 3), (3, 4)], 6, device)
    if kind == "16-bit gradient":
        weights, grads = ([one.bfloat16() for one in column] for column in (weights, grads))
    elif kind == "mixed gradients":
        grads[0], slots[0] = grads[0].half(), slots[0].int()
    elif kind == "columns first":
        slots[0], weights[0], grads[1] = (one.t().contiguous().t() for one in (slots[0], weights[0], grads[1]))
        grads[0] = grads[0].repeat(1, 3)[:, :6]
    elif kind == "rows apart":
        slots, weights, grads = slots[:1], weights[:1], [grads[0].repeat(1, 3)[:, :6]]
    elif kind == "expanded":
        slots, weights, grads = slots[:1], weights[:1], [torch.tensor(0.5, device=device).expand(5, 6)]
    results = copies(tensors)
    step(*results, slots, weights, grads)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 5e-6)
    assert_close(results, expected_of(rule, tensors, (slots, weights, grads)), tolerance)


@pytest.mark.parametrize(
    ("rule", "kind"),
    [(rule, kind) for rule in RULES for kind in ("float64", "columns first")] + [("row adagrad", "too wide")],
)
def test_what_the_kernels_do_not_take_is_left_to_the_reference(rule, kind, device, monkeypatch):
    monkeypatch.setattr(rows, "_WIDEST", 5)
    step, tensors = operation(rule, 30, 6, device)
    gradient = factors(30, [(5, 3)], 6, device)
    if kind == "float64":
        tensors, gradient = copies(tensors, torch.float64), [copies(column, torch.float64) for column in gradient]
    elif kind == "columns first":
        tensors = [t.t().contiguous().t() if t.ndim == 2 else t for t in tensors]
    monkeypatch.setattr(rows, "SortedEntries", None)  # what every launch needs
    results = [t.clone() for t in tensors]
    if device.type == "cpu":  # whose reference refuses the slots of no row
        gradient[0][0] = gradient[0][0].clamp(max=29)
    step(*results, *gradient)
    assert_close(results, expected_of(rule, tensors, gradient))


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_were_not_read_stay_bit_identical_state_included(rule, device):
    step, tensors = operation(rule, 50, 7, device)
    gradient = factors(50, [(5, 3), (2, 4)], 7, device)
    read = read_slots(*gradient)
    unread = torch.ones(50, dtype=torch.bool, device=device).index_fill(0, read, False)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor[unread] = torch.nan
    results = copies(tensors)
    step(*results, *gradient)
    for one, before in zip(results, tensors, strict=True):
        torch.testing.assert_close(one[unread], before[unread], rtol=0, atol=0, equal_nan=True)
        assert one[read].isfinite().all()
        assert (one[read] != before[read]).all()


@pytest.mark.parametrize("rule", ["adam", "row adagrad"])
@pytest.mark.parametrize("kind", ["no parts", "no tokens", "no rows a token", "weights of zero", "slots of no row"])
def test_without_a_read_nothing_changes(rule, kind, device):
    step, tensors = operation(rule, 50, 7, device)
    sizes = {"no tokens": (0, 3), "no rows a token": (4, 0)}.get(kind, (4, 3))
    slots, weights, grads = ([], [], []) if kind == "no parts" else factors(50, [sizes], 7, device)
    if kind == "weights of zero":
        weights[0] = weights[0] * 0
    if kind == "slots of no row":
        slots[0] = torch.tensor([[-5, 50, 2**40]], device=device).expand(4, 3)
    results = copies(tensors)
    step(*results, slots, weights, grads)
    assert all(torch.equal(one, before) for one, before in zip(results, tensors, strict=True))
    if kind != "no parts":
        assert row_norm(slots, weights, grads, 50) == 0


def same_bits(one, other):
    """But for the payload of a NaN."""
    isnan = other.isnan()
    assert torch.equal(one.isnan(), isnan)
    return torch.equal(one.view(torch.int16).masked_fill(isnan, 0), other.view(torch.int16).masked_fill(isnan, 0))


@pytest.mark.parametrize("seed", [0, 2**40 + 2**31 + 5])
def test_the_random_bits_are_the_reference_s(seed, device):
    """Rows and moments that are their own gradient, exactly: 0 - 1 * g, g and g * g."""
    slots, width = torch.cat([torch.arange(8), torch.randperm(900)[:3] + 9]).to(device), 12
    grads = torch.randn(11, width) * 10.0 ** torch.randint(-15, 15, (11, width))
    grads[7] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-30, 3.39e38, -3.3895e38, 1, 2, 3, 4])
    grads[6, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that any carry makes zero
    grads = grads.to(device)
    gradient = [slots[:, None]], [torch.ones(11, 1, device=device)], [grads]
    table = torch.zeros(1000, width, dtype=torch.bfloat16, device=device)
    row_sgd_(table, *gradient, lr=1.0, seed=seed)
    assert same_bits(table[slots], round_to_bfloat16(0.0 - grads, slots, seed))
    grads[6:8] = 1.0
    first, second = torch.zeros(2, 1000, width, dtype=torch.bfloat16, device=device)
    steps = torch.zeros(1000, dtype=torch.int32, device=device)
    row_adam_(table.float(), first, second, steps, *gradient, lr=1.0, beta1=0.0, beta2=0.0, eps=1.0, seed=seed)
    assert same_bits(first[slots], round_to_bfloat16(grads, slots, seed, 1))
    assert same_bits(second[slots], round_to_bfloat16(grads * grads, slots, seed, 2))


def test_some_columns_have_the_random_bits_of_whole_rows_and_their_norm(device):
    slots, grads = torch.arange(8, device=device), torch.randn(8, 12).to(device)
    gradient = [slots[:, None]], [torch.ones(8, 1, device=device)], [grads]
    table, norm = torch.zeros(8, 12, dtype=torch.bfloat16, device=device), torch.tensor(4.0, device=device)
    row_sgd_(table, *gradient, lr=1.0, max_norm=1.0, seed=9, first_column=40, norm=norm)
    scale = 1.0 / (norm + 1e-6)
    assert same_bits(table, round_to_bfloat16(0.0 - grads * scale, slots, 9, first_column=40))
    first, second = torch.zeros(2, 8, 12, dtype=torch.bfloat16, device=device)
    steps = torch.zeros(8, dtype=torch.int32, device=device)
    how = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 1.0, "seed": 9, "first_column": 40}
    row_adam_(table.float(), first, second, steps, *gradient, **how)
    assert same_bits(first, round_to_bfloat16(grads, slots, 9, 1, first_column=40))


@pytest.mark.parametrize("seed", [-1, 3])
@pytest.mark.parametrize(
    ("rule", "dtypes"),
    [("adam", "table"), ("adam", "states"), ("adam", "both"), ("adagrad", "both"), ("row adagrad", "table")],
)
def test_what_is_bfloat16_is_computed_in_float32_and_rounded_once(rule, dtypes, seed, device, monkeypatch):
    dtype, state_dtype = (torch.bfloat16 if dtypes in (name, "both") else torch.float32 for name in ("table", "states"))
    step, narrow = operation(rule, 20, 33, device, dtype, state_dtype)
    gradient = factors(20, [(4, 3)], 33, device)
    wide = copies(narrow, torch.float32)
    for name in ("row_adam_", "row_adagrad_"):
        monkeypatch.setitem(references, name, None)
    step(*narrow, *gradient, seed=seed)
    step(*wide, *gradient)
    read = read_slots(*gradient)
    for stream, (one, other) in enumerate(zip(narrow, wide, strict=True)):
        one, new = one[read], other[read]
        if one.dtype == torch.bfloat16:
            new = new.bfloat16() if seed < 0 else round_to_bfloat16(new, read, seed, stream)
        if device.type == "cuda":  # where a compiler may fuse one of the two sums otherwise
            assert (one != new).float().mean() < 0.01, stream
        elif one.dtype == torch.bfloat16 and seed < 0:  # the interpreter cuts off instead
            assert (one.view(torch.int16).int() - new.view(torch.int16)).abs().max() <= 1, stream
        else:
            assert torch.equal(one, new), stream


def test_two_runs_give_the_same_bits(device):
    step, tensors = operation("adam", 7, 40, device, torch.bfloat16)
    gradient = factors(7, [(6, 3)], 40, device)
    results = [copies(tensors) for _ in range(2)]
    for result in results:
        step(*result, *gradient, max_norm=1.0, seed=5)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_norm_and_the_dense_gradient_are_those_of_the_sums(case, device):
    slots, weights, grads = factors(*case, device)
    total = torch.zeros(case[0] + 8, case[2], dtype=torch.float64)
    for s, w, g in zip(slots, weights, grads, strict=True):
        part = torch.zeros_like(total)
        part.index_add_(0, s.flatten().cpu(), (w[..., None].double() * g[:, None].double()).flatten(0, 1).cpu())
        dense = sum_rows(s, w, g, case[0])
        assert dense.dtype == torch.float32
        torch.testing.assert_close(dense.cpu(), part[: case[0]].float(), rtol=5e-6, atol=5e-6)
        total += part
    norm = row_norm(slots, weights, grads, case[0])
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.cpu(), total.norm().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.99), (0.9, 0.0)], ids=str)
def test_betas_may_be_0(betas, device):
    table, average, square = torch.zeros(3, 2, 3, device=device)
    gradient = torch.tensor([[2.0, -1.0, 0.5]], device=device)
    part = [torch.tensor([[0]], device=device)], [torch.ones(1, 1, device=device)], [gradient]
    steps = torch.zeros(2, dtype=torch.int32, device=device)
    row_adam_(table, average, square, steps, *part, lr=0.1, beta1=betas[0], beta2=betas[1], eps=1e-8)
    torch.testing.assert_close(table.cpu(), torch.tensor([[-0.1, 0.1, -0.1], [0.0, 0.0, 0.0]]))


def test_the_bias_correction_keeps_its_digits_at_each_count(device):
    counts = torch.tensor([0, 1, 9, 99, 499, 501, 9_999, 10**6], dtype=torch.int32, device=device)
    tensors = [torch.zeros(8, 1, device=device), *torch.full((2, 8, 1), 0.5, device=device), counts]
    every = torch.arange(8, device=device)[:, None]
    gradient = [every], [torch.ones(8, 1, device=device)], [torch.full((8, 1), 2.0, device=device)]
    results = copies(tensors)
    row_adam_(*results, *gradient, **ADAM)
    expected = expected_of("adam", tensors, gradient)
    torch.testing.assert_close(results[0].cpu(), expected[0].float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("make", [RowAdam, partial(RowAdam, moments="bfloat16"), RowAdagrad, RowSGD])
def test_optimizers_train_a_shared_table_as_by_the_reference(make, device, monkeypatch):
    tables = ValueTable(20, 5).to(device), ValueTable(20, 5).to(device)
    tables[1].load_state_dict(copy.deepcopy(tables[0].state_dict()))
    reads = [(torch.randint(20, (3, 2)).to(device), torch.randn(3, 2).to(device)) for _ in range(4)]
    for table in tables:
        optimizer = make(table, lr=0.05, max_grad_norm=0.5)
        for step in range(2):
            outputs = [table.read(*reads[2 * step + i]) for i in range(2)]
            sum((output - 1).square().sum() for output in outputs).backward()
            optimizer.step()
        monkeypatch.setattr(gpu, "kernels", lambda operation: None)
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_of_the_host_s_part_depends_on_data(rule, monkeypatch):
    launched = []
    monkeypatch.setattr(rows, "launch", lambda kernel, grid, *arguments, **settings: launched.append(kernel.__name__))
    _, tensors = operation(rule, 60, 7, "meta")
    gradient = factors(60, [(9, 3), (2, 4)], 7, "meta")
    function, settings = (
        getattr(row_step, rule.replace(" ", "_")),
        {"adam": ADAM, "sgd": {"lr": 0.1}}.get(rule, ADAGRAD),
    )
    rows.step_(row_step.Step(function, tensors[0], tuple(tensors[1:]), parts_of(*gradient), 0.5, -1, settings))
    step = ["_count_reads"] if rule == "adam" else []
    expected = ["_number_entries"] * 2 + ["_reorder", "_walk", "_finish"] + step + ["_walk", "_finish"]  # sorted once
    assert launched == expected


def test_a_table_of_more_than_2_31_elements(device):
    """Sparsely: of 2.3 G elements only a few rows are ever touched, so on a CPU they take no memory."""
    torch.use_deterministic_algorithms(False)
    num_slots, width = 2**21 + 2**17, 1024
    table = torch.empty(num_slots, width, dtype=torch.bfloat16, device=device)
    slots = torch.tensor([[1], [2**21 - 1], [2**21 + 1], [num_slots - 1]], device=device)
    touched, neighbours = slots.flatten(), slots.flatten() - 1
    table[touched], table[neighbours] = 1.0, 3.0
    gradient = [slots.repeat(2, 1)], [torch.ones(8, 1, device=device)], [torch.ones(8, width, device=device)]
    row_sgd_(table, *gradient, lr=0.25)
    assert torch.equal(table[touched], torch.full((4, width), 0.5, dtype=torch.bfloat16, device=device))
    assert torch.equal(table[neighbours], torch.full((4, width), 3.0, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :1].expand_as(t),
        lambda t: t[:1, :1].expand_as(t),
        lambda t: t[:, :1],
        lambda t: t[:, ::2],
        lambda t: t.t().contiguous().t(),
    ],
    ids=["one a token", "one in all", "first column", "every other column", "transposed"],
)
@pytest.mark.parametrize("of", ["slots", "weights", "both"])
def test_slots_and_weights_may_lie_anywhere_in_memory(view, of, device):
    slots, weights = torch.randint(13, (4, 5), device=device), torch.randn(4, 5, device=device)
    slots = view(slots) if of != "weights" else slots[:, : view(slots).shape[1]]
    weights = view(weights) if of != "slots" else weights[:, : view(weights).shape[1]]
    outputs = torch.randn(4, 7, device=device)
    expected = torch.zeros(13, 7, device=device)
    expected.index_put_((slots,), weights[..., None] * outputs[:, None], accumulate=True)
    torch.testing.assert_close(sum_rows(slots, weights, outputs, 13), expected)


def test_a_slot_of_no_row_is_no_read_where_parts_are_merged(device):
    """By the reference, which checks slots on a CPU alone: elsewhere it would have to wait."""
    if device.type == "cpu":
        pytest.skip("a CPU raises IndexError")
    table = ValueTable(4, 3, device=device)
    optimizer = RowSGD([table], lr=1.0)
    before = table.weight.detach().clone()
    for slot in (99, -1, 2):  # more than a dense gradient holds
        table.row_gradient.add(
            torch.full((2, 3), slot, device=device), torch.ones(2, 3, device=device), torch.ones(2, 3, device=device)
        )
    optimizer.step()
    before[2] -= 6
    torch.testing.assert_close(table.weight.detach(), before)
