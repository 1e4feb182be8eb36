"""Nothing waits for the device: host code asks for no value, and its shapes depend on none."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlayers import MemoryConfig, MemoryLayer, RowAdagrad, RowAdam, RowSGD, ValueTable
from memlayers.ops.registry import run

on_gpu = partial(run, "cuda")  # the name of an operation, and its arguments

aten = torch.ops.aten
# item, bool, float and int of a tensor; results of a size that depends on values.
VALUES = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.histc)
UNIQUES = (aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive)
# What a tensor made of Python's numbers goes through; with a device it is a copy to it that is waited for.
FROM_PYTHON = (aten.lift_fresh, aten.lift_fresh_copy)


class NoSync(TorchDispatchMode):
    """Raises at an operation that would wait for a GPU, had its tensors been there.

    An operation's own host code is not seen from outside of it: run it within.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(function, "overloadpacket", None)
        if packet in (*VALUES, *UNIQUES):
            raise AssertionError(f"{function} waits for the device")
        if packet in FROM_PYTHON:
            raise AssertionError(f"{function}: a tensor made on the host")
        if packet in (aten.index, aten.index_put, aten.index_put_):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), f"{function} by a mask"
        if packet is aten.repeat_interleave:
            assert kwargs.get("output_size") is not None, f"{function} without its size"
        if packet in (aten._to_copy, aten.copy_):
            tensors = [given for given in args if isinstance(given, torch.Tensor)]
            devices = {given.device for given in tensors} | {kwargs.get("device") or tensors[0].device}
            assert len(devices) == 1, f"{function} between devices"
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x.repeat_interleave(x.long().abs()),
        lambda x: x.to("meta"),
    ],
)
def test_what_waits_is_seen(function, device):
    x = torch.randn(3, device=device)
    with pytest.raises(AssertionError), NoSync():
        function(x)


def factors(device, tokens=3, topk=2, slots=9, width=5):
    return (
        torch.randint(slots, (tokens, topk), device=device),
        torch.randn(tokens, topk, device=device),
        torch.randn(tokens, width, device=device),
    )


def test_reads_and_their_gradients(device):
    table, (slots, weights, outputs) = torch.randn(9, 5, device=device), factors(device)
    with NoSync():
        on_gpu("read", table, slots, weights)
        on_gpu("dot", table.bfloat16(), slots, outputs)
        on_gpu("sum_rows", slots, weights, outputs, 9)
        on_gpu("row_norm", [slots] * 2, [weights] * 2, [outputs] * 2, 9)


def test_select_and_search(device):
    query, keys = torch.randn(2, 1, 6, device=device), torch.randn(2, 1, 7, 3, device=device)
    with NoSync():
        on_gpu("select", query, query.flip(0), 2)
        scores, slots = on_gpu("search", query, keys, 2)
        on_gpu("search_backward", scores, slots, query, keys)


@pytest.mark.parametrize("rule", ["adam", "adagrad", "row adagrad", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_steps(rule, dtype, device):
    table, moments = torch.randn(9, 5, device=device).to(dtype), torch.rand(2, 9, 5, device=device)
    gradient = [[factor] for factor in factors(device)]
    more = {"max_norm": 0.5, "seed": -1 if dtype == torch.float32 else 5}
    steps = torch.zeros(9, dtype=torch.int32, device=device)
    with NoSync():
        if rule == "adam":
            on_gpu("row_adam_", table, *moments, steps, *gradient, 0.1, 0.9, 0.99, 1e-6, **more)
        elif rule == "sgd":
            on_gpu("row_sgd_", table, *gradient, 0.1, **more)
        else:
            state = moments[0] if rule == "adagrad" else moments[0, :, 0].contiguous()
            on_gpu("row_adagrad_", table, state, *gradient, 0.1, 1e-6, **more)


@pytest.mark.parametrize("optimizer", [RowAdam, RowAdagrad, RowSGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_by_a_row_optimizer(optimizer, dtype, device):
    table = ValueTable(9, 5, dtype=dtype, device=device)
    rows = optimizer([table], lr=0.1, max_grad_norm=0.5)
    slots, weights, _ = factors(device)
    for _ in range(2):  # the first step makes the states
        with NoSync():
            table(slots, weights.requires_grad_()).square().sum().backward()
            rows.step()
            rows.zero_grad()


def test_infer(device):
    tokens, dim, heads, half, num_subkeys = 2, 7, 1, 3, 5
    of_query = [torch.rand(heads, 2 * half, device=device) + 0.1 for _ in range(4)]
    projection, keys = torch.randn(heads * 2 * half, dim, device=device), torch.randn(2, heads, 5, half, device=device)
    table = torch.randn(num_subkeys**2, 6, device=device)
    with NoSync():
        on_gpu("infer", torch.randn(tokens, dim, device=device), projection, None, *of_query, 1e-5, keys, 2, table)


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
def test_a_layer(is_training, device):
    layer = MemoryLayer(MemoryConfig(dim=6, heads=1, topk=2, num_subkeys=5, query_dim=4), device=device)
    rows = RowAdam(layer, lr=0.1)
    layer.train(is_training)
    x = torch.randn(3, 6, device=device, requires_grad=is_training)
    mask = torch.ones(3, dtype=torch.bool, device=device)
    with NoSync(), torch.set_grad_enabled(is_training):
        y = layer(x, mask)
        if is_training:
            y.sum().backward()
            rows.step()
            rows.zero_grad()
