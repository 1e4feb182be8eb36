import pytest
import torch

from memlayers import MemoryLayer, MemoryPlus
from memlayers.models import add_memory, causal_lm, memory_layers, memory_preset


def model(layers=6):
    return causal_lm("llama", vocab_size=40, layers=layers, dim=16, heads=2, context=16).eval()


SMALL = {"num_subkeys": 8, "query_dim": 8, "topk": 4}


def test_the_paper():
    preset = memory_preset("paper", model())
    config = preset["config"]
    assert (config.dim, config.slots, config.heads, config.topk, config.query_dim) == (16, 512**2, 4, 32, 512)
    assert (config.query_norm, preset["layers"], preset["mode"]) == ("batch", [5], "replace")
    assert preset["kind"] is MemoryLayer


def test_a_retrofit():
    preset = memory_preset("retrofit", model())
    config = preset["config"]
    assert (config.slots, config.heads, config.topk, config.query_dim, config.query_norm) == (65536, 4, 32, 256, "rms")
    assert (preset["layers"], preset["mode"], preset["share_values"]) == ([5], "parallel", False)
    assert preset["kind"] is MemoryLayer


def test_memory_plus():
    preset = memory_preset("memory_plus", model())
    config = preset["config"]
    assert (config.slots, config.heads, config.topk, config.query_dim, config.query_norm) == (2**20, 4, 32, 512, "none")
    assert (preset["mode"], preset["kind"], preset["share_values"]) == ("replace", MemoryPlus, True)


@pytest.mark.parametrize(
    ("blocks", "layers"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 3, 5]), (12, [2, 6, 10]), (24, [4, 12, 20]), (32, [8, 16, 24])],
)
def test_memory_plus_shares_one_table_around_the_middle(blocks, layers):
    base = model(blocks)
    preset = memory_preset("memory_plus", base, **SMALL)
    assert preset["layers"] == layers
    memories = [*memory_layers(add_memory(base, **preset)).values()]
    assert len(memories) == len(layers)
    assert all(type(memory) is MemoryPlus and memory.values is memories[0].values for memory in memories)
    base(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()


@torch.no_grad()
def test_a_retrofit_changes_nothing_at_the_start():
    base, ids = model(), torch.arange(12)[None]
    before = base(input_ids=ids).logits
    add_memory(base, **memory_preset("retrofit", base, layers=[2, 3], **SMALL))
    assert [*memory_layers(base)] == ["model.layers.1.mlp.memory", "model.layers.2.mlp.memory"]
    assert torch.equal(base(input_ids=ids).logits, before)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="name must be one of 'paper', 'memory_plus', 'retrofit', got 'pkm'"):
        memory_preset("pkm", model())
    with pytest.raises(ValueError, match="unknown memory configuration field 'num_keys'; did you mean 'num_subkeys'"):
        memory_preset("paper", model(), num_keys=8)
    with pytest.raises(ValueError, match="dim must be given for a Linear"):
        memory_preset("paper", torch.nn.Linear(4, 4), layers=["ffn"])
    with pytest.raises(ValueError, match="layers must be names of modules.* for a Linear: its configuration has no"):
        memory_preset("paper", torch.nn.Linear(4, 4), dim=4)
    assert memory_preset("paper", torch.nn.Linear(4, 4), layers=["ffn"], dim=4)["config"].dim == 4
