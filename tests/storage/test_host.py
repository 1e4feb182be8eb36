"""Tables on the host of a GPU: read from copies of rows, trained on the host, the numbers of a table in memory."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration
from torch.utils.checkpoint import checkpoint

import memlayers
from memlayers import (
    Experts,
    HostMemory,
    MemoryConfig,
    MemoryLayer,
    MemoryPlus,
    RowAdagrad,
    RowAdam,
    RowSGD,
    ValueTable,
    add_memory,
    load_memory,
    quantize_memory,
    save_memory,
)
from memlayers.models import causal_lm, freeze_base
from memlayers.optim import MemoryAdamW
from memlayers.storage import HostTable
from memlayers.storage import host as host_module
from memlayers.storage.host import copied_rows
from memlayers.values import value_tables

CONFIG = MemoryConfig(dim=32, heads=2, topk=4, num_subkeys=16, query_dim=8, query_norm="rms")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def away(monkeypatch):
    """A CPU that is taken for another device than the one where the table is: rows are copied for each call."""
    calls = []
    original = copied_rows

    def copies(weight_SV, slots_TM):
        calls.append(len(slots_TM))
        return original(weight_SV, slots_TM)

    monkeypatch.setattr(host_module, "is_beside", lambda weight_SV, slots_TM: False)
    monkeypatch.setattr(host_module, "copied_rows", copies)
    return calls


def on_host(kind=MemoryLayer, **where):
    torch.manual_seed(0)
    return kind(CONFIG, values=HostMemory(), **where)


def in_memory(layer):
    """The same layer with its table in memory."""
    like = type(layer)(layer.config, dtype=layer.values.weight.dtype)
    like.load_state_dict(layer.state_dict())
    return like


def train(layer, optimizer, steps=3, *, accumulate=1, call=None):
    """The losses of some steps."""
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            x = torch.randn(3, layer.config.dim, generator=draw).to(layer.values.weight.dtype)
            loss = ((layer if call is None else call)(x).float() - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def are_equal(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == like and torch.equal(a, b) for (name, a), (like, b) in pairs)


@pytest.mark.promise(
    "Tables on the host",
    "Train a model on a GPU whose table does not fit there",
    "supported",
    "`values=HostMemory()`: table and moments stay in the host's memory; not measured on a GPU yet",
)
@pytest.mark.parametrize("kind", [MemoryLayer, MemoryPlus])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [RowAdam, RowAdagrad, RowSGD, lambda layer: RowAdam(layer, max_grad_norm=0.1, moments="bfloat16"), MemoryAdamW],
    ids=["adam", "adagrad", "sgd", "clipped", "whole model"],
)
def test_training_is_bit_for_bit_that_of_a_table_in_memory(away, kind, dtype, build):
    layer = on_host(kind, dtype=dtype)
    other, first = in_memory(layer), build(layer)
    second = build(other)
    losses = train(layer, first, accumulate=2)
    assert losses == train(other, second, accumulate=2)
    assert losses[0] != losses[-1]
    assert are_equal(layer, other)
    assert away == [3] * 6


@pytest.mark.promise(
    "Tables on the host", "Dense gradients of one", "supported", "they are on the host, as the table is"
)
def test_a_dense_gradient_is_that_of_a_table_in_memory(away):
    layer = on_host()
    other = in_memory(layer)
    for one in (layer, other):
        optimizer = torch.optim.AdamW(one.parameters())
        train(one, optimizer)
        assert one.values.row_mark.item() == 0
    assert are_equal(layer, other)
    assert torch.equal(layer.values.weight.grad, other.values.weight.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_once(away, reentrant):
    layer = on_host()
    other = in_memory(layer)

    def call(x):
        return checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)

    assert train(layer, RowAdam(layer), call=call) == train(other, RowAdam(other))
    assert torch.equal(layer.values.weight, other.values.weight)
    assert away == [3] * 6  # each pass once more


def test_a_call_without_gradients_says_what_a_table_in_memory_says(away):
    layer = on_host().eval()
    other = in_memory(layer).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))
    with torch.inference_mode():
        assert torch.equal(layer(x), other(x))
    assert away == [10, 10]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of what stands between graphs
def test_a_compiled_layer(away):
    layer = on_host()
    other = in_memory(layer)
    compiled = torch.compile(layer, backend="eager")
    assert train(layer, RowAdam(layer), call=compiled) == pytest.approx(train(other, RowAdam(other)), rel=1e-5)
    torch.testing.assert_close(layer.values.weight, other.values.weight)


def test_another_weight_of_a_functional_call_gets_the_gradient(away):
    layer = on_host()
    optimizer = RowAdam(layer)
    weight = torch.randn(256, 32, requires_grad=True)
    x = torch.randn(3, 32)
    y = torch.func.functional_call(layer, {"values.weight": weight}, x)
    y.square().sum().backward()
    (expected,) = torch.autograd.grad(
        torch.func.functional_call(in_memory(layer), {"values.weight": weight}, x).square().sum(), weight
    )
    assert torch.equal(weight.grad, expected)
    assert layer.values.row_gradient.is_empty
    del optimizer


def test_each_different_row_is_copied_once_a_few_at_a_time(monkeypatch):
    pieces = []
    original = torch.index_select
    monkeypatch.setattr(host_module, "_PIECE", 2 * 8 * 4)
    monkeypatch.setattr(torch, "index_select", lambda *args, **out: pieces.append(args[2]) or original(*args, **out))
    weight_SV = torch.randn(10, 8)
    rows_UV, places_TM = copied_rows(weight_SV, torch.tensor([[9, 3, 3], [0, 9, 7]]))
    assert [piece.tolist() for piece in pieces] == [[0, 3], [7, 9]]
    assert torch.equal(rows_UV, weight_SV[[0, 3, 7, 9]])
    assert places_TM.tolist() == [[3, 1, 1], [0, 3, 2]]


@pytest.mark.parametrize("slot", [256, -1])
def test_slots_out_of_range_are_an_error(away, slot):
    with pytest.raises(IndexError, match=r"slots must be in \[0, 256\)"):
        on_host().values.read(torch.tensor([[3, slot]]), torch.ones(1, 2))


def test_no_token_at_all(away):
    layer = on_host()
    optimizer = RowAdam(layer)
    before = layer.values.weight.clone()
    layer(torch.empty(0, 32)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.values.weight, before)


def test_rows_that_were_chosen_are_trained_alone(away):
    layer = on_host()
    other = in_memory(layer)
    for one in (layer, other):
        optimizer = RowAdam(one, max_grad_norm=0.01)
        optimizer.choose_rows(range(0, 256, 2))
        train(one, optimizer)
    assert are_equal(layer, other)
    assert not torch.equal(layer.values.weight[::2], on_host().values.weight[::2])
    assert torch.equal(layer.values.weight[1::2], on_host().values.weight[1::2])


def test_what_backward_records_is_on_the_host(away):
    layer = on_host()
    optimizer = RowAdam(layer)
    layer(torch.randn(3, 32)).sum().backward()
    (part,) = layer.values.row_gradient.held()
    assert [factor.shape for factor in part] == [(3, 8), (3, 8), (3, 32)]  # no rows
    optimizer.step()
    assert {name: state.device.type for name, state in optimizer.state[layer.values.weight].items()} == {
        "exp_avg": "cpu",
        "exp_avg_sq": "cpu",
        "steps": "cpu",
    }


def test_a_gradient_whose_optimizer_is_gone_is_an_error(away):
    layer = on_host()
    RowAdam(layer)
    loss = layer(torch.randn(3, 32)).sum()
    with pytest.raises(RuntimeError, match="in row mode whose row optimizer is gone"):
        loss.backward()


def test_a_hook_on_the_weight_is_an_error(away):
    layer = on_host()
    optimizer = RowAdam(layer)
    layer.values.weight.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="use ValueTable.register_row_hook"):
        layer(torch.randn(3, 32))
    del optimizer


def test_weights_that_need_no_gradient(away):
    tables = [layer.values for layer in (on_host(), in_memory(on_host()))]
    for table in tables:
        optimizer = RowAdam([table])
        table.read(torch.tensor([[3, 200, 3]]), torch.tensor([[0.5, 0.0, 2.0]])).sum().backward()
        optimizer.step()
    assert torch.equal(*(table.weight for table in tables))
    changed = (tables[0].weight != on_host().values.weight).any(1)
    assert changed.nonzero().flatten().tolist() == [3]  # a weight of zero is no read


def test_a_frozen_table_passes_gradients_on(away):
    layer = on_host()
    other = in_memory(layer)
    grads = []
    for one in (layer, other):
        one.values.requires_grad_(False)
        x = torch.ones(3, 32, requires_grad=True)
        one(x).square().sum().backward()
        assert one.values.weight.grad is None
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert grads[0].any()


def test_a_weight_of_another_dtype_in_its_place(away):
    table = on_host().values
    table.weight = torch.nn.Parameter(table.weight.double())
    table.read(torch.tensor([[3]]), torch.ones(1, 1)).sum().backward()
    assert table.weight.grad.sum() == 32
    assert table.row_mark.grad.dtype == torch.float64


def test_a_second_derivative_is_an_error(away):
    x = torch.randn(3, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(on_host()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Where it is.


def moved(table, device, dtype=None):
    """Moves a table to a device that need not be there; the tensors that were given to be moved."""
    given = []

    def fn(tensor):
        given.append(tensor)
        return types.SimpleNamespace(device=torch.device(device), dtype=dtype or tensor.dtype)

    table._apply(fn)
    return given


@pytest.mark.promise(
    "Tables on the host",
    '`model.to("cuda")`',
    "changed",
    "the table of `values=HostMemory()` stays in the host's memory",
)
def test_it_stays_on_the_host_when_the_model_is_moved():
    table = on_host().values
    weight, before = table.weight, table.weight.clone()
    assert all(tensor.numel() == 0 for tensor in moved(table, "cuda"))  # nothing of it ever goes there
    assert table.weight is weight
    assert torch.equal(weight, before)
    assert table.row_mark.device.type == "cpu"


def test_it_is_cast_on_the_host():
    table = on_host().values
    weight, expected = table.weight, table.weight.bfloat16()
    moved(table, "cuda", torch.bfloat16)
    assert table.weight is weight
    assert torch.equal(weight, expected)
    assert (table.row_mark.dtype, table.row_mark.device.type) == (torch.bfloat16, "cpu")
    assert table.double().weight.dtype == torch.float64
    assert table.half().weight.dtype == torch.float16


def test_it_has_its_storage_when_the_model_gets_one():
    with torch.device("meta"):
        layer = MemoryLayer(CONFIG, values=HostMemory())
    assert layer.values.weight.is_meta
    assert layer(torch.empty(3, 32, device="meta")).shape == (3, 32)
    moved(layer.values, "cuda")
    assert layer.values.weight.device.type == "cpu"
    assert on_host().to("meta").values.weight.is_meta


@pytest.mark.promise("Tables on the host", "`deepcopy` or pickle it", "supported", "the copy is on the host, and dense")
@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_on_the_host_and_has_no_owner(away, make):
    layer = on_host()
    optimizer = RowAdam(layer)
    other = make(layer)
    assert type(other.values) is HostTable
    assert other.values.row_gradient is None
    assert are_equal(layer, other)
    del optimizer


def test_it_loads_what_a_table_in_memory_saved_and_the_other_way_round(away):
    layer, other = on_host(), MemoryLayer(CONFIG)
    first, second = MemoryAdamW(layer), MemoryAdamW(other)
    train(other, second)
    layer.load_state_dict(copy.deepcopy(other.state_dict()))
    first.load_state_dict(copy.deepcopy(second.state_dict()))
    assert train(layer, first) == train(other, second)
    other.load_state_dict(layer.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(layer, first) == train(other, second)


def gpt2():
    torch.manual_seed(0)
    return causal_lm("gpt2", layers=2, dim=32, heads=2, context=16, vocab_size=100)


@pytest.mark.promise(
    "Tables on the host",
    '`load_memory(base, folder, values="host")`',
    "supported",
    "tables of floats stay in the host's memory; other tables are refused",
)
def test_a_saved_memory_is_loaded_onto_the_host_and_back(away, tmp_path):
    config = dataclasses.replace(CONFIG, value_std=1.0)
    model = add_memory(gpt2(), config, layers=[1, 2], share_values=True, values=HostMemory())
    ids_BT = torch.randint(100, (2, 16))
    optimizer = MemoryAdamW(freeze_base(model))
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    optimizer.step()
    optimizer.release()
    save_memory(model, tmp_path)
    expected = model.eval()(input_ids=ids_BT).logits
    loaded = load_memory(gpt2().eval(), tmp_path, values="host")
    (table,) = value_tables(loaded)
    assert type(table) is HostTable
    away.clear()
    assert torch.equal(loaded(input_ids=ids_BT).logits, expected)
    assert away == [32, 32]
    plain = load_memory(gpt2().eval(), tmp_path)
    assert [type(one) for one in value_tables(plain)] == [ValueTable]
    assert torch.equal(plain(input_ids=ids_BT).logits, expected)
    save_memory(quantize_memory(plain), tmp_path / "int8")
    with pytest.raises(ValueError, match="values must be 'memory' for memories with a LowBitTable, got 'host'"):
        load_memory(gpt2(), tmp_path / "int8", values="host")
    with pytest.raises(ValueError, match="must be whole and in memory to be quantised"):
        quantize_memory(loaded)


@pytest.mark.slow
def test_on_a_second_device_every_tensor_is_where_it_is_used():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this version of torch makes no devices in Python")
    file = Path(__file__).with_name("second_device.py")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "all as on one device\n", done.stderr


@pytest.mark.promise("Tables on the host", "Export a model from a GPU", "refused", "move the model to the CPU first")
def test_an_export_from_another_device_is_refused(away, monkeypatch):
    monkeypatch.setattr(host_module, "is_exporting", lambda: True)
    with pytest.raises(ValueError, match="a value table on the host cannot be exported from a GPU"):
        on_host().eval()(torch.randn(3, 32))


def test_a_table_of_another_class_is_refused():
    with pytest.raises(ValueError, match="values must be None or a table for Experts"):
        Experts(CONFIG, values=HostMemory())
    with pytest.raises(ValueError, match=r"values must be 'memory' for memories with a HostTable, got 'host'"):
        host_module.put_on_host(on_host().values)


def test_beside_the_model_it_is_any_table(monkeypatch):
    monkeypatch.setattr(host_module, "copied_rows", None)
    layer = on_host()
    other = in_memory(layer)
    assert train(layer, RowAdam(layer)) == train(other, RowAdam(other))
    assert are_equal(layer, other)


def test_the_place_is_public():
    assert memlayers.HostMemory is HostMemory
    assert isinstance(HostMemory().below("a name"), HostMemory)
    assert repr(HostMemory()) == "HostMemory()"
    assert "on the host" in repr(on_host())


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_reads_and_trains_a_table_on_the_host(dtype):
    layer = on_host(dtype=dtype).to("cuda")
    assert layer.values.weight.device.type == "cpu"
    assert layer.keys.weight.is_cuda
    reference = in_memory(layer).cuda()
    optimizers = [MemoryAdamW(one) for one in (layer, reference)]
    for one, optimizer in zip((layer, reference), optimizers, strict=True):
        for number in range(3):
            x = torch.randn(300, 32, generator=torch.Generator().manual_seed(number)).to("cuda", dtype)
            optimizer.zero_grad()
            (one(x).float() - 1).square().mean().backward()
            optimizer.step()
    assert {state.device.type for state in optimizers[0].state[layer.values.weight].values()} == {"cpu"}
    torch.testing.assert_close(layer.values.weight, reference.values.weight.cpu(), rtol=0.02, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference(x), rtol=0.02, atol=1e-3)
