import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlayers import MemoryConfig
from memlayers.models import MemoryGPT2Config, MemoryLlamaConfig, MemoryPlacement, add_memory, causal_lm, memory_layers

# Large enough for the spread of each tensor to tell one initialisation from another.
MEMORY = MemoryConfig(dim=32, value_dim=24, heads=3, topk=4, num_subkeys=16, query_dim=16, query_hidden=(40,))


def config_with_memory(family: str):
    plain = causal_lm(family, vocab_size=40, layers=2, dim=32, heads=2, context=16).config
    memory_class = {"gpt2": MemoryGPT2Config, "llama": MemoryLlamaConfig}[family]
    fields = {key: value for key, value in plain.to_dict().items() if key != "model_type"}
    section = MemoryPlacement(config=MEMORY, layers=[1, 2], share_values=True).to_dict()
    return memory_class(**fields, memory=section)


@torch.no_grad()
def assert_drawn_as_by_the_layer(model):
    """As MemoryLayer.reset_parameters: transformers would draw linear layers from N(0, 0.02) and zero their biases."""

    def uniform(tensor, bound):
        assert float(tensor.abs().max()) <= bound
        assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)

    for memory in memory_layers(model).values():
        uniform(memory.query.projections[0].weight, 1 / math.sqrt(32))
        uniform(memory.query.projections[0].bias, 1 / math.sqrt(32))
        uniform(memory.query.projections[1].weight, 1 / math.sqrt(40))
        uniform(memory.query.projections[1].bias, 1 / math.sqrt(40))
        uniform(memory.keys.weight, 1 / math.sqrt(8))
        uniform(memory.output.weight, 1 / math.sqrt(24))
        assert float(memory.values.weight.std()) == pytest.approx(1 / math.sqrt(24), rel=0.05)
        assert memory.values.weight.mean().abs() < 0.02
        assert torch.equal(memory.query.norm.weight, torch.ones(3, 16))
        assert torch.equal(memory.query.norm.running_mean, torch.zeros(3, 16))
        assert torch.equal(memory.query.norm.running_var, torch.ones(3, 16))
    first, second = memory_layers(model).values()
    assert not torch.equal(first.keys.weight, second.keys.weight)


def test_by_add_memory(family):
    model = causal_lm(family, vocab_size=40, layers=2, dim=32, heads=2, context=16)
    assert_drawn_as_by_the_layer(add_memory(model, MEMORY, [1, 2], share_values=True))


def test_from_a_configuration(family):
    assert_drawn_as_by_the_layer(AutoModelForCausalLM.from_config(config_with_memory(family)))


def test_from_the_meta_device(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_with_memory(family))
    assert {tensor.device.type for tensor in memory_layers(model).popitem()[1].state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)
    model.init_weights()
    assert_drawn_as_by_the_layer(model)
    first, second = memory_layers(model).values()
    assert first.values is second.values


def test_from_weights_without_memories(family, tmp_path):
    plain = causal_lm(family, vocab_size=40, layers=2, dim=32, heads=2, context=16)
    plain.save_pretrained(tmp_path)
    config = config_with_memory(family)
    model_class = AutoModelForCausalLM.from_config(config).__class__
    model = model_class.from_pretrained(tmp_path, config=config)
    assert_drawn_as_by_the_layer(model)
    first, second = memory_layers(model).values()
    assert first.values is second.values
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("missing", ["values.weight", "keys.weight", "query.projections.0.bias"])
def test_what_a_file_lacks_is_drawn_and_the_rest_is_kept(family, tmp_path, missing):
    saved = AutoModelForCausalLM.from_config(config_with_memory(family))
    for memory in memory_layers(saved).values():
        for tensor in memory.state_dict().values():
            tensor.fill_(0.125)
    saved.save_pretrained(tmp_path, state_dict={k: v for k, v in saved.state_dict().items() if missing not in k})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for memory in memory_layers(loaded).values():
        for name, tensor in memory.state_dict().items():
            if name == missing:
                assert tensor.unique().numel() > 10
                assert tensor.isfinite().all()
                assert tensor.abs().max() < 2
            else:
                assert torch.equal(tensor, torch.full_like(tensor, 0.125)), name
