"""Every operation on small and odd shapes under the checked interpreter: no access beside a tensor, no race, and not
more bytes moved than must be."""

import os
from functools import partial

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("only what is interpreted can be checked", allow_module_level=True)

from kernel_tools.interpreted import checked
from memlayers.ops import gpu
from memlayers.ops.registry import run

on_gpu = partial(run, "cuda")  # the name of an operation, and its arguments

DTYPES = [torch.float32, torch.bfloat16]
SLOTS, WIDTH = 23, 37
RULES = ["sgd", "adam", "adagrad", "row adagrad"]


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def strange_slots(num_slots, *shape):
    """Some of them in no table."""
    slots = torch.randint(num_slots, shape)
    strange = torch.tensor([-1, num_slots, 2**31, 2**40, -(2**40), 2**63 - 1, -(2**63)])
    return torch.where(torch.rand(shape) < 0.3, strange[torch.randint(len(strange), shape)], slots)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 13, 5), (1, 67, 32)], ids=str)
def test_select(sizes):
    rows, num_subkeys, topk = sizes
    padded = numbers(2, rows, num_subkeys + 3, dtype=torch.bfloat16)[..., :num_subkeys]
    with checked() as launches:
        on_gpu("select", *(half[None] for half in padded), topk)
        gpu.kernels("select").select(*numbers(2, 1, num_subkeys, rows).mT, topk, softmax=True)
    assert len(launches) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_and_its_gradients(dtype):
    tokens, heads, half, num_subkeys, topk = 3, 2, 5, 13, 3
    query, keys = numbers(tokens, heads, 2 * half, dtype=dtype), numbers(2, heads, num_subkeys, half, dtype=dtype)
    with checked() as launches:
        scores, slots = on_gpu("search", query, keys, topk)
        on_gpu("search_backward", numbers(*scores.shape), slots, query, keys)
    assert len(launches) >= 2


@pytest.fixture(params=[0, 2**31], ids=["as for many tokens", "as for few"])
def few_programs(request, monkeypatch):
    """Up to which a GPU is not filled."""
    monkeypatch.setattr(gpu.kernels("read"), "_FEW_PROGRAMS", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 7), (1, 37, 300)], ids=str)
def test_read_and_dot(sizes, dtype, few_programs):
    tokens, topk, width = sizes
    table, slots = numbers(SLOTS, width, dtype=dtype), strange_slots(SLOTS, tokens, topk)
    strided = numbers(SLOTS, width + 5, dtype=dtype)[:, 2 : width + 2]
    with checked() as launches:
        for whole in (table, strided):
            on_gpu("read", whole, slots, numbers(tokens, topk))
            on_gpu("dot", whole, slots, numbers(tokens, width))
    assert len(launches) == 4


def rows_and_states(rule, dtype, width=WIDTH, state_dtype=torch.float32):
    table, first, second = (numbers(SLOTS, width, dtype=dtype), *numbers(2, SLOTS, width, dtype=state_dtype).square())
    if rule == "adam":
        step = partial(on_gpu, "row_adam_", beta1=0.9, beta2=0.99, eps=1e-6)
        return step, (table, first, second, torch.randint(3, (SLOTS,), dtype=torch.int32))
    if rule == "sgd":
        return partial(on_gpu, "row_sgd_"), (table,)
    return partial(on_gpu, "row_adagrad_", eps=1e-6), (table, first if rule == "adagrad" else torch.rand(SLOTS))


def factors(*sizes, width=WIDTH, dtype=torch.float32, num_slots=SLOTS):
    """Parts of (tokens, rows a token); some weights are zero, some slots nowhere, and one slot is read most."""
    slots = [torch.where(torch.rand(size) < 0.4, 5, strange_slots(num_slots, *size)) for size in sizes]
    weights = [numbers(*size) * (torch.rand(size) > 0.2) for size in sizes]
    return slots, weights, [numbers(tokens, width, dtype=dtype) for tokens, _ in sizes]


@pytest.fixture(params=[3, 64], ids="blocks of {}".format)
def block_length(request, monkeypatch):
    """Of entries: many borders, or none."""
    monkeypatch.setattr(gpu.kernels("rows"), "block_length", lambda count: request.param)


@pytest.mark.parametrize(("rule", "dtype"), [*zip(RULES, DTYPES * 2, strict=True)], ids=str)
def test_row_steps(rule, dtype, block_length):
    step, wholes = rows_and_states(rule, dtype)
    with checked() as launches:
        step(*wholes, *factors((1, 1)), lr=0.1)
        step(
            *wholes,
            *factors((5, 3), (7, 1), dtype=dtype),
            lr=0.1,
            max_norm=0.5,
            seed=3 * (dtype != torch.float32) - 1,
        )
    assert len(launches) >= 4


@pytest.mark.parametrize("width", [1, 600])
def test_row_steps_of_other_widths(width, block_length):
    step, wholes = rows_and_states("adam", torch.bfloat16, width, torch.bfloat16)
    with checked():
        step(*wholes, *factors((4, 3), width=width), lr=0.1, seed=7)
        row_step_of_means, means = rows_and_states("row adagrad", torch.float32, width)
        row_step_of_means(*means, *factors((4, 3), width=width), lr=0.1)


def test_norm_and_sum_of_rows(block_length):
    with checked() as launches:
        on_gpu("row_norm", *factors((5, 3), (2, 7)), SLOTS)
        on_gpu("sum_rows", *(column[0] for column in factors((5, 3))), SLOTS)
    assert len(launches) >= 4


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (3, torch.float32)], ids=str)
def test_infer(tokens, dtype):
    dim, heads, half, num_subkeys, topk = 7, 1, 5, 11, 5
    of_query = [numbers(heads, 2 * half).abs() + 0.1 for _ in range(4)]
    with checked() as launches:
        on_gpu(
            "infer",
            numbers(tokens, dim, dtype=dtype),
            numbers(heads * 2 * half, dim, dtype=dtype),
            numbers(heads * 2 * half, dtype=dtype),
            *of_query,
            1e-5,
            numbers(2, heads, num_subkeys, half, dtype=dtype),
            topk,
            numbers(num_subkeys**2, WIDTH, dtype=dtype),
        )
    assert len(launches) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_read_moves_each_row_once(dtype, few_programs):
    tokens, topk, width = 2, 32, 512
    table = numbers(50, width, dtype=dtype)
    slots = torch.stack([torch.randperm(50)[:topk] for _ in range(tokens)])
    weights, outputs = numbers(tokens, topk), numbers(tokens, width)
    rows = tokens * topk * width * table.element_size()
    with checked() as launches:
        y = on_gpu("read", table, slots, weights)
        d = on_gpu("dot", table, slots, outputs)
    reading, dotting = launches
    assert reading.arguments["table"].loaded == dotting.arguments["table"].loaded == rows
    for found, name, others in ((reading, "weights", weights), (dotting, "outputs", outputs)):
        assert found.arguments["slots"].distinct_loaded == slots.nbytes
        assert found.arguments[name].distinct_loaded == others.nbytes
        # What the programs of a token share is asked for by each, and is in cache for all but the first.
        assert found.loaded <= 1.25 * (rows + slots.nbytes + others.nbytes)
    assert (reading.stored, dotting.stored) == (y.nbytes, d.nbytes)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_step_moves_each_row_and_its_states_once(rule, block_length):
    step, wholes = rows_and_states(rule, torch.float32)
    gradient = factors((9, 3), (4, 2))
    read = torch.cat([s[(w != 0) & (s >= 0) & (s < SLOTS)] for s, w in zip(*gradient[:2], strict=True)])
    with checked() as launches:
        step(*wholes, *gradient, lr=0.1)
    walks = [launch for launch in launches if launch.name in ("_walk", "_finish")]
    for name, whole in zip(("target", "first", "second"), [w for w in wholes if w.dtype != torch.int32], strict=False):
        of_rows = len(read.unique()) * whole[0].nbytes
        moved = [launch.arguments[name] for launch in walks]
        assert sum(one.loaded for one in moved) == sum(one.stored for one in moved) == of_rows
    loaded = sum(launch.arguments["grad_RV"].loaded for launch in walks if launch.name == "_walk")
    assert loaded == len(read) * WIDTH * 4
