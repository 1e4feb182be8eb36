"""Tables that are mapped from the folder that they were saved to."""

import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memlayers import Experts, MemoryConfig, RowAdam, add_memory, load_memory, quantize_memory, save_memory
from memlayers.models import causal_lm, freeze_base, memory_layers
from memlayers.models.folder import tensor_start
from memlayers.storage import saved as saving
from memlayers.storage.saved import SavedTable

IDS = torch.arange(1, 13).view(2, 6)
CONFIG = MemoryConfig(dim=16, value_dim=1024, heads=2, topk=3, num_subkeys=6, query_dim=8)


def base():
    torch.manual_seed(1)
    return causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=[None, 8, 4], ids=["floats", "8 bits", "4 bits"])
def folder(request, tmp_path):
    model = add_memory(base(), CONFIG, [1, 2], share_values=True)
    if request.param is not None:
        quantize_memory(model, request.param)
    save_memory(model, tmp_path / "memory")
    return tmp_path / "memory"


def mapped(folder):
    return load_memory(base(), folder, values="mapped")


def table_of(model):
    return next(iter(memory_layers(model).values())).values


@pytest.mark.promise(
    "Saving and loading",
    '`load_memory(base, folder, values="mapped")`',
    "supported",
    "tables, also of few bits, are read from the files as rows are needed, and no copy of them is made",
)
def test_it_gives_the_logits_of_a_table_in_memory(folder):
    """Bit for bit where that one's layer calls its parts, too; without gradients it runs as one operation."""
    model = mapped(folder)
    one, other = memory_layers(model).values()
    assert isinstance(one.values, SavedTable)
    assert one.values is other.values
    assert torch.equal(model(IDS).logits, load_memory(base(), folder)(IDS).logits)
    torch.testing.assert_close(logits(model), logits(load_memory(base(), folder)), rtol=1e-4, atol=1e-5)
    assert 0 < one.values.figures()["rows_read"] <= 36
    assert model.num_parameters() == load_memory(base(), folder).num_parameters()
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = load_memory(base(), folder).generate(IDS, **greedy)
    assert torch.equal(model.generate(IDS, **greedy), expected)


def test_rows_begin_on_pages(folder):
    file = folder / "memory.safetensors"
    name = next(name for name in load_file(file) if name.endswith((".values.weight", ".values.codes")))
    assert tensor_start(file, name) % 4096 == 0


def test_a_file_whose_rows_begin_anywhere_is_mapped_too(folder):
    """As earlier versions wrote them."""
    from memlayers.files import describe_files
    from memlayers.models.folder import read_description, write_description

    expected, file = logits(mapped(folder)), folder / "memory.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "odd": "x" * 13})
    description = read_description(folder)
    write_description(folder, type(description)(**{**vars(description), "files": describe_files(folder, [file.name])}))
    assert torch.equal(logits(mapped(folder)), expected)


def test_copies_map_the_same_file(folder):
    model = mapped(folder)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_a_copy_after_the_file_was_replaced_is_refused(folder):
    model = mapped(folder)
    expected, kept = logits(model), pickle.dumps(model)
    os.utime(folder / "memory.safetensors", ns=(0, 0))
    for make in (copy.deepcopy, lambda _: pickle.loads(kept)):
        with pytest.raises(ValueError, match=r"is another file than the one that was mapped: load its folder anew"):
            make(model)
    assert torch.equal(logits(model), expected)


def test_a_copy_is_made_in_another_working_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = mapped("memory")
    monkeypatch.chdir("/")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_pages_are_given_back_over_a_budget(folder, monkeypatch):
    monkeypatch.setattr(saving, "BUDGET_BYTES", 1)
    model = mapped(folder)
    expected = logits(model)
    read = table_of(model).figures()["rows_read"]
    assert torch.equal(logits(model), expected)
    assert table_of(model).figures()["rows_read"] > read


@pytest.mark.promise(
    "Saving and loading",
    "training, casting, moving or saving a model whose tables are mapped",
    "refused",
    'load the folder into memory (`values="memory"`)',
)
def test_what_would_write_to_it_is_refused_with_the_remedy(folder, tmp_path):
    model = mapped(folder)
    table, remedy = table_of(model), r'load it into memory \(values="memory"\)'
    for build in (lambda: RowAdam(model), lambda: freeze_base(model)):
        with pytest.raises(ValueError, match=f"tables must be in memory to be trained, got .*{remedy}"):
            build()
    with pytest.raises(AttributeError, match="has no weight that could be written to"):
        table.weight.zero_()
    for save in (model.state_dict, lambda: model.save_pretrained(tmp_path / "again")):
        with pytest.raises(ValueError, match="is in no state_dict: copy the folder of"):
            save()
    with pytest.raises(ValueError, match="must have its tables in memory to be saved, got one of .*copy that folder"):
        save_memory(model, tmp_path / "again")
    with pytest.raises(ValueError, match="stays on the CPU"):
        mapped(folder).to("meta")
    if table.bits is None:
        with pytest.raises(ValueError, match=r"floats in torch.float32, got cpu and torch.float16"):
            table.half()
    assert torch.equal(model(IDS).logits, load_memory(base(), folder)(IDS).logits)


def test_queries_are_trained_around_it(folder):
    model, other = mapped(folder), load_memory(base(), folder)
    grads = []
    for one in (model, other):
        one(IDS, labels=IDS).loss.backward()
        grads.append(next(iter(memory_layers(one).values())).keys.weight.grad)
    assert grads[0].any()
    torch.testing.assert_close(*grads)


def test_a_transform_is_refused(folder):
    layer = next(iter(memory_layers(mapped(folder)).values()))
    with pytest.raises(ValueError, match=r"cannot be read in a transform of torch.func .*table in memory"):
        torch.vmap(layer)(torch.randn(3, layer.config.dim))


def test_slots_out_of_range_are_an_error(folder):
    with pytest.raises(IndexError, match=r"slots must be in \[0, 36\), got 36 to 36"):
        table_of(mapped(folder)).read(torch.tensor([[36]]), torch.ones(1, 1))


def test_other_tables_are_refused_by_name(tmp_path):
    model = add_memory(base(), CONFIG, [1], kind=Experts)
    save_memory(model, tmp_path / "experts")
    with pytest.raises(ValueError, match="values must be 'memory' for memories with a ExpertTable, got 'mapped'"):
        load_memory(base(), tmp_path / "experts", values="mapped")
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="values must be 'memory' for a whole model, got 'mapped': save its memory"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", values="mapped")


def test_from_pretrained_maps_a_memory_that_has_a_base_elsewhere(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = add_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIG, [1])
    save_memory(model, tmp_path / "memory")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory", values="mapped")
    assert isinstance(table_of(loaded), SavedTable)
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert torch.equal(loaded(IDS).logits, in_memory(IDS).logits)
