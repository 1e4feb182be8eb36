import dataclasses
import json
import random

import pytest

from memlayers.cli import main
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
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
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
    import memlayers.lm.train as module

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
    assert "transformer.h.0.mlp: usage" in shown


def test_evaluation_needs_the_corpus_of_the_run(run, tmp_path, capsys):
    assert "holds no prepared corpus" in fails(capsys, "eval", run, "--corpus", tmp_path)


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
    assert main(["info", "paper-12x1024"]) == 0
    assert "values parameters 268,435,456" in " ".join(capsys.readouterr().out.split())


def test_what_a_user_gets_wrong_is_one_line(run, tiny, tmp_path, capsys):
    new = tmp_path / "new"
    assert "--model.depth" in fails(capsys, "train", "--output", new, "--model.depth", 3)
    assert "memory.dim" in fails(capsys, "train", "--output", new, "--memory.dim", 3)
    assert '"model.layers"' in fails(capsys, "train", "--output", new, "--model.layers", "many")
    assert "model.heads must divide model.dim" in fails(capsys, "train", "--output", new, "--model.heads", 3)
    assert "memory_layers must be" in fails(capsys, "train", "--output", new, "--memory_layers", "[9]")
    assert "topk must be" in fails(capsys, "train", "--output", new, "--memory.topk", 1000)
    assert "invalid choice: 'nonsense'" in fails(capsys, "train", "--preset", "nonsense", "--output", new)
    assert "no such file" in fails(capsys, "train", "--output", new, "--data.sources", '["missing.txt"]')
    assert "deep_learning_rate" in fails(capsys, "compare", "--output", new, "--deep_learning_rate", -1)
    assert "output must be a folder that can be made" in fails(capsys, "train", "--output", "/proc/none/run")
    assert "output must be a folder that can be made" in fails(capsys, "compare", "--output", "/proc/none/run")
    assert "prompt must be valid UTF-8" in fails(capsys, "generate", run, "--prompt", "\udcff")
    assert "holds a finished run" in fails(capsys, "train", "--output", run, *tiny)
    assert "output" in fails(capsys, "train")
    assert "it has no result.json" in fails(capsys, "eval", tmp_path)
    assert "max_new_tokens must be at most" in fails(capsys, "generate", run, "--prompt", "", "--max_new_tokens", 99)
    assert "it has no config.json" in fails(capsys, "info", tmp_path)
    assert "invalid choice" in fails(capsys, "nonsense")
    assert "command" in fails(capsys)
    assert not new.exists()


def test_a_configuration_file_is_options(tiny, run, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("training:\n  tokens: 64\n  seed: 3\n")
    corpus = ["--corpus", str(run.parent / "corpus")]
    short = [word for word in tiny if word not in ("--training.tokens", "128")]
    assert main(["train", "--config", str(file), "--output", str(tmp_path / "run"), *corpus, *short]) == 0
    config = RunFolder(tmp_path / "run").read_config()
    assert (config.training.tokens, config.training.seed) == (64, 3)
    file.write_text("training:\n  nonsense: 1\n")
    capsys.readouterr()
    assert "nonsense" in fails(capsys, "train", "--config", file, "--output", tmp_path / "other")


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    import memlayers.info as module

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "versions", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "memlayers: interrupted\n"
