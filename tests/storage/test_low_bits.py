"""Tables of 8 and 4 bits: how they are made and read, and what of a table of floats they refuse."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus, RowAdam, RowSGD, ValueTable, quantize_memory
from memlayers.distributed import shard_tables
from memlayers.optim import MemoryAdamW
from memlayers.parameters import count_parameters
from memlayers.storage.low_bits import LowBitTable, low_bit_table

CONFIG = MemoryConfig(dim=128, heads=2, topk=4, num_subkeys=6, query_dim=8)


@pytest.fixture(params=[8, 4], ids=["8 bits", "4 bits"])
def bits(request):
    return request.param


def of_floats(table):
    """A table of floats that holds what a table of few bits stands for."""
    made = ValueTable(*table.shape)
    made.weight.data = table.dequantised(torch.arange(table.shape[0]))
    return made


def test_it_is_read_as_the_table_of_floats_that_it_stands_for(bits):
    table = low_bit_table(ValueTable(50, 130), bits)
    slots, weights = torch.randint(50, (2, 3, 7)), torch.randn(2, 3, 7)
    torch.testing.assert_close(table.read(slots, weights), of_floats(table).read(slots, weights), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="slots and weights must have one shape"):
        table.read(slots, weights[..., :2])


@pytest.mark.parametrize("kind", [MemoryLayer, MemoryPlus, Experts])
def test_every_kind_of_memory_says_nearly_what_it_said(kind, bits):
    """8 bits move the output by some thousandths, 4 bits by some hundredths."""
    layer, x = kind(CONFIG).eval(), torch.randn(40, 128)
    with torch.no_grad():
        before = layer(x)
        quantize_memory(layer, bits)
        moved = (layer(x) - before).norm() / before.norm()
    assert 1e-4 < moved < {8: 0.02, 4: 0.2}[bits]
    layer(x).square().sum().backward()
    assert layer.keys.weight.grad.any(), "what finds the rows can be trained"


@pytest.mark.promise(
    "Quantised models",
    "`to(dtype)`, `half()`, `deepcopy`, pickle and `torch.compile` of a memory after `quantize_memory`",
    "supported",
    "its tables keep their bits",
)
def test_it_stays_itself_through_casts_and_copies(bits):
    layer, x = quantize_memory(MemoryLayer(CONFIG).eval(), bits), torch.randn(5, 128)
    codes, scales = layer.values.codes.clone(), layer.values.scales.clone()
    with torch.no_grad():
        expected = layer(x)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half().float()):
            assert isinstance(copied.values, LowBitTable)
            assert torch.equal(copied.values.codes, codes)
            assert torch.equal(copied.values.scales, scales)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        torch.testing.assert_close(layer(x), expected, rtol=1e-1, atol=1e-1)


@pytest.mark.slow
def test_it_is_compiled(bits):
    layer, x = quantize_memory(MemoryLayer(CONFIG).eval(), bits), torch.randn(5, 128)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_is_exported(bits):
    layer, x = quantize_memory(MemoryLayer(CONFIG).eval(), bits), torch.randn(5, 128)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(program.module()(x[:3]), layer(x[:3]), rtol=1e-4, atol=1e-5)


def test_a_table_that_two_layers_share_is_one_afterwards():
    first = MemoryLayer(CONFIG)
    both = nn.ModuleList([first, MemoryLayer(CONFIG, values=first.values)])
    quantize_memory(both, 4)
    assert both[0].values is both[1].values


def test_it_counts_as_many_parameters_as_before(bits):
    layer = MemoryLayer(CONFIG)
    before = count_parameters(layer)
    assert count_parameters(quantize_memory(layer, bits)) == before
    assert before["values"] == 36 * 128


TRAINED = "tables must be of floats to be trained, got one of 8 bits: train the model with its table of floats"


@pytest.mark.promise(
    "Quantised models",
    "training the tables of a memory after `quantize_memory`",
    "refused",
    "train the model with its tables of floats, and quantise it afterwards",
)
def test_training_it_is_refused():
    layer = quantize_memory(MemoryLayer(CONFIG))
    for build in (RowAdam, RowSGD):
        with pytest.raises(ValueError, match=TRAINED):
            build(layer, lr=1.0)
    with pytest.raises(ValueError, match=TRAINED):
        layer.values.own(object())
    with pytest.raises(AttributeError, match=r"has no weight of floats: read its rows by `read` or `dequantised"):
        layer.values.weight.requires_grad_()
    assert not hasattr(layer.values, "weight")


def test_an_optimizer_of_a_whole_model_trains_the_rest():
    layer = quantize_memory(MemoryLayer(CONFIG))
    codes, keys = layer.values.codes.clone(), layer.keys.weight.detach().clone()
    optimizer = MemoryAdamW(layer, lr=0.1)
    layer(torch.randn(9, 128)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.values.codes, codes)
    assert not torch.equal(layer.keys.weight, keys)


def test_what_cannot_be_quantised_is_refused_and_left_as_it_is():
    layer = MemoryLayer(CONFIG)
    with pytest.raises(ValueError, match="bits must be one of 8, 4, got 5"):
        quantize_memory(layer, 5)
    optimizer = RowAdam(layer)
    with pytest.raises(ValueError, match=r"must have no row optimizer to be quantised, got one: call its release\(\)"):
        quantize_memory(layer)
    optimizer.release()
    assert type(layer.values) is ValueTable
    layer.values.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="must hold finite numbers"):
        quantize_memory(layer)
    with pytest.raises(ValueError, match="model must have memories"):
        quantize_memory(nn.Linear(2, 2))
    layer.reset_parameters()
    with pytest.raises(ValueError, match="got one of 8 bits"):
        quantize_memory(quantize_memory(layer), 4)


def test_tables_of_few_bits_beside_others_stay_as_they_are():
    pair = nn.ModuleList([quantize_memory(MemoryLayer(CONFIG)), MemoryLayer(CONFIG)])
    before = pair[0].values
    quantize_memory(pair, 4)
    assert pair[0].values is before
    assert [memory.values.bits for memory in pair] == [8, 4]


def test_a_class_of_tables_that_is_not_known_is_refused_by_name():
    class Mine(ValueTable):
        pass

    with pytest.raises(ValueError, match="to be quantised .*, got Mine"):
        low_bit_table(Mine(4, 8), 8)


def test_states_of_floats_and_of_few_bits_are_not_mixed():
    layer, low = MemoryLayer(CONFIG), quantize_memory(MemoryLayer(CONFIG))
    with pytest.raises(RuntimeError, match=r"values.weight is a table of floats, and this one has 8 bits: load"):
        low.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*values.weight"):
        layer.load_state_dict(low.state_dict())
    other = quantize_memory(MemoryLayer(CONFIG))
    other.load_state_dict(low.state_dict())
    assert torch.equal(other.values.codes, low.values.codes)


def test_columns_of_it_are_refused():
    mesh = SimpleNamespace(ndim=1, size=lambda *_: 1)
    with pytest.raises(ValueError, match="LowBitTable"):
        shard_tables(quantize_memory(MemoryLayer(CONFIG)), mesh)
