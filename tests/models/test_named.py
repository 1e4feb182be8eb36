"""Memories of several names in one model: which of them answer, and each of them alone."""

import copy

import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, disable_memory, load_memory, save_memory
from memlayers.models import (
    SaveMemory,
    add_memory,
    causal_lm,
    freeze_base,
    memory_layers,
    named_memories,
    quantize_memory,
    remove_memory,
    set_active,
)
from memlayers.models.wrappers import ParallelMemory, find_wrappers
from memlayers.optim import MemoryAdamW

# PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
PLACES = {"one place": ([1], [1]), "two places": ([1], [2]), "overlapping": ([1, 2], [2])}


def base_of(family="llama"):
    torch.manual_seed(0)
    return causal_lm(family, vocab_size=40, layers=2, dim=16, heads=2, context=32).eval()


def add(model, name, layers, *, seed, **options):
    torch.manual_seed(seed)
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=4 + seed, query_dim=8)
    add_memory(model, config, layers, name=name, **{"mode": "parallel", **options})
    for _, wrapper in find_wrappers(model, name):
        if isinstance(wrapper, ParallelMemory):
            nn.init.normal_(wrapper.gate)
        wrapper.memory.query.norm.running_mean.normal_()
    return model


def alone(base, name, layers, *, seed, **options):
    return add(copy.deepcopy(base), name, layers, seed=seed, **options)


def logits(model):
    return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.promise(
    "Adapters",
    "memories of several names in one model: `add_memory(..., name=)`, `set_active(model, names)`",
    "supported",
    "each alone gives the outputs that it gave when it was alone, bit for bit; none: the base's",
)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_alone_is_what_it_was_alone_and_none_is_the_base(family, places):
    base = base_of(family)
    news, law = (alone(base, "x", layers, seed=seed) for seed, layers in enumerate(places))
    both = copy.deepcopy(base)
    for seed, (name, layers) in enumerate(zip(["news", "law"], places, strict=True)):
        add(both, name, layers, seed=seed)
    for one, name in ((news, "news"), (law, "law")):
        for (_, its), (_, other) in zip(find_wrappers(one), find_wrappers(both, name), strict=True):
            other.memory.load_state_dict(its.memory.state_dict())
            other.gate.data.copy_(its.gate)
    assert named_memories(both) == {"law": True, "news": True}
    with torch.no_grad():
        together = logits(both)
        assert not torch.equal(together, logits(news))
        assert not torch.equal(together, logits(law))
        for name, one in (("news", news), ("law", law)):
            set_active(both, name)
            assert named_memories(both) == {"news": name == "news", "law": name == "law"}
            assert torch.equal(logits(both), logits(one))
            prompt = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
            assert torch.equal(both.generate(**prompt), one.generate(**prompt))
        set_active(both, [])
        assert torch.equal(logits(both), logits(base))
        set_active(both, ["law", "news"])
        assert torch.equal(logits(both), together)
        with disable_memory(both, "law"):
            assert torch.equal(logits(both), logits(news))
        with disable_memory(both):
            assert torch.equal(logits(both), logits(base))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("first", ["news", "law"])
def test_one_is_removed_and_the_other_stays(places, first):
    base = base_of()
    both = copy.deepcopy(base)
    for seed, (name, layers) in enumerate(zip(["news", "law"], places, strict=True)):
        add(both, name, layers, seed=seed)
    second = "law" if first == "news" else "news"
    with torch.no_grad():
        set_active(both, second)
        expected = logits(both)
        remove_memory(both, first)
        assert named_memories(both) == {second: True}
        assert torch.equal(logits(both), expected)
        assert both.config.placement.layers == tuple(dict(zip(["news", "law"], places, strict=True))[second])
        remove_memory(both, second)
        assert type(both) is type(base)
        assert both.state_dict().keys() == base.state_dict().keys()
        assert torch.equal(logits(both), logits(base))


def test_all_are_removed_at_once():
    base = base_of()
    both = add(alone(base, "news", [1, 2], seed=0), "law", [1], seed=1)
    remove_memory(both)
    assert type(both) is type(base)
    assert not any(module._forward_pre_hooks for module in both.modules())
    assert torch.equal(logits(both), logits(base))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_each_is_saved_and_loaded_by_name_alone_or_beside_the_other(places, tmp_path):
    base = base_of()
    both = copy.deepcopy(base)
    for seed, (name, layers) in enumerate(zip(["news", "law"], places, strict=True)):
        add(both, name, layers, seed=seed)
    for name in ("news", "law"):
        save_memory(both, tmp_path / name, name=name)
    again = load_memory(load_memory(copy.deepcopy(base), tmp_path / "news", name="new"), tmp_path / "law", name="law")
    with torch.no_grad():
        assert torch.equal(logits(again), logits(both))
        for name, its in (("news", "new"), ("law", "law")):
            set_active(both, name)
            set_active(again, its)
            assert torch.equal(logits(again), logits(both))
            assert torch.equal(logits(load_memory(copy.deepcopy(base), tmp_path / name)), logits(both))
    with pytest.raises(ValueError, match=r"name must be that of one memory, 'law' or 'news', got None"):
        save_memory(both, tmp_path / "none")
    with pytest.raises(ValueError, match=r"memories of one name to be saved whole, got 'law', 'news': save each"):
        both.save_pretrained(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["law", "news"]


def test_a_memory_in_place_of_a_module_beside_one_elsewhere(tmp_path):
    base = base_of()
    both = alone(base, "news", [1], seed=0, mode="replace")
    add(both, "law", [2], seed=1)
    expected = logits(both)
    with pytest.raises(ValueError, match=r"has not kept model\.layers\.0\.mlp: use add_memory\(\.\.\., keep_original"):
        set_active(both, "law")
    assert named_memories(both) == {"news": True, "law": True}
    set_active(both, "news")
    assert torch.equal(logits(both), logits(alone(base, "x", [1], seed=0, mode="replace")))
    set_active(both, ["news", "law"])
    for name in ("news", "law"):
        save_memory(both, tmp_path / name, name=name)
    again = base
    for name in ("news", "law"):
        load_memory(again, tmp_path / name, name=name)
    assert torch.equal(logits(again), expected)


def test_a_kept_module_answers_in_place_of_a_silent_memory():
    base = base_of()
    both = alone(base, "news", [1], seed=0, mode="replace", keep_original=True)
    add(both, "law", [2], seed=1)
    set_active(both, "law")
    assert torch.equal(logits(both), logits(alone(base, "x", [2], seed=1)))


def test_a_memory_inside_of_a_block_that_has_one_beside_it(tmp_path):
    base = base_of()
    both = alone(base, "whole", ["model.layers.0"], seed=0)
    add(both, "inner", [1], seed=1)
    save_memory(both, tmp_path / "inner", name="inner")
    set_active(both, "inner")
    expected = logits(alone(base, "x", [1], seed=1))
    assert torch.equal(logits(both), expected)
    assert torch.equal(logits(load_memory(copy.deepcopy(base), tmp_path / "inner")), expected)
    set_active(both, "whole")
    assert torch.equal(logits(both), logits(alone(base, "x", ["model.layers.0"], seed=0)))


def test_only_active_memories_are_trained():
    both = add(alone(base_of(), "news", [1], seed=0), "law", [1], seed=1)
    freeze_base(both)
    set_active(both, "law")
    optimizer = MemoryAdamW(both, lr=1e-2, value_lr=1e-1)
    before = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    both.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in both.state_dict().items() if not torch.equal(tensor, before[name])}
    law = {path for path, _ in find_wrappers(both, "law")}
    news = {f"{path}.memory." for path, _ in find_wrappers(both, "news")}
    assert any(name.startswith(tuple(law)) and name.endswith("values.weight") for name in changed)
    assert not any(name.startswith(tuple(news)) for name in changed)


def test_a_trainer_saves_and_resumes_each_by_its_own_callback(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    both = add(alone(base_of(), "news", [1], seed=0), "law", [1], seed=1)
    freeze_base(both)
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], save_strategy="no")
    state, control = TrainerState(global_step=3), TrainerControl()
    callbacks = [SaveMemory("news"), SaveMemory("law")]
    for callback in callbacks:
        callback.on_save(args, state, control, model=both)
    assert sorted(path.name for path in (tmp_path / "checkpoint-3").iterdir()) == ["memory-law", "memory-news"]
    expected = logits(both)
    for memory in memory_layers(both).values():
        nn.init.zeros_(memory.values.weight)
    for callback in callbacks:
        callback.on_train_begin(args, state, control, model=both)
    assert torch.equal(logits(both), expected)
    with pytest.raises(ValueError, match=r"name must be that of one memory, 'law' or 'news', got None"):
        SaveMemory().on_train_begin(args, state, control, model=both)
    args.save_strategy = "steps"  # when Trainer saves the whole model, too, as it does without adapters
    with pytest.raises(ValueError, match=r"must have adapters of PEFT, or .* use save_strategy='no', and save_memory"):
        SaveMemory("law").on_train_begin(args, state, control, model=both)


def test_what_is_left_is_described_as_it_is_now(tmp_path):
    both = add(alone(base_of(), "news", [1], seed=0), "law", [2], seed=1)
    quantize_memory(both)
    remove_memory(both, "news")
    expected = logits(both)
    both.save_pretrained(tmp_path)
    again = type(both).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert named_memories(again) == {"default": True}


def test_a_mapped_memory_and_one_of_few_bits_beside_one_in_memory(tmp_path):
    base = base_of()
    save_memory(alone(base, "news", [1], seed=0), tmp_path / "news")
    both = copy.deepcopy(base)
    for name, values in (("mapped", "mapped"), ("rounded", "int8"), ("plain", "memory")):
        load_memory(both, tmp_path / "news", name=name, values=values)
    expected = logits(load_memory(copy.deepcopy(base), tmp_path / "news"))
    for name in ("mapped", "plain"):
        set_active(both, name)
        assert torch.equal(logits(both), expected)
    save_memory(both, tmp_path / "plain", name="plain")
    save_memory(both, tmp_path / "rounded", name="rounded")
    assert torch.equal(logits(load_memory(copy.deepcopy(base), tmp_path / "plain")), expected)
    set_active(both, "rounded")
    assert torch.equal(logits(load_memory(copy.deepcopy(base), tmp_path / "rounded")), logits(both))
    refused(lambda: save_memory(both, tmp_path / "x", name="mapped"), "must have its tables in memory to be saved")
    assert not (tmp_path / "x").exists()


def refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_has_no_sense_is_refused():
    model = alone(base_of(), "news", [1], seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused(lambda: add(model, "news", [2], seed=1), r"no memory 'news' yet, got one with model")
    refused(lambda: add(model, "a/b", [2], seed=1), r"name must consist of letters, digits, '_' and '-', got 'a/b'")
    refused(lambda: add(model, 3, [2], seed=1), r"name must consist of .*, got 3")
    refused(lambda: add(model, "law", [1], seed=1, mode="replace"), r"mode must be 'parallel' of all memories at")
    refused(lambda: set_active(model, "law"), r"name must be that of one memory, 'news', got 'law'")
    refused(lambda: remove_memory(model, "law"), r"name must be that of one memory, 'news', got 'law'")
    refused(lambda: disable_memory(model, "law").__enter__(), r"name must be that of one memory, 'news', got 'law'")
    refused(lambda: set_active(model, None), r"names must be the name of a memory or a list of them, got None")
    refused(lambda: set_active(base_of(), []), r"model must have memories that add_memory put there")
    replaced = alone(base_of(), "news", [1], seed=0, mode="replace")
    refused(lambda: add(replaced, "law", [1], seed=1), r"got 'replace' and 'parallel'")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_copies_pickles_and_adapters_keep_names_and_what_is_active():
    import pickle

    peft = pytest.importorskip("peft")
    both = add(alone(base_of(), "news", [1], seed=0), "law", [1], seed=1)
    set_active(both, "law")
    expected = logits(both)
    for again in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert named_memories(again) == {"law": True, "news": False}
        assert torch.equal(logits(again), expected)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(both, config)
    assert torch.equal(logits(wrapped), expected)
    set_active(wrapped, "news")
    assert named_memories(wrapped) == {"law": False, "news": True}
    assert not torch.equal(logits(wrapped), expected)
