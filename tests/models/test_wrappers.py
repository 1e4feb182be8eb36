"""What stands in a module's place: what it is called with, what it returns, and what becomes of copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer
from memlayers.models import MemoryWrapper, ParallelMemory, ReplacingMemory
from memlayers.models.wrappers import find_wrappers

CONFIG = MemoryConfig(dim=8, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms")


class Block(nn.Module):
    """Its output, and more; told apart from others by a word."""

    kind = "sliding"

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden_states, scale=1.0, *, cache=None):
        return scale * self.inner(hidden_states), cache


def beside(base):
    wrapper = ParallelMemory(base, MemoryLayer(CONFIG))
    wrapper.gate.data.uniform_(1, 2)
    return wrapper


def test_a_memory_beside_adds_what_it_reads_behind_its_gate():
    x = torch.randn(2, 5, 8)
    wrapper = beside(nn.Linear(8, 8))
    expected = wrapper.base(x) + wrapper.gate * wrapper.memory(x)
    assert torch.equal(wrapper(x), expected)
    wrapper.reset_parameters()
    assert torch.equal(wrapper(x), wrapper.base(x))


def test_a_tuple_keeps_its_other_entries():
    x = torch.randn(2, 5, 8)
    wrapper = beside(Block())
    cache = object()
    for output in (wrapper(x, 3.0, cache=cache), wrapper(hidden_states=x, scale=3.0, cache=cache)):
        assert isinstance(output, tuple)
        assert output[1] is cache
        assert torch.equal(output[0], 3 * wrapper.base.inner(x) + wrapper.gate * wrapper.memory(x))


def test_a_memory_in_place_reads_the_same_input():
    x = torch.randn(2, 5, 8)
    wrapper = ReplacingMemory(MemoryLayer(CONFIG))
    assert torch.equal(wrapper(x), wrapper.memory(x))
    assert torch.equal(wrapper(hidden_states=x), wrapper.memory(x))
    assert torch.equal(wrapper(x, "what else the block passes"), wrapper.memory(x))


@pytest.mark.parametrize("make", [lambda: beside(nn.Linear(8, 8)), lambda: ReplacingMemory(MemoryLayer(CONFIG))])
def test_an_input_under_another_name_is_refused(make):
    with pytest.raises(ValueError, match=r"hidden states first \(or as hidden_states=\), got features"):
        make()(features=torch.randn(2, 8))


def test_the_module_beside_which_a_memory_stands_still_answers():
    wrapper = beside(Block())
    assert wrapper.kind == "sliding"
    assert wrapper.inner is wrapper.base.inner
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = wrapper.absent


def test_a_kept_module_is_no_part_of_the_model():
    kept = nn.Linear(8, 8)
    wrapper = ReplacingMemory(MemoryLayer(CONFIG), kept)
    assert wrapper.original is kept
    assert kept not in set(wrapper.modules())
    assert not set(kept.parameters()) & set(wrapper.parameters())
    assert all(name.startswith("memory.") for name in wrapper.state_dict())
    assert ReplacingMemory(MemoryLayer(CONFIG)).original is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("mode", ["parallel", "replace"])
def test_copies(mode, copied):
    x = torch.randn(3, 8)
    kept = nn.Linear(8, 8)
    wrapper = beside(kept) if mode == "parallel" else ReplacingMemory(MemoryLayer(CONFIG), kept)
    twin = copied(wrapper)
    assert torch.equal(twin(x), wrapper(x))
    assert twin.original is not kept
    assert torch.equal(twin.original(x), kept(x))
    assert not set(twin.parameters()) & set(wrapper.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_output_is_that_of_the_module(dtype):
    x = torch.randn(4, 8)
    wrapper = beside(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    with torch.autocast("cpu", dtype=dtype):
        assert wrapper.base(x).dtype == dtype
        assert wrapper.memory(x).dtype == torch.float32  # that of its input
        assert wrapper(x).dtype == dtype
    half = wrapper.to(dtype)
    assert half.gate.dtype == dtype
    assert half(x.to(dtype)).dtype == dtype


def test_wrappers_are_found_by_name_in_order():
    model = nn.Sequential(beside(nn.Linear(8, 8)), nn.Linear(8, 8), ReplacingMemory(MemoryLayer(CONFIG)))
    assert [*find_wrappers(model)] == [("0", model[0]), ("2", model[2])]
    assert all(isinstance(wrapper, MemoryWrapper) for _, wrapper in find_wrappers(model))
    assert [wrapper.mode for _, wrapper in find_wrappers(model)] == ["parallel", "replace"]
