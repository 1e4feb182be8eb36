"""The speed of a whole model, as a toy on the CPU."""

import contextlib
import importlib
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from memlayers import inference

TOY = {
    "num_subkeys": 8,
    "layers": 2,
    "dim": 16,
    "heads": 2,
    "query_dim": 8,
    "vocab_size": 64,
    "context": 16,
    "batch": 2,
    "steps": 1,
    "rounds": 2,
    "new_tokens": 4,
    "device": "cpu",
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("model_speed")
    monkeypatch.setattr(module, "_open_gate", lambda *_: None)  # has tests of its own
    return module


@pytest.fixture
def models(script):
    torch.manual_seed(0)
    found = {}
    for name in (script.WITH, script.WITHOUT):
        found[name] = script.causal_lm("gpt2", layers=2, dim=16, heads=2, context=16, vocab_size=64).eval()
    script.add_memory(found[script.WITH], script.MemoryConfig(dim=16, heads=2, topk=4, num_subkeys=8, query_dim=8))
    return found


def test_a_toy(script, capsys):
    script.main(**TOY)
    out = capsys.readouterr().out
    speed = r"with a memory [\d,.]+, without [\d,.]+ tokens/s: [\d.]+ x the speed without"
    assert re.search(rf"^training: {speed}$", out, re.MULTILINE)
    assert re.search(rf"^writing, eager: {speed}$", out, re.MULTILINE)
    assert "kernels" in out


def test_both_train(script, models):
    before = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}
    calls = script._training(models, torch.randint(64, (2, 8)), 2)
    for name, model in models.items():
        calls[name]()
        same = [
            key
            for key, value in model.state_dict().items()
            if value.is_floating_point() and torch.equal(value, before[name][key])
        ]
        assert not same, name


def test_all_ways_write_the_same(script, models, monkeypatch):
    inside = []

    @contextlib.contextmanager
    def captured(model):
        assert model is models[script.WITH]
        inside.append(True)
        yield
        inside.clear()

    monkeypatch.setattr(inference, "captured_decoding", captured)
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    prompt = torch.randint(64, (1, 5))
    expected = {}
    for name, model in models.items():
        whole = prompt
        with torch.no_grad():
            for _ in range(6):
                whole = torch.cat([whole, model(input_ids=whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        expected[name] = whole[:, 5:]
    ways = {}
    for way, calls in script._ways_to_write(models, prompt, 6, torch.device("cuda")):
        ways[way] = bool(inside)
        for name, call in calls.items():
            for _ in range(2):  # a cache must begin anew
                assert torch.equal(call(), expected[name]), (way, name)
    assert ways == {"eager": False, "eager, memory captured": True, "compiled, static cache": False}
    assert not inside
    assert [way for way, _ in script._ways_to_write(models, prompt, 6, torch.device("cpu"))] == ["eager"]


def test_a_round_times_both_and_the_ratio_is_of_one_round(script, capsys):
    order = []
    samples = script._rounds({name: lambda name=name: order.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert [len(found) for found in samples.values()] == [3, 3]
    assert sorted("".join(order)) == list("aaaaabbbbb")
    script._report("reading", {script.WITH: [1.0, 2.0, 4.0], script.WITHOUT: [3.0, 1.0, 4.0]}, 8)
    assert capsys.readouterr().out == "reading: with a memory 4.0, without 2.7 tokens/s: 1.000 x the speed without\n"


def test_a_cache_that_is_kept_holds_what_was_written(script, models):
    cache = DynamicCache(config=models[script.WITHOUT].config)
    script.write(models[script.WITHOUT], models[script.WITHOUT], cache, torch.randint(64, (1, 3)), 4)
    assert cache.get_seq_length() == 3 + 3
