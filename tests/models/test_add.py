import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from memlayers import MemoryConfig, MemoryLayer
from memlayers.models import (
    MemoryGPT2Config,
    MemoryGPT2LMHeadModel,
    MemoryLlamaConfig,
    MemoryLlamaForCausalLM,
    ReplacingMemory,
    add_memory,
    memory_layers,
)

CLASSES = {
    "gpt2": (MemoryGPT2LMHeadModel, MemoryGPT2Config),
    "llama": (MemoryLlamaForCausalLM, MemoryLlamaConfig),
}


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def test_chosen_blocks_get_a_memory_and_nothing_else_changes(family, plain, memory_config):
    before = dict(plain.named_parameters())
    others = [block.mlp for block in blocks(plain)]
    assert add_memory(plain, memory_config, [2, 4]) is plain
    model_class, config_class = CLASSES[family]
    assert type(plain) is model_class
    configs = {type(module.config) for module in plain.modules() if hasattr(module, "config")}
    assert configs == {config_class, MemoryConfig}
    assert [isinstance(block.mlp, ReplacingMemory) for block in blocks(plain)] == [False, True, False, True]
    kept = [block.mlp is other for block, other in zip(blocks(plain), others, strict=True)]
    assert kept == [True, False, True, False]
    for name, parameter in plain.named_parameters():
        assert name not in before or before[name] is parameter
    prefix = "transformer.h" if family == "gpt2" else "model.layers"
    assert memory_layers(plain) == {f"{prefix}.{i}.mlp.memory": blocks(plain)[i].mlp.memory for i in (1, 3)}
    assert plain.config.memory == {
        "config": memory_config.to_dict(), "kind": "MemoryLayer", "layers": [2, 4], "mode": "replace",
        "share_values": False,
    }  # fmt: skip


def test_one_memory_at_three_quarters_by_default(plain, memory_config):
    add_memory(plain, memory_config)
    assert [isinstance(block.mlp, ReplacingMemory) for block in blocks(plain)] == [False, False, True, False]


def test_shared_values_are_one_table(plain, memory_config):
    first, second, third = memory_layers(add_memory(plain, memory_config, [1, 2, 4], share_values=True)).values()
    assert first.values is second.values is third.values
    assert first.keys is not second.keys
    assert first.query is not second.query
    tables = [p for p in plain.parameters() if p.shape == (36, 16)]
    assert len(tables) == 1


def test_unshared_values_are_not(plain, memory_config):
    first, second = memory_layers(add_memory(plain, memory_config, [1, 2])).values()
    assert first.values is not second.values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_memories_follow_their_block(plain, memory_config, dtype):
    plain.to(dtype)
    blocks(plain)[1].train()
    first, second = memory_layers(add_memory(plain, memory_config, [1, 2])).values()
    assert {p.dtype for p in first.parameters()} == {dtype}
    assert (first.training, first.query.training, second.training, second.query.training) == (False, False, True, True)


def test_a_model_on_the_meta_device(plain, memory_config):
    memory = next(iter(memory_layers(add_memory(plain.to("meta"), memory_config)).values()))
    # But the companion of its table, which nobody would fill.
    assert {p.device.type for name, p in memory.named_parameters() if "row_mark" not in name} == {"meta"}


def test_every_parameter_is_trained(plain, memory_config):
    model = add_memory(plain, memory_config, [2, 4], share_values=True).train()
    ids = torch.randint(0, 40, (4, 12))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or "bias" in name or "row_mark" in name, name


def test_the_callers_configuration_stays_plain(memory_config):
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=20, n_positions=8)
    said = config.to_dict()
    model = add_memory(GPT2LMHeadModel(config), memory_config)
    assert type(config) is GPT2Config
    assert config.to_dict() == said
    assert {k: v for k, v in model.config.to_dict().items() if k not in ("memory", "auto_map", "model_type")} == {
        k: v for k, v in said.items() if k != "model_type"
    }


def test_the_choice_of_attention_is_kept(memory_config):
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=20, n_positions=8, attn_implementation="eager")
    model = add_memory(GPT2LMHeadModel(config), memory_config)
    assert model.config._attn_implementation == "eager"
    assert {block.attn.config._attn_implementation for block in blocks(model)} == {"eager"}


def snapshot(model):
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return type(model), model.config, copy.deepcopy(model.config.to_dict()), dict(model.named_modules()), hooks, state


def assert_as_it_was(model, before):
    now = snapshot(model)
    assert now[:2] == before[:2]
    assert now[2:5] == before[2:5]
    assert now[5].keys() == before[5].keys()
    assert all(torch.equal(now[5][name], before[5][name]) for name in now[5])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([5], r"layers must be within 1\.\.4, .* got 5"),
        ([0], "got 0"),
        ([2, 2], r"twice, got \[2, 2\]"),
        ([], r"got \[\]"),
    ],
)
def test_wrong_layers_leave_the_model_as_it_was(plain, memory_config, layers, message):
    before = snapshot(plain)
    with pytest.raises(ValueError, match=message):
        add_memory(plain, memory_config, layers)
    assert_as_it_was(plain, before)


def test_a_wrong_size_leaves_the_model_as_it_was(plain):
    before = snapshot(plain)
    with pytest.raises(ValueError, match=r"config\.dim must be 16, .* got 32"):
        add_memory(plain, MemoryConfig(dim=32, topk=2, num_subkeys=4, query_dim=4))
    assert_as_it_was(plain, before)


def test_a_failure_while_building_leaves_the_model_as_it_was(plain, memory_config):
    before = snapshot(plain)
    built = []

    class Failing(MemoryLayer):
        def __init__(self, *args, **kwargs):
            if built:
                raise MemoryError
            super().__init__(*args, **kwargs)
            built.append(self)

    with pytest.raises(MemoryError):
        add_memory(plain, memory_config, [1, 2], kind=Failing)
    assert len(built) == 1
    assert_as_it_was(plain, before)


def test_a_second_memory_is_refused(plain, memory_config):
    add_memory(plain, memory_config, [2])
    before = snapshot(plain)
    with pytest.raises(ValueError, match=r"model must have no memory 'default' yet, got one with .*\.1\.mlp\.memory"):
        add_memory(plain, memory_config, [3])
    assert_as_it_was(plain, before)


def test_a_memory_put_in_by_hand_counts_too(plain, memory_config):
    blocks(plain)[0].mlp = MemoryLayer(memory_config)
    with pytest.raises(ValueError, match=r"model must have no memory 'default' yet, got one with .*\.0\.mlp"):
        add_memory(plain, memory_config, [3])
