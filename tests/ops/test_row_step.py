import importlib
from functools import partial

import pytest
import torch
from torch.library import opcheck

from memlayers.ops import cpu, registry, row_step
from memlayers.ops.read import dot
from memlayers.ops.rounding import round_to_bfloat16
from memlayers.ops.row_step import row_adagrad_, row_adam_, row_sgd_
from memlayers.ops.row_sum import SummedRows, parts_of, row_norm, sum_parts

# Slots, [(tokens, rows a token) of each part], width.
CASES = [
    (13, [(4, 3)], 1),
    (5, [(9, 4)], 7),
    (50, [(9, 3), (2, 1)], 16),
    (1, [(3, 1)], 67),
    (997, [(40, 5), (0, 3), (7, 2)], 131),
    (3, [(700, 2)], 5),  # more entries of a row than a task has
    (2048, [(900, 3)], 33),
    (5_000_000, [(30, 4)], 1),
]
RULES = ["adam", "adagrad", "row adagrad", "sgd"]
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
ADAGRAD = {"lr": 0.1, "eps": 1e-6}

needs_kernels = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """`torch.empty` gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(cpu, "kernels", lambda operation: None)


@pytest.fixture(params=[pytest.param("kernel", marks=needs_kernels), "reference"])
def path(request):
    if request.param == "reference":
        request.getfixturevalue("no_kernels")
    return request.param


def operation(rule, slots, width, dtype=torch.float32):
    """(operation with its settings, [table, *states])."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.randn(slots, width).to(dtype)
    if rule == "adam":
        moments = torch.randn(slots, width, dtype=wide), torch.rand(slots, width, dtype=wide) + 0.5
        return partial(row_adam_, **ADAM), [table, *moments, torch.randint(5, (slots,), dtype=torch.int32)]
    if rule == "sgd":
        return partial(row_sgd_, lr=0.1), [table]
    shape = (slots, width) if rule == "adagrad" else (slots,)
    return partial(row_adagrad_, **ADAGRAD), [table, torch.rand(shape, dtype=wide) + 0.5]


def factors(num_slots, sizes, width, dtype=torch.float32):
    """Three lists; a fifth of the weights are zero."""
    parts = []
    for tokens, topk in sizes:
        weights = torch.randn(tokens, topk, dtype=dtype) * (torch.rand(tokens, topk) > 0.2)
        parts.append((torch.randint(num_slots, (tokens, topk)), weights, torch.randn(tokens, width, dtype=dtype)))
    return [list(column) for column in zip(*parts, strict=True)]


def read_slots(slots, weights, grads):
    return torch.cat([s[w != 0] for s, w in zip(slots, weights, strict=True)]).unique()


def copies(tensors, dtype=None):
    return [t.to(dtype, copy=True) if dtype is not None and t.is_floating_point() else t.clone() for t in tensors]


def summed(slots, weights, grads, num_slots):
    total = torch.zeros(num_slots, grads[0].shape[1], dtype=torch.float64)
    for s, w, g in zip(slots, weights, grads, strict=True):
        total.index_add_(0, s.flatten(), (w[..., None].double() * g[:, None].double()).flatten(0, 1))
    return total


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_does_what_the_reference_does_in_float64(rule, case, monkeypatch):
    num_slots, _, width = case
    step, tensors = operation(rule, num_slots, width)
    gradient = factors(*case)
    max_norm = 0.3 * summed(*gradient, num_slots).norm().item()
    result, expected = copies(tensors), copies(tensors, torch.float64)
    step(*result, *gradient, max_norm=max_norm)
    monkeypatch.setattr(cpu, "kernels", lambda operation: None)
    step(*expected, *gradient, max_norm=max_norm)
    for one, other, before in zip(result, expected, tensors, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=3e-6, atol=3e-6)
        assert not torch.equal(one, before)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_off_the_cpu_the_reference_masks_rows_and_gives_the_same(rule, case, no_kernels, monkeypatch):
    step, tensors = operation(rule, case[0], case[2])
    gradient = factors(*case)
    results = []
    for static in (False, True):
        if static:
            monkeypatch.setattr(SummedRows, "compact", lambda rows: rows)
        results.append(copies(tensors))
        step(*results[-1], *gradient)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_were_not_read_stay_bit_identical_state_included(rule, path):
    step, tensors = operation(rule, 50, 7)
    gradient = factors(50, [(5, 3), (2, 4)], 7)
    read = read_slots(*gradient)
    unread = torch.ones(50, dtype=torch.bool).index_fill(0, read, False)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor[unread] = torch.nan
    result = copies(tensors)
    step(*result, *gradient)
    for one, before in zip(result, tensors, strict=True):
        torch.testing.assert_close(one[unread], before[unread], rtol=0, atol=0, equal_nan=True)
        assert one[read].isfinite().all()
        assert (one[read] != before[read]).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["no parts", "no tokens", "weights of zero"])
def test_without_a_read_nothing_changes(rule, kind, path):
    step, tensors = operation(rule, 50, 7)
    sizes = {"no tokens": [(0, 3)], "weights of zero": [(4, 3)]}
    slots, weights, grads = ([], [], []) if kind == "no parts" else factors(50, sizes[kind], 7)
    result = copies(tensors)
    step(*result, slots, [weight * 0 for weight in weights], grads)
    assert all(torch.equal(one, before) for one, before in zip(result, tensors, strict=True))


# The dtypes of a table and of its states that people can ask for; the states of a row are float32 or counts.
TABLES, STATES = [torch.float32, torch.bfloat16, torch.float16], [torch.float32, torch.bfloat16]
PAIRS = [pytest.param(table, states, id=f"{table} {states}") for table in TABLES for states in STATES]


def is_approximate(rule, *dtypes):
    """Whether a step is so, as the kernel's is for Adam where all is bfloat16 and the processor has AVX-512."""
    if rule != "adam" or any(dtype != torch.bfloat16 for dtype in dtypes):
        return False
    return importlib.import_module("memlayers.ops.cpu.processor").approximates()


def assert_rows(rows, expected, before, *, about):
    """The same bits; with `about` to 2**-12 of the step, which few elements show once they are rounded."""
    if not about:
        assert torch.equal(rows, expected)
        return
    rows, expected, before = rows.float(), expected.float(), before.float()
    assert ((rows - expected).abs() <= 2**-7 * expected.abs() + 2**-12 * (expected - before).abs()).all()
    assert (rows == expected).float().mean() > 0.97


def narrowed(tensors, table_dtype, state_dtype):
    return [tensors[0].to(table_dtype)] + [one.to(state_dtype) if one.ndim == 2 else one.clone() for one in tensors[1:]]


@needs_kernels
@pytest.mark.parametrize("seed", [-1, 0, 7, 2**40 + 3])
@pytest.mark.parametrize(("table_dtype", "state_dtype"), PAIRS)
@pytest.mark.parametrize("rule", RULES)
def test_16_bits_are_the_float32_step_rounded_once(rule, table_dtype, state_dtype, seed, monkeypatch):
    def missing(*_):
        raise AssertionError("no kernel takes these dtypes")

    for name in ("row_adam_", "row_adagrad_", "row_sgd_"):
        monkeypatch.setitem(registry.references, name, missing)
    for width in (1, 7, 16, 31, 67, 131):
        step, tensors = operation(rule, 60, width)
        narrow = narrowed(tensors, table_dtype, state_dtype)
        wide, before = copies(narrow, torch.float32), narrow[0].clone()
        gradient = factors(60, [(9, 3), (4, 2)], width)
        is_rounded = any(one.dtype == torch.bfloat16 for one in narrow)
        step(*narrow, *gradient, seed=seed if is_rounded else -1, max_norm=0.5)
        step(*wide, *gradient, max_norm=0.5)
        read = read_slots(*gradient)
        for stream, (one, other) in enumerate(zip(narrow, wide, strict=True)):
            new = other[read].to(one.dtype)
            if one.dtype == torch.bfloat16 and seed >= 0:
                new = round_to_bfloat16(other[read], read, seed, stream)
            about = stream == 0 and is_approximate(rule, table_dtype, state_dtype)
            assert_rows(one[read], new, before[read], about=about)


@needs_kernels
@pytest.mark.parametrize("seed", [-1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adam_of_no_gradient_and_of_numbers_that_overflow_is_the_reference_s(dtype, seed, monkeypatch):
    """Among others in a row: nothing at all, what overflows when it is squared, infinity, NaN."""
    grads = torch.randn(5, 70)
    grads[0] = 0
    for row, special in enumerate((1e30, torch.inf, torch.nan), start=1):
        grads[row, 40] = special
    grads.view(torch.int32)[4, 50] = -1  # a NaN whose bits are all set
    result = [torch.randn(5, 70).to(dtype), torch.zeros(5, 70).to(dtype), torch.zeros(5, 70).to(dtype)]
    result.append(torch.zeros(5, dtype=torch.int32))
    before, expected = result[0].clone(), copies(result)
    gradient = [torch.arange(5)[:, None]], [torch.ones(5, 1)], [grads]
    seed = seed if dtype == torch.bfloat16 else -1
    row_adam_(*result, *gradient, **ADAM, seed=seed)
    monkeypatch.setattr(cpu, "kernels", lambda operation: None)
    row_adam_(*expected, *gradient, **ADAM, seed=seed)
    assert torch.equal(result[0][0], before[0])
    assert result[0].isfinite().sum() == 5 * 70 - 3
    assert result[0][1].isfinite().all()
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4, equal_nan=True
        )


@needs_kernels
@pytest.mark.parametrize("seed", [-1, 7])
@pytest.mark.parametrize(("table_dtype", "state_dtype"), PAIRS)
@pytest.mark.parametrize("rule", ["adam", "adagrad", "sgd"])
def test_kernel_and_reference_give_the_same_bits_where_float32_is_exact(
    rule, table_dtype, state_dtype, seed, monkeypatch
):
    """On integers, whose moments and rows need more bits than 16-bit numbers have."""
    num_slots, width = 40, 71
    table, first, second = torch.randint(1, 2000, (3, num_slots, width)).float()
    states = {
        "adam": [first, second, torch.zeros(num_slots, dtype=torch.int32)],
        "adagrad": [torch.zeros_like(first)],
        "sgd": [],
    }[rule]
    step = {
        "adam": partial(row_adam_, lr=64.0, beta1=0.0, beta2=0.0, eps=0.0),
        "adagrad": partial(row_adagrad_, lr=64.0, eps=0.0),
        "sgd": partial(row_sgd_, lr=0.5),
    }[rule]
    result = narrowed([table, *states], table_dtype, state_dtype)
    seed = seed if any(one.dtype == torch.bfloat16 for one in result) else -1
    expected, before = copies(result), result[0].clone()
    slots, grads = torch.randperm(num_slots)[:30].view(15, 2), torch.randint(1, 2000, (15, width)).float()
    gradient = [slots, slots], [torch.ones(15, 2), torch.full((15, 2), 2.0)], [grads, grads]
    step(*result, *gradient, seed=seed)
    monkeypatch.setattr(cpu, "kernels", lambda operation: None)
    step(*expected, *gradient, seed=seed)
    assert_rows(result[0], expected[0], before, about=is_approximate(rule, table_dtype, state_dtype))
    assert all(torch.equal(one, other) for one, other in zip(result[1:], expected[1:], strict=True))


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("first", [5, 16, 48])
def test_a_step_of_some_columns_is_that_of_the_whole_rows(rule, first, path):
    """The same random bits, clipped by the norm over all columns, bit for bit."""
    step, tensors = operation(rule, 60, 64, torch.bfloat16)
    slots, weights, grads = factors(60, [(9, 3), (4, 2)], 64)
    norm = row_norm(slots, weights, grads, 60)
    some = [one[:, first:].clone() if one.ndim == 2 else one.clone() for one in tensors]
    how = {"max_norm": 0.3 * norm.item(), "seed": 5}
    step(*some, slots, weights, [grad[:, first:] for grad in grads], **how, first_column=first, norm=norm)
    step(*tensors, slots, weights, grads, **how)
    for one, of_all in zip(some, tensors, strict=True):
        assert torch.equal(one, of_all[:, first:] if of_all.ndim == 2 else of_all)


@needs_kernels
def test_float16_rows_are_rounded_as_pytorch_rounds_them():
    """Subnormal numbers, ties, what is too large, infinity and NaN: each row is its own gradient, 0 - 1 * g."""
    bits = torch.arange(-(2**31), 2**31, 65_521)[: 64 * 1024].to(torch.int32)
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    # Halfway to the next number: half of 2**(e - 10), or of 2**-24 among the subnormal ones.
    ties = halves + torch.exp2((torch.frexp(halves).exponent - 12).clamp(min=-25).float())
    edges = torch.tensor([65504.0, 65519.99, 65520.0, 1e38, torch.inf, 2.0**-25, 2.0**-25 * 1.001, 1e-45]).repeat(128)
    grads = torch.cat([bits.view(torch.float32), halves, ties, edges, -edges]).view(-1, 512)
    table = torch.zeros(len(grads), 512, dtype=torch.float16)
    row_sgd_(table, [torch.arange(len(grads))[:, None]], [torch.ones(len(grads), 1)], [grads], lr=1.0)
    expected = (0.0 - grads).half()
    assert torch.equal(table.isnan(), expected.isnan())
    same = table.view(torch.int16) == expected.view(torch.int16)
    assert (same | expected.isnan()).all()


@pytest.mark.parametrize("static", [False, True])
def test_the_reference_rounds_as_the_kernel_does(static, no_kernels, monkeypatch):
    monkeypatch.setattr("memlayers.ops.row_sum._CHUNK_ELEMENTS", 35)  # a piece's slots count, not their order in it
    if static:
        monkeypatch.setattr(SummedRows, "compact", lambda rows: rows)
    for sizes in ([(9, 3), (4, 2)], [(9, 30)]):
        step, tensors = operation("adam", 60, 7, torch.bfloat16)
        gradient = factors(60, sizes, 7)
        narrow, wide = copies(tensors), copies(tensors, torch.float32)
        step(*narrow, *gradient, seed=3)
        step(*wide, *gradient)
        read = read_slots(*gradient)
        assert torch.equal(narrow[0][read], round_to_bfloat16(wide[0][read], read, 3))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("seed", [-1, 3])
@pytest.mark.parametrize("rule", ["adam", "adagrad", "row adagrad"])
def test_bfloat16_states_are_computed_in_float32_and_rounded_with_bits_of_their_own(rule, seed, static, monkeypatch):
    if static:
        monkeypatch.setattr(SummedRows, "compact", lambda rows: rows)
    step, tensors = operation(rule, 60, 7)
    narrow = [tensors[0]] + [state.bfloat16() if state.is_floating_point() else state for state in tensors[1:]]
    gradient, wide = factors(60, [(9, 3), (4, 2)], 7), copies(narrow, torch.float32)
    before = copies(narrow)
    monkeypatch.setattr(cpu, "kernels", lambda operation: None)
    step(*narrow, *gradient, seed=seed)
    step(*wide, *gradient)
    read = read_slots(*gradient)
    unread = torch.ones(60, dtype=torch.bool).index_fill(0, read, False)
    for stream, (one, other, old) in enumerate(zip(narrow, wide, before, strict=True)):
        new = other[read]
        if one.dtype == torch.bfloat16:
            stochastic = round_to_bfloat16(new.view(len(read), -1), read, max(seed, 0), stream).view(new.shape)
            new = new.bfloat16() if seed < 0 else stochastic
        assert torch.equal(one[read], new)
        assert torch.equal(one[unread], old[unread])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[5], CASES[6]], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_threads_changes_no_bit(rule, case, dtype):
    step, tensors = operation(rule, case[0], case[2], dtype)
    gradient = factors(*case)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(copies(tensors))
            step(*results[-1], *gradient, max_norm=1.0, seed=5 if dtype == torch.bfloat16 else -1)
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_what_lies_in_fresh_memory_changes_no_bit():
    """Of rows that fill no whole vectors the kernel works on the last few elsewhere, with others beside them."""
    after = []
    for is_filled_with_nan in (False, True):
        torch.manual_seed(0)
        table, avg, sq = (torch.randn(1000, 36).bfloat16() for _ in range(3))
        steps = torch.zeros(1000, dtype=torch.int32)
        given = torch.arange(1000)[:, None], torch.ones(1000, 1), torch.randn(1000, 36)
        torch.use_deterministic_algorithms(is_filled_with_nan)
        try:
            row_adam_(table, avg, sq.abs_(), steps, *([one] for one in given), 100.0, 0.9, 0.99, 1e-8)
        finally:
            torch.use_deterministic_algorithms(False)
        after.append(torch.cat([table, avg, sq]))
    assert torch.equal(*after)


@pytest.mark.parametrize(("max_norm", "length"), [(None, 5.0), (2.0, 2.0), (50.0, 5.0)])
def test_clipping_is_by_the_norm_of_the_summed_gradient(max_norm, length, path):
    """Two parts, whose sum has the norm 5; each of them, or their products, would have another."""
    table = torch.zeros(4, 2)
    slots, weights = [torch.tensor([[0, 2]]), torch.tensor([[2]])], [torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0]])]
    grads = [torch.tensor([[3.0, 0.0]]), torch.tensor([[6.0, -4.0]])]
    row_sgd_(table, slots, weights, grads, lr=1.0, max_norm=max_norm)
    expected = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]]) * -length / 5
    torch.testing.assert_close(table, expected, rtol=1e-6, atol=0)


@pytest.mark.skipif(cpu.why_not() is not None, reason="there are no kernels")
def test_clipping_takes_the_norm_of_the_entries_that_the_step_has_sorted(monkeypatch):
    rows, sorts = cpu.kernels("rows"), []
    entries = rows.SortedEntries
    monkeypatch.setattr(rows, "SortedEntries", lambda *given: sorts.append(given) or entries(*given))
    table = torch.zeros(4, 3)
    row_sgd_(table, [torch.tensor([[1]])], [torch.ones(1, 1)], [torch.tensor([[3.0, 0.0, 4.0]])], lr=1.0, max_norm=1.0)
    torch.testing.assert_close(table[1], torch.tensor([-0.6, 0.0, -0.8]))
    assert len(sorts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_clipped_step_is_bit_for_bit_that_of_scaled_sums(rule, dtype, path):
    """Whose scale is that of the norm that `row_norm` gives, in float32; a limit above the norm changes no bit."""
    step, tensors = operation(rule, 60, 33, dtype)
    gradient, seed = factors(60, [(9, 3), (4, 2)], 33), 5 if dtype == torch.bfloat16 else -1
    (rows, _, sums), norm = sum_parts(parts_of(*gradient), 60).compact(), row_norm(*gradient, 60)
    scaled = [rows[:, None]], [torch.ones(len(rows), 1)], [sums * (0.25 / (norm + 1e-6)).clamp(max=1.0)]
    for limit, of in ((0.25, scaled), (1e9, gradient)):
        clipped, expected = copies(tensors), copies(tensors)
        step(*clipped, *gradient, max_norm=limit, seed=seed)
        step(*expected, *of, seed=seed)
        for one, other in zip(clipped, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6 if limit < 1 and dtype == torch.float32 else 0, atol=1e-7)


def test_a_backward_that_needs_the_rows_of_before_a_step_is_an_error(path):
    """Kernels write where autograd does not look."""
    table, slots = torch.randn(9, 3, requires_grad=True), torch.tensor([[2, 4]])
    scores = dot(table, slots, torch.ones(1, 3, requires_grad=True))
    row_sgd_(table, [slots], [torch.ones(1, 2)], [torch.ones(1, 3)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_small_numbers_of_adam_are_exact_in_float32(path):
    """1 - 0.999 and 1 - 0.999^t, where a plain difference in float32 is wrong in the fifth digit."""
    table, average, square = torch.zeros(3, 2, 5)
    steps = torch.zeros(2, dtype=torch.int32)
    part = [torch.tensor([[1]])], [torch.ones(1, 1)], [torch.full((1, 5), 3.0)]
    row_adam_(table, average, square, steps, *part, lr=1.0, beta1=0.9, beta2=0.999, eps=0.0)
    torch.testing.assert_close(square[1], torch.full((5,), 0.009), rtol=3e-7, atol=0)
    torch.testing.assert_close(table[1], torch.full((5,), -1.0), rtol=5e-7, atol=0)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.99), (0.9, 0.0)], ids=str)
def test_betas_may_be_0(betas, path):
    table, average, square = torch.zeros(3, 2, 3)
    part = [torch.tensor([[0]])], [torch.ones(1, 1)], [torch.tensor([[2.0, -1.0, 0.5]])]
    steps = torch.zeros(2, dtype=torch.int32)
    row_adam_(table, average, square, steps, *part, lr=0.1, beta1=betas[0], beta2=betas[1], eps=1e-8)
    torch.testing.assert_close(table, torch.tensor([[-0.1, 0.1, -0.1], [0.0, 0.0, 0.0]]))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adam", "adagrad"])
def test_states_whose_rows_lie_side_by_side_change_no_bit(rule, dtype):
    step, tensors = operation(rule, 997, 131)
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    gradient = factors(997, [(40, 5), (7, 2)], 131)
    states = tensors[1:3]  # those with a row
    beside = torch.stack(states * 2, 1)
    untouched = beside[:, len(states) :].clone()
    expected = copies(tensors)
    result = [tensors[0].clone(), *beside.unbind(1)[: len(states)], *copies(tensors[3:])]
    assert not result[1].is_contiguous()
    step(*expected, *gradient, seed=3 if dtype == torch.bfloat16 else -1)
    step(*result, *gradient, seed=3 if dtype == torch.bfloat16 else -1)
    assert all(map(torch.equal, result, expected))
    assert torch.equal(beside[:, len(states) :], untouched)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["float64", "float16", "columns first", "strided gradient", "16-bit gradient"])
def test_whatever_the_dtype_or_layout(rule, kind, path):
    dtype = {"float64": torch.float64, "float16": torch.float16}.get(kind, torch.float32)
    step, tensors = operation(rule, 30, 6, dtype)
    slots, weights, grads = gradient = factors(30, [(5, 3)], 6)
    if kind == "16-bit gradient":
        weights[0], grads[0] = weights[0].bfloat16(), grads[0].bfloat16()
    expected = copies(tensors, torch.float64)
    if kind == "columns first":
        result = [tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.clone() for tensor in tensors]
        assert not result[0].is_contiguous()
    else:
        result = copies(tensors)
    if kind == "strided gradient":
        gradient = [[one.t().contiguous().t() for one in column] for column in gradient]
        gradient[0][0] = gradient[0][0].int()
    step(*expected, slots, [weights[0].double()], [grads[0].double()])
    step(*result, *gradient)
    for one, other in zip(result, expected, strict=True):
        tolerance = 2e-3 if one.dtype == torch.float16 else 3e-6
        torch.testing.assert_close(one, other.to(one.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_norm_is_that_of_the_summed_rows(case, path):
    gradient = factors(*case)
    norm = row_norm(*gradient, case[0])
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, summed(*gradient, case[0]).norm().float(), rtol=1e-5, atol=0)
    exact = row_norm(*factors(*case, dtype=torch.float64), case[0])
    assert exact.dtype == torch.float64


def test_the_norm_of_no_reads_is_zero(path):
    for sizes in ([(0, 3)], [(4, 0)]):
        assert row_norm(*factors(50, sizes, 7), 50) == 0


@pytest.mark.parametrize("slot", [-1, 50, 2**40])
def test_slots_that_do_not_exist_are_an_index_error(slot, path):
    table = torch.zeros(50, 3)
    part = [torch.tensor([[4, slot]])], [torch.ones(1, 2)], [torch.ones(1, 3)]
    with pytest.raises(IndexError, match=r"slots must be in \[0, 50\), got"):
        row_sgd_(table, *part, lr=1.0)
    with pytest.raises(IndexError, match=r"slots must be in \[0, 50\), got"):
        row_norm(*part, 50)
    assert not table.any()


def test_the_slot_of_a_weight_of_zero_may_be_anything(path):
    table = torch.zeros(50, 3)
    part = [torch.tensor([[4, -7, 1000]])], [torch.tensor([[1.0, 0.0, 0.0]])], [torch.ones(1, 3)]
    row_sgd_(table, *part, lr=1.0)
    assert table.nonzero()[:, 0].unique().tolist() == [4]


def test_shapes_and_seeds_that_do_not_fit_are_named(path):
    table, slots, weights, grads = torch.zeros(9, 3), torch.zeros(2, 4).long(), torch.ones(2, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\[T, K\] and \[T, V\], got \[2, 4\], \[2, 3\] and \[2, 3\]"):
        row_sgd_(table, [slots], [weights[:, 1:]], [grads], lr=1.0)
    with pytest.raises(ValueError, match=r"\[T, K\] and \[T, V\], got \[2, 4\], \[2, 4\] and \[1, 3\]"):
        row_sgd_(table, [slots], [weights], [grads[1:]], lr=1.0)
    with pytest.raises(ValueError, match=r"grads must be \[T, 3\], got \[2, 4\]"):
        row_sgd_(table, [slots], [weights], [torch.ones(2, 4)], lr=1.0)
    with pytest.raises(ValueError, match=r"states must be \[9\], as the table, got \[8\]"):
        row_adagrad_(table, torch.zeros(8), [slots], [weights], [grads], lr=1.0, eps=1e-6)
    with pytest.raises(ValueError, match=r"states must be \[9, 3\], as the table, got \[9\]"):
        row_adam_(table, *torch.zeros(2, 9), torch.zeros(9).int(), [slots], [weights], [grads], **ADAM)
    with pytest.raises(ValueError, match=r"seed must be negative .* torch.float32 table, got 3"):
        row_sgd_(table, [slots], [weights], [grads], lr=1.0, seed=3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_slots", [5, 100])
def test_no_shape_depends_on_data_off_the_cpu(rule, num_slots):
    """The reference on tensors without data: a shape that depended on data, or a wait for it, would raise."""
    _, tensors = operation(rule, num_slots, 2, torch.bfloat16)
    tensors = [tensor.to("meta") for tensor in tensors]
    gradient = [[one.to("meta") for one in column] for column in factors(num_slots, [(4, 3), (1, 2)], 2)]
    function = getattr(row_step, rule.replace(" ", "_"))
    settings = {"adam": ADAM, "sgd": {"lr": 0.1}}.get(rule, ADAGRAD)
    parts = parts_of(*gradient)
    row_step.step_(row_step.Step(function, tensors[0], tuple(tensors[1:]), parts, 1.0, 3, settings))
    rows = sum_parts(parts, num_slots)
    with pytest.raises(RuntimeError, match="meta"):
        rows.compact()


@pytest.mark.parametrize("rule", RULES)
def test_operations_are_registered_as_torch_expects(rule, path):
    torch.use_deterministic_algorithms(False)  # opcheck compares what it does not initialise
    step, tensors = operation(rule, 13, 5)
    gradient = factors(13, [(4, 3), (2, 1)], 5)
    for max_norm in (None, 0.5):
        opcheck(step.func, (*tensors, *gradient), {**step.keywords, "max_norm": max_norm})


def test_the_norm_is_registered_as_torch_expects(path):
    opcheck(row_norm, (*factors(13, [(4, 3), (2, 1)], 5), 13))


def test_a_table_of_more_than_2_31_elements(monkeypatch):
    """Sparsely: of 2.3 G elements only a few rows are ever touched, so they take no memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    num_slots, width = 2**21 + 2**17, 1024
    table = torch.empty(num_slots, width, dtype=torch.bfloat16)
    slots = torch.tensor([[1], [2**21 - 1], [2**21 + 1], [num_slots - 1]])
    rows, neighbours = slots.flatten(), slots.flatten() - 1
    table[rows] = torch.ones(4, width, dtype=torch.bfloat16)
    table[neighbours] = torch.full((4, width), 3.0, dtype=torch.bfloat16)
    row_sgd_(table, [slots], [torch.ones(4, 1)], [torch.ones(4, width)], lr=0.5, max_norm=None, seed=-1)
    assert torch.equal(table[rows], torch.full((4, width), 0.5, dtype=torch.bfloat16))
    assert torch.equal(table[neighbours], torch.full((4, width), 3.0, dtype=torch.bfloat16))
