"""quantize_memory on models: saved, loaded, rounded on the way, counted, removed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memlayers import Experts, add_memory, disable_memory, doctor, load_memory, quantize_memory, save_memory
from memlayers.models import causal_lm, freeze_base, memory_layers, memory_summary, remove_memory
from memlayers.models.folder import read_description
from memlayers.storage.low_bits import LowBitTable

IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = [(4, False, None), (8, True, None), (4, True, Experts)]


def base():
    torch.manual_seed(1)
    return causal_lm("llama", vocab_size=40, layers=2, dim=16, heads=2, context=32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=KINDS, ids=["4 bits", "8 bits, shared", "4 bits, shared experts"])
def saved(request, memory_config, tmp_path):
    """A model whose tables were rounded, their bits, and the folder of its memory before."""
    bits, share, kind = request.param
    how = {"share_values": share, **({"kind": kind} if kind else {})}
    model = add_memory(base(), memory_config, [1, 2], mode="parallel", **how)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.3)
    save_memory(model, tmp_path / "floats")
    return quantize_memory(model, bits), bits, tmp_path / "floats"


@pytest.mark.promise(
    "Quantised models",
    "`save_memory`, `save_pretrained`, `load_memory` and `from_pretrained` after `quantize_memory`",
    "supported",
    "tables are saved and loaded with their bits, in whatever `dtype` the rest is loaded",
)
def test_it_is_saved_and_loaded_as_it_is(saved, tmp_path):
    model, bits, _ = saved
    expected = logits(model)
    save_memory(model, tmp_path / "memory")
    assert read_description(tmp_path / "memory").placement.value_bits == bits
    assert torch.equal(logits(load_memory(base(), tmp_path / "memory")), expected)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), expected)
    tables = {memory.values for memory in memory_layers(loaded).values()}
    assert len(tables) == len({memory.values for memory in memory_layers(model).values()})
    in_16_bits = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for one, other in zip(memory_layers(in_16_bits).values(), memory_layers(model).values(), strict=True):
        assert torch.equal(one.values.scales, other.values.scales)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


@pytest.mark.promise(
    "Quantised models",
    '`load_memory(base, folder, values="int8")` or `"int4"` of a folder with tables of floats',
    "supported",
    "rounds some rows at a time as they are read, as `quantize_memory` rounds them",
)
def test_floats_are_rounded_on_the_way(saved):
    model, bits, floats = saved
    loaded = load_memory(base(), floats, values=f"int{bits}")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.placement == model.config.placement


def test_a_folder_of_floats_says_nothing_of_bits(saved):
    _, _, floats = saved
    assert "value_bits" not in json.loads((floats / "memory_config.json").read_text())["memory"]


def test_what_a_folder_cannot_give_is_refused(saved, tmp_path):
    model, bits, floats = saved
    save_memory(model, tmp_path / "low")
    other = {8: "int4", 4: "int8"}[bits]
    with pytest.raises(ValueError, match=f"values must be 'memory' or 'int{bits}' for .*, got '{other}': quant"):
        load_memory(base(), tmp_path / "low", values=other)
    with pytest.raises(ValueError, match="values must be one of 'memory', 'int8', 'int4'.*, got 'int2'"):
        load_memory(base(), floats, values="int2")
    plain = base()
    with pytest.raises(ValueError, match="mesh must be None for tables of"):
        load_memory(plain, floats, values=f"int{bits}", mesh=object())
    assert not memory_layers(plain)


def test_scales_that_are_no_numbers_are_refused(saved, tmp_path):
    model, _, _ = saved
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("scales"))
    tensors[name][2] = torch.tensor([float("nan")]).view(torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"scales' of .* must hold finite numbers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_the_base_comes_back(saved):
    model, _, _ = saved
    expected = logits(base())
    with disable_memory(model):
        assert torch.equal(logits(model), expected)
    remove_memory(model)
    assert torch.equal(logits(model), expected)
    assert "value_bits" not in str(model.config)


def test_its_numbers_count_and_its_bytes_are_fewer(saved, memory_config):
    model, bits, floats = saved
    before = load_memory(base(), floats)
    assert model.num_parameters() == before.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == before.num_parameters(exclude_embeddings=True)
    one, other = memory_summary(model).parts["values"], memory_summary(before).parts["values"]
    assert one.parameters == other.parameters
    assert one.trainable == one.gradient_bytes == 0
    held = {table for table in model.modules() if isinstance(table, LowBitTable)}
    assert one.weight_bytes == len(held) * 36 * ({8: 16, 4: 64}[bits] + 4)


def test_what_trains_tables_is_refused(saved):
    model, bits, _ = saved
    reason = f"tables must be of floats to be trained, got one of {bits} bits"
    with pytest.raises(ValueError, match=f"{reason}.*; or choose what else to train"):
        freeze_base(model)
    with pytest.raises(ValueError, match=f"what is examined is the training of .*: {reason}"):
        doctor(model, {"input_ids": IDS})
