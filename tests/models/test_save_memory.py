import copy
import dataclasses
import json
import stat
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import memlayers
from memlayers import MemoryConfig, MemoryLayer, RowAdam, load_memory, save_memory
from memlayers.files import file_sha256, read_sealed
from memlayers.models import MemoryPlacement, add_memory, causal_lm, freeze_base, memory_layers
from memlayers.models import storage as storage_module
from memlayers.models.wrappers import find_wrappers

IDS = torch.arange(24).view(2, 12)
FILES = {"README.md", "config.json", "memory.safetensors", "memory_config.json", "modeling_memlayers.py"}

# peft asks models for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return [*opened.keys()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.third(self.second(self.first(x)))


@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_only_what_was_added_is_saved(plain, memory_config, tmp_path, mode):
    base = set(plain.state_dict())
    model = add_memory(plain, memory_config, [2, 3], mode=mode, share_values=True)
    save_memory(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    state = {
        name: tensor for name, tensor in model.state_dict().items() if ".memory." in name or name.endswith(".gate")
    }
    assert sum(name.endswith(".mlp.gate") for name in state) == (2 if mode == "parallel" else 0)
    stored = load_file(tmp_path / "memory.safetensors")
    table, again = (name for name in state if name.endswith("values.weight"))
    assert table.replace(".1.", ".2.") == again
    assert set(stored) == set(state) - {again} - base  # the shared table once
    for name, tensor in stored.items():
        assert torch.equal(tensor, model.get_parameter(name) if name in dict(model.named_parameters()) else state[name])


def test_the_description(with_memory, memory_config, family, tmp_path):
    save_memory(with_memory, tmp_path)
    description = read_sealed(tmp_path / "memory_config.json")
    assert description["format"] == 1
    assert description["memlayers"] == memlayers.__version__
    placement = MemoryPlacement.from_dict(description["memory"])
    assert placement == MemoryPlacement(config=memory_config, layers=[2, 3], share_values=True)
    prefix = {"gpt2": "transformer.h", "llama": "model.layers"}[family]
    assert description["names"] == [f"{prefix}.1.mlp", f"{prefix}.2.mlp"]
    assert description["base"]["class_name"] == with_memory.plain_class.__name__
    assert not any(".mlp" in name for name in description["base"]["tensors"] if ".1." in name or ".2." in name)
    weights = tmp_path / "memory.safetensors"
    assert description["files"] == {
        "memory.safetensors": {"size": weights.stat().st_size, "sha256": file_sha256(weights)}
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"memory_{family}"
    assert config["architectures"] == [type(with_memory).__name__]
    assert with_memory.config.architectures != [type(with_memory).__name__]  # the model's own is left alone


def test_a_plain_module_needs_no_model_config(memory_config, tmp_path):
    save_memory(add_memory(Net(), memory_config, ["second"]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"config.json", "modeling_memlayers.py"}
    description = read_sealed(tmp_path / "memory_config.json")
    assert description["names"] == description["memory"]["layers"] == ["second"]
    assert "load_memory(model" in (tmp_path / "README.md").read_text()


def test_weights_are_as_readable_as_the_folder(with_memory, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir(mode=0o750)
    save_memory(with_memory, folder)
    assert stat.S_IMODE((folder / "memory.safetensors").stat().st_mode) == 0o640


@pytest.mark.promise("Saving and loading", "`save_memory(..., max_shard_size=...)`", "supported", "")
@pytest.mark.parametrize("size", [2000, "2KB", "0.002MB"])
def test_shards(with_memory, tmp_path, size):
    save_memory(with_memory, tmp_path / "one")
    whole = load_file(tmp_path / "one" / "memory.safetensors")
    save_memory(with_memory, tmp_path / "many", max_shard_size=size)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [f"memory-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [*read_sealed(tmp_path / "many" / "memory_config.json")["files"]] == [path.name for path in shards]
    held = [load_file(path) for path in shards]
    joined = {name: tensor for shard in held for name, tensor in shard.items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    for shard in held:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 2000
    assert any(len(shard) == 1 and next(iter(shard.values())).nbytes > 2000 for shard in held)


def test_an_earlier_save_goes(with_memory, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_memory(with_memory, tmp_path, max_shard_size=2000)
    save_memory(with_memory, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}


def test_a_whole_model_in_the_folder_of_a_memory_replaces_it(with_memory, tmp_path):
    save_memory(with_memory, tmp_path / "ours", max_shard_size=2000)
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with_memory.save_pretrained(tmp_path / "ours")
    with_memory.save_pretrained(tmp_path / "new")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        *(path.name for path in (tmp_path / "new").iterdir()),
        "notes.txt",
    }
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert torch.equal(loaded(IDS).logits, with_memory(IDS).logits)
    save_memory(with_memory, tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("# My memory")
    with_memory.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "README.md").read_text() == "# My memory"
    assert not (tmp_path / "theirs" / "memory.safetensors").exists()


def test_a_save_that_fails_leaves_the_earlier_one(family, with_memory, tmp_path, monkeypatch):
    save_memory(with_memory, tmp_path)
    before = files_of(tmp_path)
    written = []

    def fail_late(file, tensors):
        if written:
            Path(file).write_bytes(b"half")
            raise OSError("No space left on device")
        written.append(file)
        write_tensors(file, tensors)

    write_tensors = storage_module.write_tensors
    monkeypatch.setattr(storage_module, "write_tensors", fail_late)
    for memory in memory_layers(with_memory).values():
        nn.init.zeros_(memory.keys.weight)
    with pytest.raises(OSError, match="No space left"):
        save_memory(with_memory, tmp_path, max_shard_size=2000)
    assert written
    assert files_of(tmp_path) == before
    with pytest.raises(OSError, match="No space left"):
        save_memory(with_memory, tmp_path / "new", max_shard_size=2000)
    assert files_of(tmp_path / "new") == {}


def base_is_at(model, name_or_path):
    for _, wrapper in find_wrappers(model):
        wrapper.base_identity = dataclasses.replace(wrapper.base_identity, name_or_path=name_or_path)


def test_the_card(with_memory, tmp_path, monkeypatch):
    save_memory(with_memory, tmp_path / "local")
    text = (tmp_path / "local" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: memlayers\ntags:\n")
    assert "| slots of a table | 36 of width 16 |\n| tables | 1, shared |" in text
    base_is_at(with_memory, "some-team/some-model")
    save_memory(with_memory, tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: memlayers\nbase_model: some-team/some-model\ntags:\n")
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in text
    # A folder of ours is none that others have: they bring the base along.
    base_is_at(with_memory, str(tmp_path / "base"))
    save_memory(with_memory, tmp_path / "path")
    text = (tmp_path / "path" / "README.md").read_text()
    assert 'load_memory(model, "path/to/this/folder")' in text
    assert "from_pretrained" not in text
    assert str(tmp_path) not in text


@pytest.mark.promise(
    "Saving and loading", "write or extend the `README.md` of a saved memory", "supported", "the next save keeps it"
)
def test_a_card_that_somebody_wrote_or_extended_stays(with_memory, tmp_path):
    save_memory(with_memory, tmp_path)
    ours = (tmp_path / "README.md").read_text()
    base_is_at(with_memory, "some-team/some-model")
    save_memory(with_memory, tmp_path)
    assert (tmp_path / "README.md").read_text() != ours  # nobody had touched it
    old = "<!-- Written by memlayers. Remove this line, and the next save keeps your changes. -->\n# My memory"
    for text in ("# My memory", f"{ours}\nTrained on letters.", ours.replace("36 of width", "many of width"), old):
        (tmp_path / "README.md").write_text(text)
        save_memory(with_memory, tmp_path)
        assert (tmp_path / "README.md").read_text() == text


def test_a_base_that_was_trained_along_is_refused(with_memory, tmp_path):
    optimizer = torch.optim.SGD(with_memory.parameters(), lr=0.1)
    with_memory.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"\d+ of \d+ tensors of it have changed .* save_pretrained, or freeze it"):
        save_memory(with_memory, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_running_statistics_of_a_frozen_base(memory_config, tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.BatchNorm1d(16))
    model = freeze_base(add_memory(net, memory_config, ["2"], mode="parallel")).train()
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    model(torch.randn(8, 16))
    save_memory(model, tmp_path / "kept")
    model.train()(torch.randn(8, 16))
    match = (
        r"6 of 14 tensors .* running statistics move in train\(\), frozen or not; put 1, 3 in eval\(\) before training"
    )
    with pytest.raises(ValueError, match=match) as refusal:
        save_memory(model, tmp_path / "saved")
    assert "freeze it" not in str(refusal.value)
    assert not (tmp_path / "saved").exists()
    model[0].weight.data += 1.0
    with pytest.raises(ValueError, match="7 of 14 tensors .* save_pretrained, or freeze it"):
        save_memory(model, tmp_path / "saved")


def train_new_rows(model):
    model.get_input_embeddings().weight.data[-8:] += 0.1


def move_a_gain(model):
    next(p for name, p in model.named_parameters() if "norm" in name or "ln" in name).data += 0.001


def move_one_value(model):
    model.get_input_embeddings().weight.data[3, 5] += 1e-6


@pytest.mark.promise(
    "Saving and loading", "`save_memory` where a single value of the base was trained", "refused",
    "save the whole model with `save_pretrained`, or freeze the base",
)  # fmt: skip
@pytest.mark.parametrize("change", [train_new_rows, move_a_gain, move_one_value])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_base_of_which_little_was_trained_is_refused_too(plain, memory_config, tmp_path, change, loaded):
    model = add_memory(copy.deepcopy(plain), memory_config, [2], mode="parallel")
    save_memory(model, tmp_path)
    if loaded:
        model = load_memory(plain, tmp_path)
        save_memory(model, tmp_path)
    change(model)
    with pytest.raises(ValueError, match=r"[12] of \d+ tensors of it have changed .* save_pretrained, or"):
        save_memory(model, tmp_path)


def test_blocks_that_were_added_are_refused_with_both_numbers(plain, memory_config, tmp_path):
    plain.save_pretrained(tmp_path / "base")
    model = add_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), memory_config, [2])
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks.append(copy.deepcopy(blocks[3]))
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"as many blocks as its base '.*base', 4, got 5.*save_pretrained"):
        save_memory(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    # A base that is loaded without its last blocks is so again.
    model = add_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base", num_hidden_layers=3), memory_config, [2])
    save_memory(model, tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits, model(IDS).logits)


@pytest.mark.promise(
    "Saving and loading", "resize the embeddings of a base and `save_memory`", "refused",
    "save the whole model, or save the resized base first and load it from there",
)  # fmt: skip
def test_resized_embeddings_are_refused_with_both_sizes(plain, memory_config, tmp_path):
    plain.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = add_memory(base, memory_config, [2])
    model.resize_token_embeddings(48, mean_resizing=False)
    with pytest.raises(ValueError, match=r"weight' of shape \[48, 16\], was \[40, 16\]"):
        save_memory(model, tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(48, mean_resizing=False)
    model = add_memory(base, memory_config, [2])
    with pytest.raises(
        ValueError, match=r"as many embeddings as its base '.*base', 40, got 48.*save_pretrained"
    ) as told:
        save_memory(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    # As told.
    model.save_pretrained(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert "save the resized base first, load it from there" in str(told.value)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(48, mean_resizing=False)
    base.save_pretrained(tmp_path / "resized")
    model = add_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "resized"), memory_config, [2])
    save_memory(model, tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits, model(IDS).logits)
    # Another base in its place since.
    plain.save_pretrained(tmp_path / "resized")
    with pytest.raises(ValueError, match="must have the 48 embeddings of the one that this memory .* got 40; build"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_trained_memories_on_a_frozen_base_are_saved(plain, memory_config, tmp_path, mode):
    plain.requires_grad_(False)
    model = add_memory(plain, memory_config, [3], mode=mode)
    optimizer = RowAdam(model, lr=0.01)
    optimizer_dense = torch.optim.SGD([p for p in model.parameters() if p.requires_grad and p.numel() > 1], lr=0.1)
    for _ in range(2):  # the first moves the gate off zero
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer_dense.step()
    save_memory(model, tmp_path)
    assert not any("row_mark" in name for name in names_in(tmp_path / "memory.safetensors"))
    (memory,) = memory_layers(model).values()
    stored = load_file(tmp_path / "memory.safetensors")
    assert any(torch.equal(tensor, memory.values.weight) for tensor in stored.values())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_are_no_training(with_memory, tmp_path, cast):
    save_memory(with_memory.to(cast), tmp_path)
    assert read_sealed(tmp_path / "memory_config.json")["base"]["dtype"] == "float32"


def test_adapters_of_the_base_are_left_out(with_memory, tmp_path):
    peft = pytest.importorskip("peft")
    target = ["c_attn"] if with_memory.config.model_type == "memory_gpt2" else ["q_proj"]
    is_gpt2 = with_memory.config.model_type == "memory_gpt2"
    config = peft.LoraConfig(target_modules=target, fan_in_fan_out=is_gpt2, init_lora_weights=False)
    save_memory(with_memory, tmp_path / "alone")
    wrapped = peft.get_peft_model(with_memory, config)
    save_memory(wrapped, tmp_path / "wrapped")
    save_memory(torch.compile(wrapped), tmp_path / "compiled")
    for name in ("memory.safetensors", "memory_config.json"):
        alone = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "wrapped" / name).read_bytes() == alone
        assert (tmp_path / "compiled" / name).read_bytes() == alone


def test_adapters_in_a_memory_are_refused(plain, memory_config, tmp_path):
    peft = pytest.importorskip("peft")
    model = add_memory(plain, memory_config, [2])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*memory\.query\.projections\.0"))
    with pytest.raises(ValueError, match=r"mlp.memory must hold what a new MemoryLayer holds, .* merge or unload"):
        save_memory(wrapped, tmp_path / "saved")
    model = add_memory(causal_lm("gpt2", vocab_size=40, layers=4, dim=16, heads=2, context=32), memory_config, [2])
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["memory"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"a MemoryLayer at transformer.h.1.mlp.memory, got a ModulesToSaveWrapper"):
        save_memory(peft.get_peft_model(model, config), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_refused(plain, with_memory, memory_config, tmp_path):
    with pytest.raises(ValueError, match="model must have memories that add_memory put there, got a Net without"):
        save_memory(Net(), tmp_path / "saved")
    for size in (0, -1, True, 1.5, "5", "GB", "-1GB", "5 apples", None):
        with pytest.raises(ValueError, match="max_shard_size must be a number of bytes"):
            save_memory(with_memory, tmp_path / "saved", max_shard_size=size)
    net = add_memory(Net(), memory_config, ["first", "second", "third"])
    net.third.memory.values = net.first.memory.values
    with pytest.raises(ValueError, match="share one table or none, got 2 for 3"):
        save_memory(net, tmp_path / "saved")
    net = add_memory(Net(), memory_config, ["first"], mode="parallel")
    with pytest.raises(ValueError, match=r"the one that add_memory was given, got a Sequential .*: it is model\.1\.0$"):
        save_memory(nn.Sequential(nn.ReLU(), nn.Sequential(net)), tmp_path / "saved")
    net = add_memory(nn.Sequential(nn.Linear(16, 16), Net()), memory_config, ["1.first"], mode="parallel")
    with pytest.raises(ValueError, match=r"that add_memory was given, got a Net, its part 1: save the whole one$"):
        save_memory(net[1], tmp_path / "saved")
    cpu_offload(net[1].first, execution_device="cpu")
    with pytest.raises(ValueError, match=r"on the meta device: load it without offloading \(device_map='cpu'\), or"):
        save_memory(net, tmp_path / "saved")
    net = add_memory(Net(), memory_config, ["first", "second", "third"])
    net.second.memory = MemoryLayer(MemoryConfig(dim=16, heads=1, topk=3, num_subkeys=6, query_dim=8))
    with pytest.raises(ValueError, match="one kind, configuration and mode, .* got another one at second"):
        save_memory(net, tmp_path / "saved")
    with_memory.save_pretrained(tmp_path / "whole")
    before = files_of(tmp_path / "whole")
    with pytest.raises(ValueError, match="folder must not hold a whole model"):
        save_memory(with_memory, tmp_path / "whole")
    assert files_of(tmp_path / "whole") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be none or a folder, got the file"):
        save_memory(with_memory, tmp_path / "file")
    assert not (tmp_path / "saved").exists()


def test_a_kind_that_holds_loose_tensors_is_refused(memory_config, tmp_path):
    class Loose(MemoryLayer):
        def __init__(self, config, **where):
            super().__init__(config, **where)
            self.scale = torch.ones(3, device=where.get("device"))

    model = add_memory(Net(), memory_config, ["second"], kind=Loose)
    with pytest.raises(ValueError, match="Loose with the tensor 'scale' in its Loose: use register_buffer"):
        save_memory(model, tmp_path / "saved")


def test_a_memory_of_a_model_that_was_loaded_whole(with_memory, family, tmp_path):
    # Where its base came from is not known any more; what it is, is.
    base = causal_lm(family, vocab_size=40, layers=4, dim=16, heads=2, context=32)
    base.load_state_dict({k: v for k, v in with_memory.state_dict().items() if "mlp.memory" not in k}, strict=False)
    with_memory.save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    save_memory(model, tmp_path / "memory")
    assert read_sealed(tmp_path / "memory" / "memory_config.json")["base"]["name_or_path"] == ""
    load_memory(base, tmp_path / "memory")
    with torch.no_grad():
        assert torch.equal(base.eval()(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="must have a name_or_path .* build the base, .* call load_memory"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
