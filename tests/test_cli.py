import dataclasses
import json
import random
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest

from memlayers.cli import main
from memlayers.files import read_sealed, write_sealed
from memlayers.lm.data import open_corpus
from memlayers.lm.presets import preset, preset_names
from memlayers.lm.run import RunFolder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options of a tiny job, as typed."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    draw = random.Random(0)
    with open(text, "w") as stream:
        for number in range(200):
            words = " ".join(draw.choice(["tea", "cup", "pot", "milk"]) for _ in range(draw.randint(15, 60)))
            stream.write(json.dumps({"id": number, "text": words}) + "\n")
    options = {
        "data.sources": f'["{text}"]',
        "data.vocab_size": 270,
        "data.holdout_percent": 10,
        "model.layers": 1,
        "model.dim": 16,
        "model.heads": 2,
        "model.context": 16,
        "memory.heads": 1,
        "memory.topk": 2,
        "memory.num_subkeys": 4,
        "memory.query_dim": 8,
        "memory_layers": "[1]",
        "training.tokens": 128,
        "training.batch_tokens": 64,
        "training.eval_every_tokens": 64,
        "training.eval_tokens": 200,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a run that was trained from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--output", str(folder), *tiny]) == 0
    return folder


def fails(capsys, *arguments):
    """The line that a wrong command prints."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("memlayers: error: ")
    assert err.count("\n") == 1
    return err


def test_options_become_the_configuration(run):
    config = RunFolder(run).read_config()
    assert (config.model.layers, config.model.dim, config.model.context) == (1, 16, 16)
    assert config.memory_layers == (1,)
    assert (config.memory.dim, config.memory.topk, config.memory.num_subkeys) == (16, 2, 4)
    assert config.training.tokens == 128
    assert config.data.vocab_size == 270
    assert config.training.learning_rate == preset("demo").training.learning_rate  # not given: from the preset
    assert (run.parent / "corpus" / "manifest.json").is_file()


def test_every_field_is_an_option(capsys):
    for command, config in (("train", preset("demo").run()), ("compare", preset("demo"))):
        assert main([command, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if not dataclasses.is_dataclass(value):
                assert f"--{field.name} " in shown
                continue
            for inner in dataclasses.fields(value):
                if (field.name, inner.name) != ("memory", "dim"):  # it is model.dim
                    assert f"--{field.name}.{inner.name} " in shown
        assert "peak, of everything but the memory's values" in shown  # the comment beside the field


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_gives_the_defaults(name, tmp_path, monkeypatch):
    import memlayers.cli.training_commands as module

    given = []
    monkeypatch.setattr(module, "train", lambda config, *_, **__: given.append(config) or {}["stop"])
    with pytest.raises(KeyError, match="stop"):
        main(["train", "--preset", name, "--output", str(tmp_path / "run"), "--training.seed", "7"])
    expected = preset(name).run()
    assert given == [dataclasses.replace(expected, training=dataclasses.replace(expected.training, seed=7))]


def test_a_comparison_prints_its_table(tiny, run, tmp_path, capsys):
    arguments = ["compare", "--output", str(tmp_path / "out"), "--corpus", str(run.parent / "corpus"), *tiny]
    assert main([*arguments, "--deep_learning_rate", "0.0005"]) == 0
    out, err = capsys.readouterr()
    assert (tmp_path / "out" / "table.md").read_text() in out
    assert "[3/3] 1 layer + memory: training on 128 tokens" in err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["models"]["2-layers"]["learning_rate"] == 5e-4


def test_evaluation(run, capsys):
    result = RunFolder(run).read_result()["validation"]
    assert main(["eval", str(run), "--tokens", "200", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["nll"] == pytest.approx(result["nll"], rel=1e-6)
    assert main(["eval", str(run), "--split", "test", "--tokens", "200"]) == 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown
    assert "transformer.h.0.mlp.memory: usage" in shown


def test_evaluation_needs_the_corpus_of_the_run(run, tmp_path, capsys):
    assert "holds no prepared corpus" in fails(capsys, "eval", run, "--corpus", tmp_path)
    moved = shutil.copytree(run, tmp_path / "run")
    result = read_sealed(moved / "result.json")
    result["data"]["folder"] = gone = str(tmp_path / "gone")
    write_sealed(moved / "result.json", result)
    assert f"since that of the run, {gone!r}, is not there: --corpus FOLDER" in fails(capsys, "eval", moved)


def test_generation(run, capsys):
    assert main(["generate", str(run), "--prompt", "tea", "--max_new_tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("tea")


def test_info(run, capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "threads" in shown
    assert "parameters" not in shown
    assert main(["info", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    parameters = RunFolder(run).read_result()["parameters"]
    for part in ("query", "keys", "values", "rest", "total"):
        assert f"{part} parameters {parameters[part]:,}" in shown
    assert "layers 1: 16 slots" in shown
    assert main(["info", "paper-24x1024", "--model.layers", "1", "--model.context", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "gpt2, 1 layers, dim 1024" in shown
    assert "row optimizer" not in shown  # it has no memory


def test_info_says_what_a_training_needs(tiny, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(
        "preset: paper-12x1024\nmodel: {layers: 2, context: 16}\nmemory_layers: [2]\ntraining.batch_tokens: 64\n"
    )
    assert main(["info", "--config", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "values parameters 268,435,456" in shown
    assert re.search(r"a training step needs row optimizer dense AdamW parameters (1.\d+ GB) \1 gradients", shown)
    row, dense = re.search(r"gradients (\d\S* \w+) (\d\S* \w+)", shown).groups()
    assert row.endswith(" MB")
    assert dense.endswith(" GB")
    assert re.search(r"available [\d.,]+ GB on", shown)


@pytest.mark.parametrize("command", [["info"], ["train", "--dry_run"]])
def test_what_processes_hold_and_receive_is_said_of_a_mesh(command, monkeypatch, tmp_path, capsys):
    from memlayers.lm.footprint import Footprint

    needed = Footprint(parameters=3 * 10**7, gradients=0, optimizer_state=0, activations=0)
    for module in ("memlayers.cli.model_commands", "memlayers.lm.mesh"):
        monkeypatch.setattr(f"{module}.footprint", lambda *_, **__: needed)
    step = SimpleNamespace(lines=lambda: [("step", "made")])
    monkeypatch.setattr("memlayers.cli.training_commands.dry_run", lambda *_, **__: step)
    (tmp_path / "text.txt").write_text("one two")
    assert main([*command, "--data.sources", str(tmp_path / "text.txt"), "--mesh", "2", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.search("on 4 processes +tables, moments +received a step +needed about\n  replicas +25 MB +590 kB", shown)
    assert re.search("  2 replicas x 2 columns +13 MB +492 kB +18 MB", shown)
    assert re.search("^choose +columns: 492 kB received a step for tables, 590 kB with replicas", shown, re.MULTILINE)


def test_what_a_user_gets_wrong_is_one_line(run, tiny, tmp_path, capsys):
    new = tmp_path / "new"
    assert "no such file" in fails(capsys, "train", "--output", new, "--data.sources", '["missing.txt"]')
    (tmp_path / "file").touch()
    for command in ("train", "compare"):
        said = fails(capsys, command, "--output", tmp_path / "file" / "run")
        assert "output must be a folder that can be made" in said
    assert "prompt must be valid UTF-8" in fails(capsys, "generate", run, "--prompt", "\udcff")
    assert "holds a finished run" in fails(capsys, "train", "--output", run, *tiny)
    assert "run must be the folder of a run, of a checkpoint in one, or of a saved model" in fails(
        capsys, "eval", tmp_path
    )
    assert "max_new_tokens must be at most" in fails(capsys, "generate", run, "--prompt", "", "--max_new_tokens", 99)
    assert "it has no config.json" in fails(capsys, "info", tmp_path)
    assert not new.exists()


def test_the_configuration_of_a_run_trains_an_equal_one(run, tmp_path, capsys):
    arguments = ["--config", str(run / "config.json"), "--corpus", str(run.parent / "corpus")]
    assert main(["train", "--output", str(tmp_path / "again"), *arguments]) == 0
    assert RunFolder(tmp_path / "again").read_config() == RunFolder(run).read_config()
    results = [RunFolder(folder).read_result() for folder in (run, tmp_path / "again")]
    assert results[0]["validation"] == results[1]["validation"]


def without_data(options):
    """The options but for those of the data."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith("--data.") for word in pair]


def test_a_ready_corpus_says_what_the_data_are(run, tiny, tmp_path, capsys):
    corpus = ["--corpus", str(run.parent / "corpus")]
    assert main(["train", "--output", str(tmp_path / "run"), *corpus, *without_data(tiny)]) == 0
    expected, config = RunFolder(run).read_config(), RunFolder(tmp_path / "run").read_config()
    assert config == expected
    capsys.readouterr()
    other = ("--data.vocab_size", 280)
    said = fails(capsys, "train", "--output", tmp_path / "new", *corpus, *without_data(tiny), *other)
    assert "vocab_size 270, asked for 280" in said


@pytest.mark.parametrize("format", ["pytorch", "stdlib"])
def test_a_corpus_without_an_entry_says_that_it_has_none(format):
    from memlayers.cli.training_commands import _data_of

    entry = {"name": "PyTorch's Python sources", "files": [{"format": format}]}
    assert _data_of({"vocab_size": 300, "sources": [entry]}) == {"data.vocab_size": 300, "data.sources": []}


def test_preparing_prints_what_there_is(tiny, run, tmp_path, capsys):
    data = [word for pair in zip(tiny[::2], tiny[1::2], strict=True) if "data." in pair[0] for word in pair]
    assert main(["prepare", "--output", str(tmp_path / "corpus"), *data]) == 0
    shown = capsys.readouterr().out
    made = open_corpus(tmp_path / "corpus")
    for name in ("train", "validation", "test"):
        split = getattr(made, name)
        assert f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_words:,} words" in shown
    assert "1 shard" in shown
    assert "270 tokens" in shown
    assert "0 blank, 0 malformed" in shown
    assert "MB/s" in shown
    assert made.manifest == open_corpus(run.parent / "corpus").manifest
    assert main(["prepare", "--output", str(tmp_path / "corpus"), *data]) == 0
    shown = capsys.readouterr().out
    assert "which was ready" in shown
    assert "MB/s" not in shown
    assert "unknown option --model.layers" in fails(capsys, "prepare", "--output", tmp_path, "--model.layers", 3)


def test_resuming_a_finished_run_leaves_it_as_it_is(run, tiny, capsys):
    before = (run / "result.json").read_bytes()
    assert main(["train", "--output", str(run), "--resume", *tiny]) == 0
    assert (run / "result.json").read_bytes() == before


@pytest.mark.promise(
    "Command line and files",
    "more tokens for a finished run: `memlayers train --from RUN --output OTHER`",
    "supported",
    "its configuration gives the defaults, its corpus the text; schedule and moments are new; the perplexity that it "
    "begins with is printed and is the first point of the curve in `result.json`",
)
def test_a_run_from_another_one_has_its_configuration_and_its_text(run, tmp_path, capsys):
    arguments = ["train", "--from", str(run), "--output", str(tmp_path / "run"), "--training.tokens", "192"]
    assert main([*arguments, "--training.seed", "1", "--training.save_every_tokens", "64"]) == 0
    first, result = RunFolder(run).read_result(), RunFolder(tmp_path / "run").read_result()
    expected = {**first["config"]["training"], "tokens": 192, "seed": 1, "save_every_tokens": 64}
    assert result["config"] == {**first["config"], "training": {**expected, "begin_with": str(run)}}
    assert result["data"]["corpus_sha256"] == first["data"]["corpus_sha256"]
    assert len(result["data"]["begin_with_sha256"]) == 64
    assert result["curve"][0]["step"] == 0
    assert result["curve"][0]["perplexity"] == pytest.approx(first["validation"]["perplexity"], rel=1e-6)
    assert f"perplexity {first['validation']['perplexity']:.2f} per token before\n" in capsys.readouterr().out
    assert main([*arguments, "--training.seed", "1", "--training.save_every_tokens", "64", "--resume"]) == 0


def test_a_run_from_another_one_reads_other_text_with_its_tokenizer(run, tmp_path, write_text):
    text = write_text(tmp_path / "other.jsonl", documents=60)
    arguments = ["train", "--from", str(run), "--output", str(tmp_path / "new" / "run"), "--data.sources", text]
    assert main([*arguments, "--data.holdout_percent", "10"]) == 0
    result, first = RunFolder(tmp_path / "new" / "run").read_result(), RunFolder(run).read_result()
    assert result["data"]["tokenizer_sha256"] == first["data"]["tokenizer_sha256"]
    assert result["data"]["corpus_sha256"] != first["data"]["corpus_sha256"]
    assert result["data"]["folder"] == str(tmp_path / "new" / "corpus")
    assert result["config"]["data"]["tokenizer"] == str(run)


@pytest.mark.promise(
    "Command line and files",
    "`memlayers train --from RUN` with another vocabulary, shape or preset, or from a run that did not finish",
    "refused",
    "before any work, by the field in which they differ",
)
def test_what_a_run_from_another_one_cannot_change_is_refused_by_name(run, tiny, tmp_path, capsys):
    new = ("train", "--from", run, "--output", tmp_path / "run")
    assert "memory.num_subkeys: 4, 8" in fails(capsys, *new, "--memory.num_subkeys", 8)
    assert "model.dim: 16, 32" in fails(capsys, *new, "--model.dim", 32)
    assert "preset must not be given with from" in fails(capsys, *new, "--preset", "demo")
    assert "training.begin_with must not be given with from" in fails(capsys, *new, "--training.begin_with", run)
    data = [word for pair in zip(tiny[::2], tiny[1::2], strict=True) if "data." in pair[0] for word in pair]
    assert main(["prepare", "--output", str(tmp_path / "corpus"), *data, "--data.vocab_size", "260"]) == 0
    capsys.readouterr()
    for more in ([], ["--dry_run"]):
        said = fails(capsys, *new, "--corpus", tmp_path / "corpus", *more)
        assert "corpus must have the tokenizer of the run in training.begin_with" in said
    (tmp_path / "half").mkdir()
    shutil.copy(run / "config.json", tmp_path / "half")
    said = fails(capsys, "train", "--from", tmp_path / "half", "--output", tmp_path / "run")
    assert "from must be the folder of a finished run, got" in said
    assert "which holds a run that did not finish: --resume lets it go on" in said
    folder = RunFolder(tmp_path / "moved")
    shutil.copytree(run, folder.path)
    result = folder.read_result()
    write_sealed(folder.result, {**result, "data": {**result["data"], "folder": str(tmp_path / "gone")}})
    said = fails(capsys, "train", "--from", folder.path, "--output", tmp_path / "run")
    assert "corpus must be given, since that of" in said
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_is_named(run, tmp_path, capsys):
    copy = tmp_path / "run"

    def damaged(file, content, *commands):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        (copy / file).write_bytes(content((copy / file).read_bytes()))
        for command in commands:
            assert str(copy / file) in fails(capsys, command[0], copy, *command[1:])

    using = [("eval", "--tokens", "200"), ("generate", "--prompt", "tea")]
    damaged("result.json", lambda raw: b"\xff" + raw, *using, ("info",))
    damaged("result.json", lambda raw: raw.replace(b'"folder"', b'"holder"'), *using)
    result = read_sealed(run / "result.json")
    write_sealed(tmp_path / "lacking.json", {**result, "data": {}})  # as another version may have written it
    damaged("result.json", lambda raw: (tmp_path / "lacking.json").read_bytes(), using[0], ("info",))
    damaged("result.json", lambda raw: b"[]", *using, ("info",))
    weights = "model/model.safetensors"
    damaged(weights, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), *using)
    damaged(weights, lambda raw: raw[:100], *using)


def test_a_dry_run_prints_and_writes_nothing(tiny, run, tmp_path, monkeypatch, capsys):
    corpora = []

    def dry_run(config, *, corpus):
        corpora.append(corpus)
        return SimpleNamespace(lines=lambda: [("tokens", f"{config.training.tokens}")])

    monkeypatch.setattr("memlayers.cli.training_commands.dry_run", dry_run)
    monkeypatch.chdir(tmp_path)
    for option in ("--dry-run", "--dry_run"):
        assert main(["train", option, *tiny]) == 0
        out = capsys.readouterr().out
        assert out == "corpus  the text was not tokenised yet\ntokens  128\n"
    assert main(["train", "--dry-run", "--output", str(tmp_path / "run"), *tiny]) == 0
    assert corpora == [None, None, None]
    ready = ([*tiny, "--corpus", str(run.parent / "corpus")], [*tiny, "--output", str(run.parent / "other")])
    for arguments in (*ready, [*without_data(tiny), "--corpus", str(run.parent / "corpus")]):
        capsys.readouterr()
        assert main(["train", "--dry-run", *arguments]) == 0
        assert corpora.pop().folder == run.parent / "corpus"
        assert capsys.readouterr().out == "tokens  128\n"
    assert list(tmp_path.iterdir()) == []
    assert not (run.parent / "other").exists()


def test_a_dry_run_refuses_what_the_training_would(tiny, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("memlayers.cli.training_commands.dry_run", lambda *_, **__: {}["stepped"])
    other = (*tiny, "--data.vocab_size", 280)
    for place in (("--corpus", run.parent / "corpus"), ("--output", run.parent / "other")):
        assert "vocab_size 270, asked for 280" in fails(capsys, "train", "--dry-run", *other, *place)
    long = (*tiny, "--model.context", 6400, "--training.batch_tokens", 6400, "--corpus", run.parent / "corpus")
    assert "model.context must be below the" in fails(capsys, "train", "--dry-run", *long)
    missing = tuple('["missing.txt"]' if before == "--data.sources" else word for before, word in pairwise(("", *tiny)))
    for place in ((), ("--output", tmp_path / "run"), ("--corpus", tmp_path / "corpus")):
        assert "no such file or folder: missing.txt" in fails(capsys, "train", "--dry-run", *missing, *place)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").touch()
    said = fails(capsys, "train", "--dry-run", *tiny, "--corpus", tmp_path / "thesis")
    assert "holds no prepared corpus" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
