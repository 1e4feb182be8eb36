import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForSequenceClassification,
)

from memlayers import MemoryLayer
from memlayers.explorer import grow_table
from memlayers.models import (
    MemoryGPT2Config,
    MemoryGPT2LMHeadModel,
    MemoryLlamaConfig,
    MemoryLlamaForCausalLM,
    MemoryPlacement,
    add_memory,
    causal_lm,
    memory_layers,
    quantize_memory,
    remove_memory,
)

FILES = {"config.json", "generation_config.json", "memory_config.json", "model.safetensors", "modeling_memlayers.py"}
IDS = torch.arange(24).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def stored_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return [*file.keys()]


def tables(model):
    return [memory.values for memory in memory_layers(model).values()]


@pytest.mark.parametrize("load", ["auto", "class"])
@pytest.mark.parametrize("share_values", [True, False])
def test_the_same_logits_come_back(plain, memory_config, tmp_path, load, share_values):
    model = add_memory(plain, memory_config, [1, 3], share_values=share_values)
    model.train()(IDS, labels=IDS).loss.backward()  # moves the running statistics
    model.save_pretrained(tmp_path)
    loaded = (AutoModelForCausalLM if load == "auto" else type(model)).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded.config) is type(model.config)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.placement == MemoryPlacement(config=memory_config, layers=[1, 3], share_values=share_values)
    assert memory_layers(loaded).keys() == memory_layers(model).keys()
    assert (tables(loaded)[0] is tables(loaded)[1]) is share_values


@pytest.mark.promise(
    "Saving and loading", "`grow_table` or `quantize_memory` of a part of a model, which is then saved", "supported", ""
)
@pytest.mark.parametrize("share_values", [True, False])
@pytest.mark.parametrize("change", [grow_table, quantize_memory])
def test_what_became_of_a_part_is_saved(plain, memory_config, tmp_path, share_values, change):
    config = dataclasses.replace(memory_config, heads=2, topk=2, num_subkeys=16)
    model = add_memory(plain, config, [1, 3], share_values=share_values)
    change(model.base_model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert (tables(loaded)[0] is tables(loaded)[1]) is share_values
    assert [type(table) for table in tables(loaded)] == [type(table) for table in tables(model)]
    assert loaded.config.placement == model.config.placement


def test_every_parameter_and_buffer_comes_back(with_memory, tmp_path):
    with_memory.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for before, after in (
        (with_memory.named_parameters(), loaded.named_parameters()),
        (with_memory.named_buffers(), loaded.named_buffers()),  # those that are in no file, too
    ):
        before, after = dict(before), dict(after)
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].dtype == after[name].dtype, name
            assert torch.equal(before[name], after[name]), name


def test_what_is_in_the_folder(with_memory, memory_config, tmp_path):
    with_memory.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    config = json.loads((tmp_path / "config.json").read_text())
    section = {
        "config": memory_config.to_dict(), "kind": "MemoryLayer", "layers": [2, 3], "mode": "replace",
        "share_values": True,
    }  # fmt: skip
    assert config["memory"] == json.loads((tmp_path / "memory_config.json").read_text()) == section
    assert config["model_type"] == type(with_memory.config).model_type
    assert config["architectures"] == [type(with_memory).__name__]
    assert config["auto_map"] == {
        "AutoConfig": f"modeling_memlayers.{type(with_memory.config).__name__}",
        "AutoModelForCausalLM": f"modeling_memlayers.{type(with_memory).__name__}",
    }
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.memory == section


def test_a_swapped_ffn_alone_would_come_back_as_plain_gpt2(memory_config, tmp_path):
    # The trap that the registered classes are for; if this fails, transformers has learned to save what it is given.
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=40, n_positions=16)
    swapped = GPT2LMHeadModel(config)
    swapped.transformer.h[1].mlp = MemoryLayer(memory_config)
    swapped.save_pretrained(tmp_path / "swapped")
    assert not memory_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "swapped"))
    add_memory(GPT2LMHeadModel(config), memory_config, [2]).save_pretrained(tmp_path / "added")
    assert memory_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "added"))


@pytest.mark.promise(
    "Saving and loading",
    "blocks that are cut off, copied or moved after `add_memory`",
    "supported",
    "masks and `save_pretrained` follow; set the number of blocks in its configuration, and save the whole model: the "
    "base of `save_memory` would be another one",
)
@pytest.mark.parametrize("share_values", [True, False])
@pytest.mark.parametrize("change", ["cut off", "copied"])
def test_blocks_that_were_cut_off_or_copied_come_back(plain, memory_config, tmp_path, change, share_values):
    model = add_memory(plain, memory_config, [2, 4], mode="parallel", share_values=share_values)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.ones_(parameter)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    if change == "cut off":
        del blocks[0]
    else:
        shared = {id(blocks[1].mlp.memory.values): blocks[1].mlp.memory.values} if share_values else {}
        blocks.insert(2, copy.deepcopy(blocks[1], shared))
    model.config.num_hidden_layers = len(blocks)
    with torch.no_grad():
        expected = model.eval()(IDS, use_cache=False).logits  # a copied block has the cache's place of the first
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert len(set(tables(loaded))) == (1 if share_values else len(memory_layers(model)))


def test_a_model_whose_part_lost_its_memories_is_saved_as_a_plain_one(plain, memory_config, tmp_path):
    expected, kind = logits(plain), type(plain)
    model = add_memory(plain, memory_config, [2], mode="parallel")
    remove_memory(model.base_model)
    with pytest.raises(
        ValueError, match=r"configuration \(layers 2\), got a Memory.* lost them: remove_memory\(model\)"
    ):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    assert type(remove_memory(model)) is kind
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_a_shared_table_is_stored_once_and_stays_one(memory_config, tmp_path, tie_word_embeddings):
    # With untied embeddings, Llama's default, transformers takes no tie of a model at its word.
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip
    model = add_memory(LlamaForCausalLM(config), memory_config, [1, 2, 4], share_values=True)
    declared = {
        **({"lm_head.weight": "model.embed_tokens.weight"} if tie_word_embeddings else {}),
        "model.layers.1.mlp.memory.values.weight": "model.layers.0.mlp.memory.values.weight",
        "model.layers.3.mlp.memory.values.weight": "model.layers.0.mlp.memory.values.weight",
    }
    assert model.all_tied_weights_keys == declared
    model.save_pretrained(tmp_path)
    assert [name for name in stored_names(tmp_path) if "values" in name] == ["model.layers.0.mlp.memory.values.weight"]
    assert ("lm_head.weight" in stored_names(tmp_path)) is not tie_word_embeddings
    for _ in range(2):  # again from the loaded one
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.all_tied_weights_keys == declared
        first, second, third = tables(model)
        assert first is second is third
        assert first.weight is second.weight
        assert not first.weight.is_meta
        before = logits(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)
    model.tie_weights()
    assert tables(model)[0].weight is tables(model)[2].weight
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    assert tables(model)[0].weight.grad.count_nonzero() > 0


def test_a_shared_table_may_stand_under_another_of_its_names(with_memory, tmp_path):
    with_memory.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "values" in name)
    state[name.replace(".1.", ".2.")] = state.pop(name)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(with_memory))


def test_no_name_is_reported_missing_or_unexpected(with_memory, tmp_path, caplog):
    with_memory.save_pretrained(tmp_path)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}
    assert not caplog.records


def test_bfloat16_keeps_the_statistics(with_memory, tmp_path):
    with_memory.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = with_memory.state_dict()
    compared = 0
    for name, tensor in loaded.state_dict().items():
        if "running_" in name:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, before[name])
            compared += 1
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, before[name].bfloat16())
    assert compared == 4


def test_a_bfloat16_model_comes_back_to_the_bit(with_memory, tmp_path):
    with_memory.to(torch.bfloat16)
    with_memory.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = with_memory.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    assert {t.dtype for n, t in before.items() if "running_" in n} == {torch.float32}


def test_a_table_with_a_row_optimizer_is_saved_as_any_other(with_memory, tmp_path):
    with_memory.save_pretrained(tmp_path / "dense")
    owner = torch.nn.Identity()
    tables(with_memory)[0].own(owner)
    with_memory.save_pretrained(tmp_path / "rows")
    assert stored_names(tmp_path / "rows") == stored_names(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "rows")), logits(with_memory))


FRESH = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
torch.set_num_threads(1)
torch.set_grad_enabled(False)  # as the logits that it is compared with: inference has operations of its own
assert not any(name.startswith("memlayers") for name in sys.modules)
for family in ("gpt2", "llama"):
    source, target = f"{sys.argv[1]}/{family}", f"{sys.argv[2]}/{family}"
    if family == "gpt2":
        try:
            AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
        except ValueError as error:
            print(error)
        else:
            raise AssertionError("loaded without the registered classes")
    assert AutoConfig.from_pretrained(source, trust_remote_code=True).placement.layers == (2, 3)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    ids = torch.arange(24).view(2, 12)
    torch.save(model(ids).logits, f"{sys.argv[2]}/{family}.pt")
    model.save_pretrained(target)
    again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    assert torch.equal(again(ids).logits, model(ids).logits)
# memlayers.models is imported by now: no type of its own is strange to the Auto classes any more.
head = AutoModelForSequenceClassification.from_pretrained(f"{sys.argv[1]}/head")
torch.save(head(ids).logits, f"{sys.argv[2]}/head.pt")
"""


@pytest.mark.promise(
    "Heads and classes",
    "load a model of any type in a new process",
    "supported",
    "with `import memlayers.models`, or with `trust_remote_code=True`",
)
def test_a_process_without_memlayers_loads_and_saves_it(memory_config, tmp_path):
    expected = {}
    for family in ("gpt2", "llama"):
        model = causal_lm(family, vocab_size=40, layers=4, dim=16, heads=2, context=32)
        add_memory(model, memory_config, [2, 3], share_values=True).save_pretrained(tmp_path / "first" / family)
        expected[family] = logits(model)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    head = Olmo2ForSequenceClassification(Olmo2Config(vocab_size=40, pad_token_id=0, **sizes))
    add_memory(head, memory_config, [2]).save_pretrained(tmp_path / "first" / "head")
    expected["head"] = logits(head)
    (tmp_path / "second").mkdir()
    source = Path(sys.modules["memlayers"].__file__).parents[1]
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "cache"),  # the module of auto_map is copied there
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", FRESH, str(tmp_path / "first"), str(tmp_path / "second")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "second" / "head.pt", weights_only=True), expected.pop("head"))
    for family, before in expected.items():
        assert {path.name for path in (tmp_path / "second" / family).iterdir()} == FILES
        assert torch.equal(torch.load(tmp_path / "second" / f"{family}.pt", weights_only=True), before)
        for name in ("config.json", "memory_config.json", "modeling_memlayers.py"):
            first, second = (tmp_path / folder / family / name for folder in ("first", "second"))
            assert first.read_text() == second.read_text()
        # Saved by the other process, loaded by this one.
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second" / family)), before)


PLAIN = {"gpt2": (GPT2Config, {"n_embd": 16, "n_head": 2, "n_layer": 3}),
         "llama": (LlamaConfig, {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3})}  # fmt: skip


def test_a_configuration_says_all_that_the_plain_one_says(family, memory_config):
    plain_class, sizes = PLAIN[family]
    memory_class = {"gpt2": MemoryGPT2Config, "llama": MemoryLlamaConfig}[family]
    section = MemoryPlacement(config=memory_config, layers=[2]).to_dict()
    plain, ours = plain_class(**sizes).to_dict(), memory_class(**sizes, memory=section).to_dict()
    assert ours.pop("memory") == section
    assert ours.pop("auto_map")
    assert ours.pop("model_type") == "memory_" + plain.pop("model_type")
    assert ours == plain
    # transformers sets these on construction from the defaults of the class.
    assert memory_class().to_dict()["transformers_version"] == plain["transformers_version"]


def test_configurations_are_checked(family, memory_config):
    _, sizes = PLAIN[family]
    memory_class = {"gpt2": MemoryGPT2Config, "llama": MemoryLlamaConfig}[family]
    with pytest.raises(ValueError, match=r"layers must be within 1\.\.3, .* got 4"):
        memory_class(**sizes, memory=MemoryPlacement(config=memory_config, layers=[4]).to_dict())
    model_class = {"gpt2": MemoryGPT2LMHeadModel, "llama": MemoryLlamaForCausalLM}[family]
    with pytest.raises(ValueError, match="memory must be a dictionary of config, kind, layers, mode, .* got None"):
        model_class(memory_class(**sizes))
    plain_class, _ = PLAIN[family]
    with pytest.raises(ValueError, match="config must be one with the section memory, got a (GPT2|Llama)Config"):
        model_class(plain_class(**sizes))


def test_a_configuration_is_saved_alone_too(with_memory, tmp_path):
    with_memory.config.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "memory_config.json", "modeling_memlayers.py"}
    assert AutoConfig.from_pretrained(tmp_path).placement == with_memory.config.placement
