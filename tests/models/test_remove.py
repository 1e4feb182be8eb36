"""remove_memory: what it gives back, and when it cannot."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from memlayers import MemoryConfig
from memlayers.models import add_memory, causal_lm, memory_layers, remove_memory
from memlayers.models.wrappers import find_wrappers

IDS = torch.arange(24).view(2, 12)


def logits(model, **options):
    with torch.no_grad():
        return model.eval()(IDS, **options).logits


def nudge(model):
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data += 1.0


def test_a_model_without_memories_is_refused(plain):
    with pytest.raises(ValueError, match=rf"memories that add_memory put there, got a {type(plain).__name__} without"):
        remove_memory(plain)


def test_modules_that_were_not_kept_cannot_come_back(plain, memory_config):
    model = add_memory(plain, memory_config, [2, 3])
    before, expected = dict(model.named_modules()), logits(model)
    with pytest.raises(ValueError, match=r"has not kept \S+\.1\.mlp, \S+\.2\.mlp: use .*keep_original=True"):
        remove_memory(model)
    assert dict(model.named_modules()) == before
    assert torch.equal(logits(model), expected)


def test_removed_and_added_again(plain, memory_config):
    expected = logits(plain)
    for mode in ("parallel", "replace", "parallel"):
        model = add_memory(plain, memory_config, [2, 3], mode=mode, keep_original=True, share_values=True)
        assert model is plain
        assert len(memory_layers(model)) == 2
        remove_memory(model)
        assert not memory_layers(model)
        assert torch.equal(logits(model), expected)


@pytest.mark.promise(
    "Saving and loading",
    "`remove_memory`",
    "supported",
    "the base's outputs, bit for bit; `keep_original=True` where a module is replaced",
)
def test_a_loaded_model_gives_its_base_back(plain, memory_config, tmp_path):
    expected, plain_class = logits(plain), type(plain)
    add_memory(plain, memory_config, [2], mode="parallel")
    nudge(plain)
    plain.save_pretrained(tmp_path / "with")
    model = remove_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "with"))
    assert type(model) is plain_class
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "memory_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "without")
    assert type(again) is plain_class
    assert torch.equal(logits(again), expected)


def test_masks_are_no_longer_handed_over(plain, memory_config, enable_checkpointing):
    enable_checkpointing(plain, False)
    twin = copy.deepcopy(plain)
    model = add_memory(plain, memory_config, [2], mode="parallel").train()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    model(IDS, attention_mask=mask, use_cache=False).logits.sum().backward()
    remove_memory(model)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert len(module._forward_hooks) == len(other._forward_hooks)
        functions = [part.__dict__.get("_gradient_checkpointing_func") for part in (module, other)]
        assert getattr(functions[0], "func", None) is getattr(functions[1], "func", None)
    assert torch.equal(logits(model, attention_mask=mask), logits(twin, attention_mask=mask))


@pytest.mark.parametrize("mode", ["parallel", "replace"])
def test_after_a_cast(plain, memory_config, mode):
    model = add_memory(copy.deepcopy(plain), memory_config, [2], mode=mode, keep_original=True)
    assert torch.equal(logits(remove_memory(model.to(torch.bfloat16))), logits(plain.to(torch.bfloat16)))


def test_a_kept_module_of_several_dtypes_stays_as_it_was(memory_config):
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16).to(torch.float64)))
    add_memory(model, memory_config, ["1"], keep_original=True)
    remove_memory(model)
    assert [parameter.dtype for parameter in model[1].parameters()] == 2 * [torch.float32] + 2 * [torch.float64]


def test_the_mode_of_the_model_is_kept(plain, memory_config):
    model = add_memory(plain.train(), memory_config, [2], keep_original=True)
    remove_memory(model.eval())
    assert not any(module.training for module in model.modules())


def test_frozen_stays_frozen(plain, memory_config):
    plain.requires_grad_(False)
    remove_memory(add_memory(plain, memory_config, [2], mode="parallel"))
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_a_compiled_model():
    base = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32).eval()
    expected = logits(base)
    compiled = torch.compile(base, backend="eager")
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
    assert add_memory(compiled, config, [2], mode="parallel") is compiled
    nudge(base)
    assert not torch.equal(logits(base), expected)
    assert remove_memory(compiled) is compiled
    assert torch.equal(logits(base), expected)
