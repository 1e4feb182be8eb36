"""What a folder may hold that no save has written: each is refused by name, before the model is touched."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memlayers import load_memory, save_memory
from memlayers.files import file_sha256, read_sealed, write_sealed
from memlayers.models import add_memory, causal_lm, memory_layers, remove_memory


def base_model():
    torch.manual_seed(0)
    return causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32).eval()


@pytest.fixture
def folder(memory_config, tmp_path):
    save_memory(add_memory(base_model(), memory_config, [2], mode="parallel"), tmp_path / "memory")
    return tmp_path / "memory"


def refused(folder, match):
    model = base_model()
    with pytest.raises(ValueError, match=match):
        load_memory(model, folder)
    assert not memory_layers(model)


ODD = [None, -1, 10**30, "../x", {"a": [1]}, "missing"]


def fields(content, path=()):
    """Each place in a description, of lists and tables of tensors the first alone."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[: 1 if (path and path[-1] == "tensors") or isinstance(content, list) else None]:
        yield from fields(value, (*path, key))


@pytest.mark.promise(
    "Saving and loading",
    "load a description that was damaged or made up",
    "refused",
    "by the name of its field",
)
def test_any_field_of_a_description_may_be_anything(folder):
    good = read_sealed(folder / "memory_config.json")
    model, tried, messages = base_model(), 0, []
    for path in fields(good):
        for odd in ODD:
            content = copy.deepcopy(good)
            place = content
            for key in path[:-1]:
                place = place[key]
            if odd == "missing":
                del place[path[-1]]
            else:
                place[path[-1]] = odd
            write_sealed(folder / "memory_config.json", content)
            try:
                load_memory(model, folder)
            except ValueError as error:
                messages.append(str(error))
            else:
                remove_memory(model)
            tried += 1
    assert tried > 200
    assert all(messages)
    assert len(messages) > tried // 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "null", "3", '"x"', "", "{}"])
def test_a_description_may_be_any_text(folder, text):
    sealed = '{\n "sha256": "' + "0" * 64 + f'",\n "a": {text}\n}}\n'
    sealed = sealed.replace("0" * 64, hashlib.sha256(sealed.encode()).hexdigest(), 1)
    for written in (text, sealed):
        (folder / "memory_config.json").write_text(written)
        refused(folder, "memory_config.json")
        with pytest.raises(ValueError, match="memory_config.json"):
            AutoModelForCausalLM.from_pretrained(folder)


def spoil(tensors, kind):
    name = next(name for name in tensors if name.endswith("running_var" if kind == "variance" else "keys.weight"))
    change = {
        "integers": lambda t: t.long(),
        "truth values": lambda t: t.bool(),
        "complex": lambda t: t.to(torch.complex64),
        "NaN": lambda t: torch.cat([t.flatten()[:-1], torch.tensor([float("nan")])]).view(t.shape),
        "infinite": lambda t: t / 0.0,
        "variance": lambda t: t - 5.0,
    }[kind]
    return {**tensors, name: change(tensors[name])}


@pytest.mark.promise(
    "Saving and loading",
    "load weights that are integers, truth values, complex, NaN or infinite, or variances below zero",
    "refused",
    "take an earlier save",
)
@pytest.mark.parametrize("kind", ["integers", "truth values", "complex", "NaN", "infinite", "variance"])
def test_weights_that_are_no_numbers(memory_config, tmp_path, kind):
    match = {"NaN": "finite numbers", "infinite": "finite numbers", "variance": "variances of at least 0, got -"}
    match = match.get(kind, "must be of F64, F32, F16, BF16, got (I64|BOOL|C64)")
    model = add_memory(base_model(), memory_config, [2])
    save_memory(model, tmp_path / "memory")
    file = tmp_path / "memory" / "memory.safetensors"
    save_file(spoil(load_file(file), kind), file)
    content = read_sealed(tmp_path / "memory" / "memory_config.json")
    content["files"] = {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}}
    write_sealed(tmp_path / "memory" / "memory_config.json", content)
    refused(tmp_path / "memory", match)
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    save_file(spoil(load_file(file), kind), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole")


def test_an_index_leads_to_no_other_folder(memory_config, tmp_path):
    add_memory(base_model(), memory_config, [2]).save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    file = tmp_path / "whole" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = tmp_path / "whole" / next(iter(index["weight_map"].values()))
    shard.rename(tmp_path / shard.name)
    index["weight_map"] = {
        key: f"../{name}" if name == shard.name else name for key, name in index["weight_map"].items()
    }
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'\.\./model-.*' is not the path of a file in it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
