import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus, load_memory, save_memory
from memlayers.files import file_sha256, read_sealed, write_sealed
from memlayers.models import MemoryGPT2LMHeadModel, add_memory, causal_lm, memory_alone, memory_layers, remove_memory
from memlayers.models import storage as storage_module

IDS = torch.arange(24).view(2, 12)
# peft asks models for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def base_model(family="gpt2", seed=0, **sizes):
    torch.manual_seed(seed)
    return causal_lm(family, **{"vocab_size": 40, "layers": 4, "dim": 16, "heads": 2, "context": 32, **sizes}).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def shake(model):
    """Every weight of a memory, every statistic and gate is another one than at the start."""
    added = [model.get_submodule(name.rpartition(".")[0]) for name in memory_layers(model)]
    with torch.no_grad():
        for wrapper in added:
            # But for the companion of a table, which is always zero and in no file.
            tensors = [p for name, p in wrapper.memory.named_parameters() if not name.endswith("row_mark")]
            tensors += wrapper.memory.buffers()
            for tensor in [*tensors, wrapper.gate] if wrapper.mode == "parallel" else tensors:
                tensor.uniform_(0.1, 0.9)
    return model


def saved(folder, model, memory_config, layers=(2, 3), **options):
    """A model with memories in it, which are saved in `folder`."""
    model = shake(add_memory(model, memory_config, list(layers), **options))
    save_memory(model, folder, max_shard_size=2000)
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.second(self.first(x))


class Scaled(MemoryLayer):
    """With a buffer that is in no state_dict and a parameter in two places."""

    def __init__(self, config, *, values=None, device=None, dtype=None):
        super().__init__(config, values=values, device=device, dtype=dtype)
        self.register_buffer("scale", torch.full((), 3.0, device=device, dtype=dtype), persistent=False)
        self.mixing = nn.Linear(config.dim, config.dim, device=device, dtype=dtype)
        self.again = nn.Linear(config.dim, config.dim, device=device, dtype=dtype)
        self.again.weight = self.mixing.weight

    def combine(self, y_TV, x_TD):
        return self.again(self.mixing(self.output(y_TV))) * self.scale


@pytest.mark.promise(
    "Saving and loading", "`save_memory`, then `load_memory` into the base", "supported", "the same logits, bit for bit"
)
@pytest.mark.parametrize("share_values", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("mode", ["replace", "parallel"])
@pytest.mark.parametrize("kind", [MemoryLayer, MemoryPlus, Experts, Scaled])
def test_the_same_logits_come_back(family, memory_config, tmp_path, mode, kind, share_values):
    model = saved(tmp_path, base_model(family), memory_config, mode=mode, kind=kind, share_values=share_values)
    base = base_model(family)
    before = logits(base)
    loaded = load_memory(base, tmp_path)
    assert loaded is base
    assert type(loaded) is type(model)
    assert loaded.config.placement == model.config.placement
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(loaded), logits(model))
    for theirs, ours in ((model.named_parameters(), loaded.named_parameters()),
                         (model.named_buffers(), loaded.named_buffers())):  # fmt: skip
        theirs, ours = dict(theirs), dict(ours)
        assert [*ours] == [*theirs]
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.dtype == theirs[name].dtype
            assert tensor.requires_grad is theirs[name].requires_grad
    first, second = memory_layers(loaded).values()
    assert (first.values is second.values) is share_values
    # Trained, saved whole and removed as any other.
    loaded.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for memory in (first, second) for p in memory.parameters())
    if kind is MemoryLayer:
        loaded.save_pretrained(tmp_path / "whole")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(loaded.eval()))
    if mode == "parallel":
        assert torch.equal(logits(remove_memory(loaded).eval()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_16_bit_models(family, memory_config, tmp_path, dtype, mode):
    model = saved(tmp_path / "narrow", base_model(family).to(dtype), memory_config, mode=mode)
    loaded = load_memory(base_model(family).to(dtype), tmp_path / "narrow")
    wide = (
        ("running_", ".memory.", ".mlp.gate.") if dtype == torch.float16 else ("running_",)
    )  # beside float16: float32
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if any(part in f"{name}." for part in wide) else dtype)
        assert torch.equal(tensor, model.state_dict()[name])
    assert torch.equal(logits(loaded), logits(model))
    # Memories take the precision of the model that they come into.
    model = saved(tmp_path / "wide", base_model(family), memory_config, mode=mode)
    loaded = load_memory(base_model(family).to(dtype), tmp_path / "wide")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if any(part in f"{name}." for part in wide) else dtype)
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))


@pytest.mark.promise(
    "Saving and loading",
    "memories in an `nn.Module` that is not of transformers",
    "supported",
    "`save_memory`, `load_memory`; modules by name",
)
def test_a_plain_module(memory_config, tmp_path):
    x, net = torch.randn(3, 5, 16), Net()
    state = net.state_dict()
    model = shake(add_memory(net, memory_config, ["second"], mode="parallel")).eval()
    save_memory(model, tmp_path)
    base = Net().eval()
    with pytest.raises(ValueError, match="4 of 4 tensors differ, the first is 'first.weight'"):
        load_memory(base, tmp_path)
    base.load_state_dict(state)
    load_memory(base, tmp_path)
    assert type(base) is Net
    with torch.no_grad():
        assert torch.equal(base(x), model(x))


def test_compiled_models(memory_config, tmp_path):
    model = saved(tmp_path, base_model("llama"), memory_config)
    base = base_model("llama")
    compiled = torch.compile(base)
    assert load_memory(compiled, tmp_path) is compiled
    assert torch.equal(logits(base), logits(model))
    # A compiled block, on either side; names in files are those of the base.
    base = base_model("llama")
    base.model.layers[1] = torch.compile(base.model.layers[1])
    save_memory(load_memory(base, tmp_path), tmp_path / "again")
    assert torch.equal(logits(load_memory(base_model("llama"), tmp_path / "again")), logits(model))
    named = base_model("llama")
    named.model.layers[1] = torch.compile(named.model.layers[1])
    shake(add_memory(named, memory_config, [r"model\.layers\.1\._orig_mod\.mlp"]))
    save_memory(named, tmp_path / "named")
    assert read_sealed(tmp_path / "named" / "memory_config.json")["names"] == ["model.layers.1.mlp"]
    loaded = load_memory(base_model("llama"), tmp_path / "named")
    for name, tensor in named.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name.replace("_orig_mod.", "")])


def test_adapters_around_the_base(family, memory_config, tmp_path):
    peft = pytest.importorskip("peft")
    model = saved(tmp_path / "memory", base_model(family), memory_config, mode="parallel")
    target = {"gpt2": "c_attn", "llama": "q_proj"}[family]
    lora = peft.LoraConfig(target_modules=[target], fan_in_fan_out=family == "gpt2", init_lora_weights=False)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, lora).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    save_memory(wrapped, tmp_path / "memory")
    expected = logits(wrapped)
    fresh = base_model(family)
    torch.manual_seed(1)
    fresh = peft.get_peft_model(fresh, lora).eval()  # the adapter first, then the memory
    assert torch.equal(logits(load_memory(fresh, tmp_path / "memory")), expected)
    both = load_memory(base_model(family), tmp_path / "memory")
    both = peft.PeftModel.from_pretrained(both, tmp_path / "adapter").eval()
    assert torch.equal(logits(both), expected)


@pytest.mark.promise(
    "Saving and loading",
    "`from_pretrained` of a folder with a memory alone",
    "supported",
    "the base comes from where it was loaded",
)
@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_base_and_memory_at_once(family, memory_config, tmp_path, mode, caplog):
    base_model(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = saved(tmp_path / "memory", base, memory_config, mode=mode)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory"),
        type(model).from_pretrained(tmp_path / "memory"),
        AutoModelForCausalLM.from_pretrained(str(tmp_path), subfolder="memory"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory", output_loading_info=True)[0],
    ):
        assert type(loaded) is type(model)
        assert not loaded.training
        assert torch.equal(logits(loaded), logits(model))
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager", "use_cache": False}
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory", **options),
        type(model).from_pretrained(tmp_path / "memory", **options),
    ):
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert loaded.config._attn_implementation == "eager"
        assert loaded.config.use_cache is False
    save_memory(loaded, tmp_path / "again")
    assert read_sealed(tmp_path / "again" / "memory_config.json")["base"]["name_or_path"] == str(tmp_path / "base")
    assert not caplog.records
    base_model(family, seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="tensors differ, the first is"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base '.*base', which this memory was added to, cannot be loaded: .* build"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory")


def test_another_head_than_that_of_the_base_is_told_the_way(family, memory_config, tmp_path):
    base_model(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = saved(tmp_path / "memory", base, memory_config)
    with pytest.raises(ValueError, match="to a (GPT2LMHeadModel|LlamaForCausalLM), not to a .*Model: load it with"):
        AutoModel.from_pretrained(tmp_path / "memory")
    AutoModelForCausalLM.from_pretrained(tmp_path / "memory").save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path / "whole").eval()(IDS).last_hidden_state
        assert torch.equal(hidden, model.base_model(IDS).last_hidden_state)


def test_what_is_trained_on_base_and_memory_names_both(memory_config, tmp_path):
    peft = pytest.importorskip("peft")
    base_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    saved(tmp_path / "memory", base, memory_config, mode="parallel")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert loaded.name_or_path == loaded.config._name_or_path == str(tmp_path / "memory")
    inner = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="memory")
    assert inner.name_or_path == str(tmp_path / "memory")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(loaded, lora).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert len(memory_layers(again)) == 2
    assert torch.equal(logits(again), logits(wrapped))
    # The memory's own base is the one that it was added to.
    save_memory(wrapped, tmp_path / "again")
    assert read_sealed(tmp_path / "again" / "memory_config.json")["base"]["name_or_path"] == str(tmp_path / "base")
    plain = remove_memory(wrapped.unload())
    assert plain.name_or_path == plain.config._name_or_path == str(tmp_path / "base")


def test_a_whole_model_without_its_memories_is_no_base_that_has_a_name(memory_config, tmp_path):
    model = shake(add_memory(base_model(), memory_config, [2], mode="parallel"))
    model.save_pretrained(tmp_path / "whole")
    plain = remove_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    assert plain.name_or_path == plain.config._name_or_path == ""
    save_memory(add_memory(plain, memory_config, [3], mode="parallel"), tmp_path / "memory")
    assert read_sealed(tmp_path / "memory" / "memory_config.json")["base"]["name_or_path"] == ""


def test_a_folder_whose_description_is_damaged_or_lost(memory_config, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    saved(tmp_path / "memory", base, memory_config)
    config = tmp_path / "memory" / "memory_config.json"
    content = config.read_text()
    for damaged in (content[:100], content.replace('"base"', '"bass"', 1), "[]"):
        config.write_text(damaged)
        with pytest.raises(ValueError, match="memory_config.json is damaged: it is not what was written"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    config.unlink()
    with pytest.raises(ValueError, match="must hold a memory .* without memory_config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    config.write_text(content[:100])
    for file in (tmp_path / "memory").glob("memory*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="memory_config.json is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    # A whole model does not need it: config.json has the same section.
    model = add_memory(base_model(), memory_config, [2])
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "memory_config.json").write_text("{")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(model))


def test_options_that_evaluation_programs_pass(memory_config, tmp_path):
    base_model().bfloat16().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = saved(tmp_path / "memory", base, memory_config)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "memory"), revision="main", subfolder="", dtype="auto", device_map={"": "cpu"},
        quantization_config=None, gguf_file=None, trust_remote_code=True,
    )  # fmt: skip
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))


def test_the_page_about_it_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "how-to" / "save-and-load.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, page.name, "exec"), names)
    assert type(names["model"]) is MemoryGPT2LMHeadModel
    for file in (tmp_path / "facts").iterdir():
        assert f"`{file.name}`" in page.read_text()


@pytest.mark.promise("Saving and loading", "`load_memory` of a repository of the Hub", "supported", "")
def test_a_repository_of_the_hub(memory_config, tmp_path, monkeypatch):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = saved(tmp_path / "memory", base, memory_config)
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        if name != "some-team/memory":
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it")
        return str(tmp_path / "memory")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_memory(base_model(), "some-team/memory")), logits(model))
    assert asked == [("some-team/memory", {"allow_patterns": ["memory_config.json", "memory*.safetensors"]})]
    with pytest.raises(ValueError, match="got 'some-team/other': .* from the Hub comes LocalEntry.* cannot find it"):
        load_memory(base_model(), "some-team/other")
    with pytest.raises(ValueError, match="got 'no/such/folder', which is nothing"):
        load_memory(base_model(), "no/such/folder")
    assert len(asked) == 2

    def cached_file(name, file, **options):
        asked.append((name, options))
        return str(tmp_path / "memory" / file) if name == "some-team/memory" else None

    monkeypatch.setattr(memory_alone, "cached_file", cached_file)
    monkeypatch.setattr("memlayers.models.classes.maybe_load_adapters", lambda name, hub, **rest: (None, name, rest))
    kind = type(model)
    loaded = kind.from_pretrained("some-team/memory", revision="v2")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.name_or_path == "some-team/memory"
    assert asked[-2][1]["revision"] == asked[-1][1]["revision"] == "v2"


def test_memories_take_device_and_mode_of_their_module(memory_config, tmp_path):
    saved(tmp_path, base_model(), memory_config)
    base = base_model().train()
    base.transformer.h[1].mlp.eval()
    first, second = memory_layers(load_memory(base, tmp_path)).values()
    assert not first.training
    assert second.training
    with torch.device("meta"):
        nowhere = GPT2LMHeadModel(base_model().config)
    with pytest.raises(ValueError, match="model must hold its weights, got transformer.h.1.mlp on the meta device"):
        load_memory(nowhere, tmp_path)


# What is refused. The model is always left as it was.


@pytest.fixture
def folder(memory_config, tmp_path):
    saved(tmp_path / "memory", base_model(), memory_config, mode="parallel")
    return tmp_path / "memory"


def refused(folder, match, model=None, **options):
    model = base_model() if model is None else model
    kind, config, state, modules = type(model), model.config, {}, [name for name, _ in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        load_memory(model, folder, **options)
    assert type(model) is kind
    assert model.config is config
    assert set(vars(model)) == attributes
    assert [name for name, _ in model.named_modules()] == modules
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def rewrite(folder, **changes):
    description = read_sealed(folder / "memory_config.json")
    write_sealed(folder / "memory_config.json", {**description, **changes})


def rewrite_tensors(folder, change):
    """Other tensors in the last file, under a description that says so."""
    file = sorted(folder.glob("memory*.safetensors"))[-1]
    tensors = change(load_file(file))
    save_file(tensors, file)
    files = read_sealed(folder / "memory_config.json")["files"]
    files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    rewrite(folder, files=files)


def test_folders_that_are_no_memory(folder, memory_config, tmp_path):
    refused(
        tmp_path / "nothing", "folder must be a folder or a repository of the Hub, got '.*nothing', which is nothing"
    )
    refused(folder / "config.json", "got '.*config.json', which is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "got '.*empty' without memory_config.json$")
    base_model().save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", "without memory_config.json; it holds a whole model: use from_pretrained")
    add_memory(base_model(), memory_config, [2]).save_pretrained(tmp_path / "whole")
    refused(tmp_path / "whole", "with a whole model that save_pretrained wrote: use from_pretrained")


def test_descriptions(folder):
    description = read_sealed(folder / "memory_config.json")
    rewrite(folder, format=2)
    refused(folder, r"format of .*memory_config.json must be 1, got 2 of memlayers .*: a newer memlayers can load it")
    rewrite(folder, format=1, memory={**description["memory"], "kind": "Unheard"})
    refused(folder, "got 'Unheard'; known: .* import the module that defines it first")
    rewrite(folder, memory={**description["memory"], "mode": "beside"})
    refused(folder, "mode must be one of 'replace', 'parallel', got 'beside'")
    rewrite(folder, memory=description["memory"], files={"../model.bin": {"size": 1, "sha256": ""}})
    refused(folder, "must be named memory.*safetensors, got '../model.bin'")
    del description["names"]
    write_sealed(folder / "memory_config.json", description)
    refused(folder, "must have the keys .* names is missing")
    text = (folder / "memory_config.json").read_text()
    (folder / "memory_config.json").write_text(text.replace('"heads": 2', '"heads": 1'))
    refused(folder, "memory_config.json is damaged")
    (folder / "memory_config.json").write_text(json.dumps(description))
    refused(folder, "memory_config.json is damaged")


def test_files(folder):
    file = sorted(folder.glob("memory-*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(folder, f"{file.name} is damaged: it has {len(content) - 1} bytes, {len(content)} were written")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(folder, f"{file.name} is damaged: it is not what was written")
    file.unlink()
    refused(folder, f"{file.name} is damaged: it is missing")
    file.write_bytes(content)
    load_memory(base_model(), folder)


def test_tensors(folder):
    (name, *_) = load_file(sorted(folder.glob("memory*.safetensors"))[-1])
    rewrite_tensors(folder, lambda tensors: {**tensors, "more": torch.ones(1)})
    refused(folder, "must have the tensors of the memory alone, got 'more'")
    rewrite_tensors(folder, lambda tensors: {key: t for key, t in tensors.items() if key not in ("more", name)})
    refused(folder, f"must have .* tensors, {name!r} is missing")
    rewrite_tensors(folder, lambda tensors: {**tensors, name: torch.ones(2, 2, 2)})
    refused(folder, rf"{name!r} in .* must be of shape .*, got \[2, 2, 2\]")
    sorted(folder.glob("memory*.safetensors"))[-1].write_bytes(b"no tensors")
    file = sorted(folder.glob("memory*.safetensors"))[-1]
    files = read_sealed(folder / "memory_config.json")["files"]
    rewrite(folder, files={**files, file.name: {"size": 10, "sha256": file_sha256(file)}})
    refused(folder, f"{file.name} must be a file of safetensors")


@pytest.mark.promise(
    "Saving and loading",
    "`load_memory` into another base",
    "refused",
    "the base that it was saved with, or `check_base=False`",
)
def test_bases(folder, memory_config, tmp_path):
    refused(folder, r"\d+ of \d+ tensors differ, the first is 'transformer.wte.weight'", base_model(seed=1))
    refused(folder, "config.dim must be 32, the hidden size", base_model(dim=32), check_base=False)
    refused(folder, r"layers must be within 1\.\.2", base_model(layers=2), check_base=False)
    refused(folder, r"feed-forward networks at transformer.h.1.mlp, .* got \['model.layers.1.mlp'", base_model("llama"))
    refused(folder, "tensors differ, the first is 'transformer.wte.weight'", base_model(vocab_size=41))
    model = load_memory(base_model(), folder)
    refused(folder, "model must have no memory 'default' yet, got one with transformer.h.1.mlp.memory", model)
    other = load_memory(base_model(vocab_size=41), folder, check_base=False)
    assert torch.equal(memory_layers(other)["transformer.h.1.mlp.memory"].values.weight,
                       memory_layers(model)["transformer.h.1.mlp.memory"].values.weight)  # fmt: skip
    # One tensor is enough, in any block; that of a replaced module is not needed.
    changed = base_model()
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_fc.weight += 0.01
    refused(folder, "1 of .* tensors differ, the first is 'transformer.h.1.mlp.c_fc.weight'", changed)
    saved(tmp_path / "replaced", base_model(), memory_config)
    load_memory(changed, tmp_path / "replaced")


def test_other_names_of_one_base_are_told_only_where_it_differs(memory_config, tmp_path):
    for name, seed in (("first", 0), ("copy", 0), ("tuned", 1)):
        base_model("llama", seed).save_pretrained(tmp_path / name)
    first, copy, tuned = (
        LlamaForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("first", "copy", "tuned")
    )
    model = saved(tmp_path / "memory", first, memory_config)
    assert torch.equal(logits(load_memory(copy, tmp_path / "memory")), logits(model))
    match = r"was trained with, .*first \(LlamaForCausalLM in float32\); got .*tuned \(LlamaForCausalLM in float32\)"
    refused(tmp_path / "memory", match, tuned)


def test_a_failure_on_the_way_leaves_the_model(folder, monkeypatch):
    calls = []

    def fail_late(*args):
        calls.append(args)
        if len(calls) > 3:
            raise ValueError("the disk is gone")
        return fill(*args)

    fill = storage_module._fill
    monkeypatch.setattr(storage_module, "_fill", fail_late)
    refused(folder, "the disk is gone")
    assert len(calls) == 4
    monkeypatch.undo()
    assert type(load_memory(base_model(), folder)) is MemoryGPT2LMHeadModel


ELSEWHERE = """
import sys
import torch
from torch import nn
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert not any(name.startswith("memlayers") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/memory", trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(24).view(2, 12)).logits, sys.argv[1] + "/logits.pt")

from memlayers import MemoryConfig, add_memory, load_memory, save_memory

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def peak_over(baseline, work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    work()
    return status("VmHWM") - baseline

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))

config = MemoryConfig(dim=48, heads=1, topk=4, num_subkeys=1024, query_dim=8, query_norm="none")
folder, table = sys.argv[1] + "/large", 1024**2 * 48 * 4
model = net()
print(peak_over(status("VmRSS"), lambda: add_memory(model, config, ["1"])) / table)
print(peak_over(status("VmRSS"), lambda: save_memory(model, folder)) / table)
del model
base = net()
print(peak_over(status("VmRSS"), lambda: load_memory(base, folder)) / table)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_another_process_loads_without_memlayers_and_holds_no_table_twice(memory_config, tmp_path):
    # Two tests in one, as importing takes seconds.
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = saved(tmp_path / "memory", base, memory_config, mode="parallel")
    source = Path(sys.modules["memlayers"].__file__).parents[1]
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "cache"),  # the module of auto_map is copied there
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(model))
    made, saving, loading = map(float, done.stdout.split())
    assert 0.9 < made < 1.4  # the scale that the others are read on
    assert saving < 0.4
    assert 0.9 < loading < 1.4


def test_tables_are_read_in_pieces(memory_config, tmp_path, monkeypatch):
    model = saved(tmp_path, base_model(), memory_config)
    for chunk in (1, 200, 10_000):
        monkeypatch.setattr(storage_module, "CHUNK", chunk)
        assert torch.equal(logits(load_memory(base_model(), tmp_path)), logits(model))


def test_memories_of_another_width_than_the_model(tmp_path):
    config = MemoryConfig(dim=16, value_dim=5, heads=1, topk=3, num_subkeys=6, query_dim=8, query_norm="rms")
    model = saved(tmp_path, base_model(), config, layers=[2], mode="parallel")
    assert any(re.search("output.weight", name) for name in model.state_dict())
    assert torch.equal(logits(load_memory(base_model(), tmp_path)), logits(model))
