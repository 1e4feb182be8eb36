import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlayers import MemoryConfig, add_memory, save_memory
from memlayers.cli import main
from memlayers.lm.generate import generate
from memlayers.lm.run import RunFolder
from memlayers.lm.train import train
from memlayers.models import causal_lm
from memlayers.models.wrappers import find_wrappers

PROMPT = "abc"


def test_the_likeliest_text_is_what_the_model_says_without_a_cache(tiny_run):
    folder = RunFolder(tiny_run)
    model, tokenizer = folder.load_model(), folder.load_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer.encode(PROMPT)]
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert generate(tiny_run, PROMPT, max_new_tokens=8, temperature=0) == expected
    assert expected.startswith(PROMPT)
    assert len(expected) > len(PROMPT)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_a_temperature_near_zero_writes_the_likeliest_text(tiny_run, temperature):
    texts = [generate(tiny_run, PROMPT, max_new_tokens=8, temperature=value) for value in (0, temperature)]
    assert texts[0] == texts[1]


def test_draws_follow_the_seed(tiny_run):
    texts = [generate(tiny_run, PROMPT, max_new_tokens=10, temperature=1.5, top_p=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_begins_a_document(tiny_run):
    assert generate(tiny_run, "", max_new_tokens=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer of at least 1, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 1, got True"),
        ({"max_new_tokens": 100}, r"max_new_tokens must be at most \d+ to fit into the model's context of 16 tokens"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be a finite number of at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number of at least 0, got inf"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"seed": -1}, "seed must be an integer from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, "seed must be an integer from 0 to .*, got 18446744073709551616"),
        ({"seed": 0.5}, "seed must be an integer from 0 to .*, got 0.5"),
    ],
)
def test_a_bad_setting_is_refused(tiny_run, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_run, PROMPT, **{"max_new_tokens": 5, **settings})


def test_a_prompt_leaves_room_for_one_token_at_least(tiny_run):
    tokenizer = RunFolder(tiny_run).load_tokenizer()
    prompt = "abc"
    while len(tokenizer.encode(prompt)) < 14:
        prompt += " j"
    assert len(tokenizer.encode(prompt)) == 14
    assert generate(tiny_run, prompt, max_new_tokens=1).startswith(prompt)
    with pytest.raises(ValueError, match="max_new_tokens must be at most 1 to fit .* after a prompt of 15, got 2"):
        generate(tiny_run, prompt, max_new_tokens=2)
    for count, longer in ((16, prompt + " j"), (17, prompt + " j j")):
        message = f"prompt must have at most 15 tokens to leave room for one more .* of 16, got {count}, the one that"
        with pytest.raises(ValueError, match=message):
            generate(tiny_run, longer, max_new_tokens=1)


def test_a_run_that_did_not_finish_has_no_text(tiny_run, tmp_path):
    shutil.copy(tiny_run / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match="must be the folder of a finished run"):
        generate(tmp_path, PROMPT, max_new_tokens=5)
    with pytest.raises(
        ValueError, match="run must be the folder of a run, of a checkpoint in one, or of a saved model"
    ):
        generate(tmp_path / "nothing", PROMPT, max_new_tokens=5)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(tiny_run, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.encode", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="prompt must have at most 15 tokens .* got 2,000,000 characters"):
        generate(tiny_run, "ACGT" * 500_000)


@pytest.fixture
def saved(tiny_run, tmp_path):
    """A folder of `save_pretrained`, with the memory and its tokenizer."""
    run = RunFolder(tiny_run)
    run.load_model().save_pretrained(tmp_path / "saved")
    run.load_tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.promise(
    "Command line and files",
    "`memlayers generate` and `memlayers eval` on a folder that `save_pretrained` wrote, memory included",
    "supported",
    "with the tokenizer saved there, too; `eval` takes its text from `--corpus`",
)
def test_a_folder_of_transformers_writes_text(saved, tiny_run, capsys):
    folder = RunFolder(tiny_run)
    model, tokenizer = folder.load_model(), folder.load_tokenizer()
    ids = tokenizer.encode(PROMPT)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert generate(saved, PROMPT, max_new_tokens=5, temperature=0) == expected
    assert generate(saved, "", max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens must be at most .* context of 16 tokens"):
        generate(saved, PROMPT, max_new_tokens=100)


def test_a_folder_of_transformers_is_evaluated_on_a_corpus(saved, tiny_run, tiny_corpus, capsys):
    corpus = str(tiny_corpus.folder)
    assert main(["eval", str(saved), "--corpus", corpus, "--tokens", "300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = RunFolder(tiny_run).read_result()["validation"]
    for name in ("tokens", "words", "bytes"):  # the same text, in the same tokens
        assert found[name] >= expected[name]
    assert main(["eval", str(tiny_run), "--corpus", corpus, "--tokens", str(found["tokens"] + 1), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own["nll"] == pytest.approx(found["nll"], rel=1e-5)
    assert main(["eval", str(saved)]) == 2
    assert "corpus must be given for a model that is no run: --corpus FOLDER" in capsys.readouterr().err
    assert main(["eval", str(saved), "--corpus", corpus]) == 0
    shown = capsys.readouterr().out
    assert "top-1 usage" in shown
    assert "(the first choice of a head), KL" in shown


def test_a_folder_without_a_tokenizer_is_refused(saved):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    with pytest.raises(ValueError, match="must hold the tokenizer of its model, too, .*tokenizer.save_pretrained"):
        generate(saved, PROMPT)


@pytest.fixture
def memory_alone(tiny_run, tmp_path):
    """The folder of a memory beside a base in another one, and the logits of both together."""
    base = tmp_path / "base"
    plain = causal_lm("llama", vocab_size=300, layers=2, dim=16, heads=2, context=32)
    plain.save_pretrained(base)
    RunFolder(tiny_run).load_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=4, query_dim=8, query_norm="rms", value_std=2.0)
    add_memory(model, config, [2], mode="parallel")
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(3.0)
    save_memory(model, tmp_path / "facts")
    return tmp_path / "facts"


@pytest.mark.promise(
    "Command line and files",
    "`memlayers generate`, `eval`, `explore` and `doctor` on a folder that `save_memory` wrote",
    "supported",
    "the base, and the tokenizer where the folder has none, come from where the base was; `--base` says where it is",
)
def test_a_memory_beside_its_base_writes_text(memory_alone, tiny_corpus, tmp_path, capsys):
    written = generate(memory_alone, PROMPT, max_new_tokens=8, temperature=0)
    assert written != generate(tmp_path / "base", PROMPT, max_new_tokens=8, temperature=0)
    for values in ("mapped", "int8"):
        assert generate(memory_alone, PROMPT, max_new_tokens=8, temperature=0, memory_values=values) == written
    assert main(["generate", str(memory_alone), "--prompt", PROMPT, "--max_new_tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{written}\n"
    figures = {}
    for values in ("memory", "mapped", "int4", "host"):
        words = ["eval", str(memory_alone), "--corpus", str(tiny_corpus.folder), "--tokens", "300", "--json"]
        assert main([*words, "--memory_values", values]) == 0
        figures[values] = json.loads(capsys.readouterr().out)
    assert figures["mapped"]["nll"] == pytest.approx(figures["memory"]["nll"], rel=1e-6)
    assert figures["int4"]["nll"] != figures["memory"]["nll"]
    assert figures["host"]["nll"] == pytest.approx(figures["memory"]["nll"], rel=1e-6)
    assert [*figures["memory"]["usage"]] == ["model.layers.1.mlp.memory"]
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="base must be the folder of the model that the memory in .* --base FOLDER"):
        generate(memory_alone, PROMPT)
    moved = str(tmp_path / "moved")
    assert generate(memory_alone, PROMPT, max_new_tokens=8, temperature=0, base=moved) == written
    page = str(tmp_path / "page.html")
    (tmp_path / "text.txt").write_text("abc def\n" * 20)
    text = str(tmp_path / "text.txt")
    both = [str(memory_alone), "--compare", str(memory_alone)]
    assert main(["explore", *both, "--base", moved, "--text", text, "--output", page]) == 0
    assert main(["doctor", str(memory_alone), "--base", moved]) == 0


@pytest.mark.promise(
    "Command line and files",
    "`memlayers generate` and `eval` with `--memory_values mapped`, `int8` or `int4`",
    "supported",
    "on a folder that `save_memory` wrote; on one with a whole model they are refused by name",
)
def test_a_whole_model_has_neither_a_base_elsewhere_nor_tables_in_its_files(saved, memory_alone, tiny_run, tmp_path):
    for folder in (saved, tiny_run):
        with pytest.raises(
            ValueError, match="memory_values must be memory for a folder with a whole model, got 'int8'"
        ):
            generate(folder, PROMPT, memory_values="int8")
        with pytest.raises(ValueError, match="base must be left out for a folder with a whole model, got '"):
            generate(folder, PROMPT, base=str(saved))
    with pytest.raises(
        ValueError, match="values must be one of 'memory', 'int8', 'int4', 'mapped', 'host', got 'disk'"
    ):
        generate(memory_alone, PROMPT, memory_values="disk")
    other = tmp_path / "other"
    causal_lm("llama", vocab_size=300, layers=2, dim=16, heads=2, context=32).save_pretrained(other)
    with pytest.raises(ValueError, match="model must be the base that the memory in .* was trained with"):
        generate(memory_alone, PROMPT, base=str(other))


def test_a_checkpoint_of_a_run_writes_text(tiny_config, tiny_corpus, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "finish", lambda *_: None)
    with pytest.raises(ValueError, match="no result.json"):
        train(tiny_config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    shutil.copytree(tiny_corpus.folder, tmp_path / "corpus")  # where a run has it, without being told
    assert generate(checkpoint, PROMPT, max_new_tokens=5).startswith(PROMPT)
    with pytest.raises(ValueError, match="must be the folder of a finished run, .* name one of its checkpoints in"):
        generate(tmp_path / "run", PROMPT)


def test_a_memory_of_a_module_that_is_not_of_transformers_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    config = MemoryConfig(dim=16, heads=1, topk=2, num_subkeys=4, query_dim=8)
    save_memory(add_memory(model, config, ["0"]), tmp_path / "facts")
    with pytest.raises(ValueError, match="a memory of a module that is not of transformers: load_memory"):
        generate(tmp_path / "facts", PROMPT)
