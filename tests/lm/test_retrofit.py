"""Memories beside models that are trained already: `memlayers retrofit`, and runs with a base."""

import dataclasses
import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from memlayers import MemoryConfig, add_memory, doctor, load_memory
from memlayers.cli import main, model_commands
from memlayers.lm.build import batch_loss, build_model, logits_loss
from memlayers.lm.config import ModelConfig, RunConfig
from memlayers.lm.data import DataConfig, open_corpus, prepare
from memlayers.lm.evaluate import evaluate
from memlayers.lm.footprint import footprint
from memlayers.lm.presets import RETROFIT
from memlayers.lm.retrofit import fields_of_base, places
from memlayers.lm.run import RunFolder
from memlayers.lm.train import Loop, train
from memlayers.models import causal_lm, memory_layers, memory_preset
from memlayers.models.add import trainable_base

SIZES = {
    "model.context": 16, "memory.heads": 1, "memory.topk": 2, "memory.num_subkeys": 4, "memory.query_dim": 8,
    "training.tokens": 64 * 4, "training.batch_tokens": 64, "training.eval_every_tokens": 128,
    "training.eval_tokens": 200, "training.learning_rate": 0.1, "training.value_learning_rate": 1.0,
}  # fmt: skip
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory, write_text):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=120)


@pytest.fixture(scope="module")
def base(tmp_path_factory, text):
    """The folder of a model whose tokenizer begins texts with <s> and has no <|endoftext|>."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokens.train([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(3)
    model = causal_lm("llama", vocab_size=290, layers=2, dim=16, heads=2, context=32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(base, text, tmp_path_factory):
    data = DataConfig(sources=(text,), holdout_percent=10, tokenizer=str(base))
    return prepare(data, tmp_path_factory.mktemp("tokens") / "corpus", progress=False)


@pytest.fixture(scope="module")
def retrofitted(base, corpus, tmp_path_factory):
    """The folder of a run of the command."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["retrofit", str(base), "--corpus", str(corpus.folder), "--output", str(output), *TINY]) == 0
    return output


def test_the_table_may_be_on_the_host(base, corpus, retrofitted, tmp_path, monkeypatch):
    monkeypatch.setattr("memlayers.storage.host.is_beside", lambda weight_SV, slots_TM: False)
    words = ["--corpus", str(corpus.folder), "--output", str(tmp_path), *TINY, "--memory_values", "host"]
    assert main(["retrofit", str(base), *words]) == 0
    result, expected = (RunFolder(folder).read_result() for folder in (tmp_path, retrofitted))
    assert result["config"]["memory_values"] == "host"
    assert result["validation"] == expected["validation"]


def test_documents_begin_as_the_tokenizer_begins_a_text(corpus):
    tokenizer = corpus.tokenizer()
    assert corpus.eot_id == tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids("<s>") == 0
    (shard,) = corpus.train.shards
    assert (shard.tokens[shard.documents["offset"]] == 0).all()
    assert (shard.tokens == 0).sum() == shard.num_documents


def test_a_tokenizer_without_a_token_that_begins_or_ends_a_text_is_refused(base, text, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    said = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        del said[name]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(said))
    data = DataConfig(sources=(text,), holdout_percent=10, tokenizer=str(tmp_path / "base"))
    with pytest.raises(
        ValueError, match=r"data.tokenizer must have the token <\|endoftext\|>, or say in tokenizer_con"
    ):
        prepare(data, tmp_path / "corpus", progress=False)


@pytest.mark.promise(
    "Command line and files",
    "`memlayers retrofit BASE --data TEXT --output RUN`, BASE a folder of transformers or a run",
    "supported",
    "a memory is trained beside the frozen base, with the base's own tokenizer; `RUN/model` is what `save_memory` "
    "writes, with the tokenizer, and the perplexity before and after is printed",
)
def test_a_memory_is_trained_beside_a_base_that_stays_as_it_is(base, text, corpus, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    output = tmp_path / "new" / "run"
    new = ["--output", str(output), *TINY]
    assert main(["retrofit", str(base), "--data", text, "--data.holdout_percent", "10", *new]) == 0
    shown = capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert open_corpus(output.parent / "corpus").tokenizer_sha256 == corpus.tokenizer_sha256
    result = RunFolder(output).read_result()
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = evaluate(plain, corpus.validation, tokens=200, context=16)
    first = {"step": 0, "tokens": 0, "seconds": 0.0, "loss": expected.loss, "perplexity": expected.perplexity}
    assert result["curve"][0] == pytest.approx(first, rel=1e-6)
    assert f"perplexity {expected.perplexity:.2f} per token before\n" in shown
    assert f"memory, for load_memory, eval, generate and explore: {output / 'model'}\n" in shown
    assert result["validation"]["loss"] < expected.loss
    assert result["config"]["base"] == str(base)
    assert result["config"]["memory_layers"] == [2]  # three quarters of the depth
    assert not (output / "model" / "model.safetensors").exists()
    model = load_memory(plain, output / "model")
    found = evaluate(model, corpus.validation, tokens=200, context=16)
    assert found.loss == pytest.approx(result["validation"]["loss"], rel=1e-6)


def test_what_takes_a_model_takes_the_run_and_its_memory(retrofitted, text, corpus, tmp_path, capsys, monkeypatch):
    written = []
    for folder in (retrofitted, retrofitted / "model"):
        assert main(["generate", str(folder), "--prompt", "abc", "--max_new_tokens", "5", "--temperature", "0"]) == 0
        written.append(capsys.readouterr().out)
        page = str(tmp_path / "page.html")
        assert main(["explore", str(folder), "--text", text, "--tokens", "50", "--output", page]) == 0
        corpus_of = [] if folder == retrofitted else ["--corpus", str(corpus.folder)]
        capsys.readouterr()
        assert main(["eval", str(folder), "--tokens", "200", "--json", *corpus_of]) == 0
        assert [*json.loads(capsys.readouterr().out)["usage"]] == ["model.layers.1.mlp.memory"]
    assert written[0].startswith("abc")
    examined = []
    with monkeypatch.context() as patch:
        patch.setattr(model_commands, "doctor", lambda *a, **how: examined.append(a[0]) or doctor(*a, **how))
        main(["doctor", str(retrofitted), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in report["findings"] if one["check"] == "written"] == ["pass"]
    assert trainable_base(examined[0]) == []
    assert (
        main(["generate", str(retrofitted), "--prompt", "a", "--memory_values", "mapped", "--max_new_tokens", "2"]) == 0
    )


def config_of(base, **training):
    typed = {**SIZES, "training.save_every_tokens": 64, **{f"training.{name}": one for name, one in training.items()}}
    return RunConfig.from_dict({**RETROFIT, **fields_of_base(base), **typed})


def test_one_that_was_killed_ends_bit_for_bit_as_one_that_was_not(base, corpus, tmp_path, monkeypatch):
    config = config_of(base)
    whole = train(config, tmp_path / "whole", corpus=corpus, progress=False)
    original = Loop.forward_backward

    def interrupted(self, batches):
        if self.step == 2:
            raise KeyboardInterrupt
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "forward_backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", corpus=corpus, progress=False)
    step = max((tmp_path / "run" / "checkpoints").iterdir())
    assert not (step / "model.safetensors").exists()
    resumed = train(config, tmp_path / "run", corpus=corpus, progress=False, resume=True)
    assert resumed["model_files"]["memory.safetensors"] == whole["model_files"]["memory.safetensors"]
    assert [point["loss"] for point in resumed["curve"]] == [point["loss"] for point in whole["curve"]]
    losses = [[line["loss"] for line in RunFolder(tmp_path / name).read_metrics()] for name in ("whole", "run")]
    assert losses[0] == losses[1]


def test_another_base_is_not_what_a_run_goes_on_with(base, corpus, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    config = config_of(tmp_path / "base")
    monkeypatch.setattr(RunFolder, "finish", lambda *_: None)
    with pytest.raises(ValueError, match="no result.json"):
        train(config, tmp_path / "run", corpus=corpus, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="must hold a run on the same text to be resumed, .* with another base"):
        train(config, tmp_path / "run", corpus=corpus, progress=False, resume=True)


def test_the_base_is_trained_where_that_is_asked_for(base, text, corpus, tmp_path):
    data = ["--corpus", str(corpus.folder), "--data", text, "--data.holdout_percent", "10"]  # a corpus that is ready
    words = [*data, "--output", str(tmp_path / "run"), *TINY, "--train_base", "true"]
    assert main(["retrofit", str(base), *words]) == 0
    found = RunFolder(tmp_path / "run").load_model()
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(found.lm_head.weight, plain.lm_head.weight)
    assert len(memory_layers(found)) == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_more_training_goes_on_with_the_memory(retrofitted, tmp_path):
    words = ["--training.learning_rate", "1e-12", "--training.value_learning_rate", "1e-12"]
    assert main(["train", "--from", str(retrofitted), "--output", str(tmp_path / "run"), *words]) == 0
    before, after = (RunFolder(folder).read_result() for folder in (retrofitted, tmp_path / "run"))
    assert after["curve"][0]["loss"] == before["validation"]["loss"]
    assert after["validation"]["loss"] == pytest.approx(before["validation"]["loss"], rel=1e-4)


@pytest.mark.promise(
    "Command line and files",
    "`memlayers retrofit` of a model with a memory, on a corpus of other tokens, at a block that is not there",
    "refused",
    "before any work, by name",
)
def test_what_cannot_be_retrofitted_is_refused_by_name(
    base, text, corpus, retrofitted, tiny_run, tiny_corpus, tmp_path, capsys
):
    def refused(folder, *words):
        status = main(["retrofit", str(folder), "--output", str(tmp_path / "run"), *map(str, words)])
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1)
        return err

    assert "data must be given: --data TEXT, or --corpus FOLDER" in refused(base)
    assert "base must be the folder of a model, got" in refused(tmp_path / "none", "--data", text)
    for folder in (tiny_run, retrofitted):
        assert "base must be a model without memories, got" in refused(folder, "--data", text)
    assert "corpus must have the tokenizer of the base, got" in refused(base, "--corpus", tiny_corpus.folder, *TINY)
    assert "memory_layers must be an integer from 1 to 2, got 3" in refused(base, "--data", text, "--layers", 3)
    assert "model.context must be at most that of the base, 32, got 64" in refused(
        base, "--corpus", corpus.folder, *TINY, "--model.context", 64
    )
    assert "unknown option --preset" in refused(base, "--data", text, "--preset", "demo")
    shutil.copytree(base, tmp_path / "silent")
    (tmp_path / "silent" / "tokenizer.json").unlink()
    assert "data.tokenizer must be the folder of a corpus, run or model" in refused(tmp_path / "silent", "--data", text)
    shutil.copy(base / "tokenizer.json", tmp_path)
    assert "base must hold a causal language model of transformers" in refused(tmp_path, "--data", text)
    assert not (tmp_path / "run").exists()


def test_a_run_may_be_the_base(tiny_config, tiny_corpus, tmp_path, capsys):
    train(dataclasses.replace(tiny_config, memory_layers=()), tmp_path / "plain", corpus=tiny_corpus, progress=False)
    words = ["--corpus", str(tiny_corpus.folder), "--output", str(tmp_path / "run"), *TINY, "--layers", "1"]
    kept = ["retrofit", str(tmp_path / "plain"), *words, "--output", str(tmp_path / "plain"), "--overwrite"]
    assert main(kept) == 2
    assert "output must be another folder than that of the model in base, whose place it" in capsys.readouterr().err
    assert main(["retrofit", str(tmp_path / "plain"), *words]) == 0
    first, result = (RunFolder(tmp_path / name).read_result() for name in ("plain", "run"))
    assert result["curve"][0]["loss"] == pytest.approx(
        evaluate(RunFolder(tmp_path / "plain").load_model(), tiny_corpus.validation, tokens=200, context=16).loss
    )
    assert first["config"]["memory_layers"] == []
    assert result["config"]["memory_layers"] == [1]
    capsys.readouterr()
    arguments = ["retrofit", str(tmp_path / "plain"), "--corpus", str(tiny_corpus.folder), *TINY, "--dry_run"]
    assert main(arguments) == 0
    assert "windows of the corpus" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_mode": "replace"}, "memory_mode must be 'parallel' beside a base, got 'replace'"),
        ({"memory_values": "mapped:x"}, "memory_values must be 'memory' or 'host' beside a base, got 'mapped:x'"),
        ({"memory_layers": ()}, "memory_layers must name at least one block of the base"),
        ({"model": ModelConfig()}, "model.family must be 'pretrained' beside a base, got 'gpt2'"),
        ({"base": None}, "model.family must be 'gpt2' or 'llama' without a base, got 'pretrained'"),
        ({"base": None, "model": ModelConfig(), "train_base": True}, "train_base must be False without a base"),
    ],
)
def test_a_configuration_that_makes_no_sense_with_a_base_or_without(changes, message):
    model = ModelConfig(family="pretrained")
    config = RunConfig(base="b", model=model, memory_layers=(1,), memory_mode="parallel", memory=MemoryConfig(dim=256))
    dataclasses.replace(config, memory_values="host")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_blocks_whose_ffn_is_not_one_module_have_numbers_too():
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=50, max_position_embeddings=32, **sizes))
    assert places(model, (2,)) == ["model.decoder.layers.1"]
    with pytest.raises(ValueError, match="memory_layers must be among 1, 2 for this base, got 3"):
        places(model, (3,))
    config = MemoryConfig(dim=16, heads=1, topk=2, num_subkeys=4, query_dim=8)
    assert [*memory_layers(add_memory(model, config, places(model, (1,)), mode="parallel"))]


def test_the_loss_of_a_base_with_more_than_a_matrix_at_its_end():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()
    model.lm_head.bias.data.normal_()
    ids = torch.randint(50, (2, 9))
    assert batch_loss(model, ids[:, :-1], ids[:, 1:]) == logits_loss(model, ids[:, :-1], ids[:, 1:])


def test_what_a_base_needs_is_counted_whatever_its_attention_is(base, tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=290, hidden_size=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    config = config_of(tmp_path)
    frozen = footprint(config, vocab_size=290)
    trained = footprint(dataclasses.replace(config, train_base=True), vocab_size=290)
    model = build_model(config, vocab_size=290, eot_id=0)
    assert frozen.parameters == trained.parameters >= 4 * model.num_parameters()
    of_base = 4 * sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert trained.gradients - frozen.gradients == of_base > 0
    assert trained.optimizer_state - frozen.optimizer_state >= 2 * of_base


def test_the_defaults_are_those_of_the_preset():
    model = causal_lm("gpt2", vocab_size=300, layers=4, dim=32, heads=2, context=16)
    found = memory_preset("retrofit", model)
    assert found["mode"] == RETROFIT["memory_mode"] == "parallel"
    memory = {name.removeprefix("memory."): value for name, value in RETROFIT.items() if name.startswith("memory.")}
    assert MemoryConfig(dim=32, **memory) == found["config"]
    assert (RETROFIT["training.learning_rate"], RETROFIT["training.value_learning_rate"]) == (1e-3, 1e-2)
