"""Models with a head on a base model: each class of a family that an Auto class knows is saved and loaded."""

import copy

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto import modeling_auto

import memlayers.models
from memlayers import MemoryConfig
from memlayers.models import add_memory, memory_layers, remove_memory, save_memory
from memlayers.models.wrappers import find_wrappers

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "ffn_dim": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 1}
WIDE_HEADS = {**GROUPED, "head_dim": 8}
FAMILIES = {
    "gpt2": {}, "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED, "qwen3": WIDE_HEADS, "gemma": WIDE_HEADS,
    "gemma2": WIDE_HEADS, "gemma3_text": WIDE_HEADS, "phi": {}, "phi3": GROUPED, "gpt_neox": {}, "opt": {},
    "olmo2": {}, "granite": {}, "bert": {},
}  # fmt: skip
MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
IDS = torch.arange(1, 15).view(2, 7)
BLOCK = r"(.*\.)?(layers|layer|h)\.1"  # the second one, whatever its parts are called


def heads(model_type):
    """Each class of models of this type, and an Auto class that knows it."""
    config_class = CONFIG_MAPPING[model_type]
    found = {}
    for name in vars(modeling_auto):
        # A choice among several texts takes other ids.
        if name.startswith("AutoModel") and name != "AutoModelForMultipleChoice":
            known = getattr(modeling_auto, name)._model_mapping.get(config_class, ())
            for kind in known if isinstance(known, tuple) else (known,):
                if kind.config_class is config_class:
                    found.setdefault(kind, getattr(transformers, name))
    return found


def with_a_memory(kind, layers=BLOCK, **sizes):
    """A model with a memory beside its second block that matters."""
    model = add_memory(kind(kind.config_class(**SIZES, **sizes)).eval(), MEMORY, layers, mode="parallel")
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.uniform_(1.0, 2.0)
    return model


def first_output(model):
    with torch.no_grad():
        return next(value for value in model.eval()(IDS).values() if isinstance(value, torch.Tensor))


@pytest.mark.promise(
    "Heads and classes",
    "save and load a classifier, tagger, reader or any other head of a base model with a memory",
    "supported",
    "by its Auto class, by its own class and with `trust_remote_code=True`",
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_head_comes_back_with_its_one_memory(model_type, tmp_path):
    found = heads(model_type)
    assert len(found) >= 2
    for kind, auto in found.items():
        model = with_a_memory(kind, **FAMILIES[model_type])
        model.save_pretrained(tmp_path / kind.__name__)
        loaded, report = auto.from_pretrained(tmp_path / kind.__name__, output_loading_info=True)
        assert type(loaded) is type(model)
        assert not any(report.values()), report
        assert [*memory_layers(loaded)] == [*memory_layers(model)]
        assert len(memory_layers(loaded)) == 1
        assert torch.equal(first_output(loaded), first_output(model)), kind


def test_a_head_is_loaded_whatever_else_was_asked_for_before(tmp_path):
    # A head has its base model made from the configuration, which then was one with memories of its own.
    model = with_a_memory(transformers.LlamaForSequenceClassification, [2])
    model.save_pretrained(tmp_path)
    assert memlayers.models.MemoryLlamaModel.plain_class is transformers.LlamaModel
    for loaded in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        memlayers.models.MemoryLlamaForSequenceClassification.from_pretrained(tmp_path),
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert [*memory_layers(loaded)] == ["model.layers.1.mlp.memory"]
        assert type(loaded.model) is transformers.LlamaModel
        assert loaded.model.config is loaded.config
        assert torch.equal(first_output(loaded), first_output(model))


@pytest.mark.parametrize("layers", [[2], ["model.layers.1.mlp"]])
def test_another_head_on_a_saved_model_or_none(tmp_path, layers):
    model = with_a_memory(transformers.LlamaForCausalLM, layers)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"score.weight"}
    for name, tensor in memory_layers(loaded).popitem()[1].state_dict().items():
        assert torch.equal(tensor, memory_layers(model).popitem()[1].state_dict()[name])
    headless = AutoModel.from_pretrained(tmp_path)
    assert [*memory_layers(headless)] == ["layers.1.mlp.memory"]
    with torch.no_grad():
        assert torch.equal(first_output(headless), model.model(IDS).last_hidden_state)
    headless.save_pretrained(tmp_path / "headless")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "headless")
    assert [*memory_layers(again)] == [*memory_layers(model)]
    assert torch.equal(first_output(again.model), first_output(headless))


def test_building_one_changes_no_configuration_that_others_have():
    text = copy.deepcopy(with_a_memory(transformers.LlamaForCausalLM, [2]).config)
    before = text.to_dict()
    model = AutoModelForCausalLM.from_config(text)
    assert model.config.to_dict() == before
    assert type(model.config) is type(text)
    assert type(model.model.config) is type(text)


def test_every_type_of_transformers_has_one_with_memories():
    # In a process that only imported memlayers.models; a type that nobody asked for is a stand-in for its class.
    types = [name for name in CONFIG_MAPPING if not name.startswith("memory_")]
    assert len(types) > 300
    assert all(f"memory_{name}" in CONFIG_MAPPING for name in types)
    section = {"config": MEMORY.to_dict(), "kind": "MemoryLayer", "layers": [1], "mode": "replace",
               "share_values": False}  # fmt: skip
    config = AutoConfig.for_model("memory_mpnet", memory=section, hidden_size=16)
    assert type(config).__name__ == "MemoryMPNetConfig"
    assert config.placement.layers == (1,)
    assert CONFIG_MAPPING["memory_mpnet"] is type(config)


def test_buffers_in_no_file_are_filled_as_in_the_plain_class(tmp_path):
    # Falcon-H1 fills buffers of its blocks in the rule that initialises the model, which has no weights of its own.
    sizes = {"num_key_value_heads": 1, "head_dim": 8, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8,
             "mamba_d_state": 8, "mamba_n_groups": 1}  # fmt: skip
    model = with_a_memory(transformers.FalconH1ForCausalLM, **sizes)
    model.save_pretrained(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    assert {name.rpartition(".")[2] for name in loaded} >= {"mup_vector", "running_mean"}
    assert not [name for name, buffer in model.named_buffers() if not torch.equal(loaded[name], buffer)]


def test_the_base_of_a_memory_is_loaded_by_the_names_that_its_file_has(tmp_path):
    # Experts are in the file one by one, and joined on loading by a rule of the base's type.
    kind = transformers.MixtralForCausalLM
    base = kind(kind.config_class(**SIZES, num_key_value_heads=1, num_local_experts=2))
    base.save_pretrained(tmp_path / "base")
    model = add_memory(kind.from_pretrained(tmp_path / "base"), MEMORY, BLOCK, mode="parallel")
    save_memory(model, tmp_path / "memory")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert torch.equal(first_output(loaded), first_output(model))
    assert remove_memory(loaded).config.model_type == "mixtral"


def test_a_model_of_two_models_comes_back(tmp_path):
    parts = {**SIZES, "is_decoder": True, "add_cross_attention": True}
    encoder = transformers.BertModel(transformers.BertConfig(**SIZES))
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**parts))
    both = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model = add_memory(both, MEMORY, r"(encoder|decoder\.bert)\.encoder\.layer\.1", mode="parallel")
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(1.0)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded.config) is type(loaded).config_class
    with torch.no_grad():
        outputs = [each.eval()(IDS, decoder_input_ids=IDS).logits for each in (model, loaded)]
    assert torch.equal(*outputs)
