"""The README's examples run, and print what the README says."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from memlayers import load_memory, save_memory

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_what_the_readme_shows(capsys):
    code, printed = re.search(r"```python\n(.*?)```\n\n?```\n(.*?)```", README.read_text(), re.DOTALL).groups()
    assert len(code.splitlines()) <= 25
    exec(compile(code, str(README), "exec"), {})
    assert capsys.readouterr().out.strip() == printed.strip()


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
            "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM",
            "GPTNeoXForCausalLM"]  # fmt: skip


def base_of(name):
    kind = getattr(transformers, name)
    grouped = (
        {"num_key_value_heads": 2, "head_dim": 16} if name not in ("GPT2LMHeadModel", "GPTNeoXForCausalLM") else {}
    )
    return kind(kind.config_class(**SIZES, **grouped))


@pytest.mark.parametrize("name", FAMILIES)
def test_five_lines_retrofit_a_pretrained_model(name, tmp_path, monkeypatch):
    code = re.search(r"## Into a pretrained model\n\n```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    lines = code.partition("\n\n")[2].splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == 5
    torch.manual_seed(0)
    base_of(name).save_pretrained(tmp_path / "base")
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _: load(tmp_path / "base"))
    ids = torch.randint(64, (8, 24))
    space = {"batch": {"input_ids": ids, "labels": ids}}
    exec(compile(code, str(README), "exec"), space)
    monkeypatch.undo()
    model, optimizer, base = space["model"].train(), space["optimizer"], load(tmp_path / "base")
    with torch.no_grad():
        before = base(ids).logits
        assert torch.equal(model.eval()(ids).logits, before)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_memory(model, tmp_path / "memory")
    with torch.no_grad():
        after = model.eval()(ids).logits
        assert not torch.equal(after, before)
        assert torch.equal(load_memory(base, tmp_path / "memory").eval()(ids).logits, after)
        assert torch.equal(load(tmp_path / "memory").eval()(ids).logits, after)
