import dataclasses
import json

import pytest

from memlayers.cli import main
from memlayers.lm.config import RunConfig
from memlayers.lm.presets import preset


@pytest.fixture
def write(tmp_path):
    """Writes a file of options; gives its name."""

    def write(content, name="options.yaml"):
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def configured(trainings, tmp_path):
    """The configuration that `memlayers train` makes of its arguments."""

    def run(*arguments):
        assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 0
        return trainings[-1][0]

    return run


def test_options_win_over_the_file_and_the_file_over_the_preset(configured, write):
    file = write("training:\n  tokens: 64000\n  seed: 3\nmodel.layers: 6\n")
    demo = preset("demo")
    for arguments in (["--config", file, "--training.seed", "5"], ["--training.seed", "5", "--config", file]):
        config = configured(*arguments)
        assert (config.training.tokens, config.training.seed, config.model.layers) == (64_000, 5, 6)
        assert config.memory == demo.memory
        assert config.training.learning_rate == demo.training.learning_rate


def test_a_file_may_name_its_preset_and_an_option_another(configured, write):
    file = write("preset: paper-24x1024\ntraining.seed: 3\n")
    large = preset("paper-24x1024")
    expected = dataclasses.replace(large.run(), training=dataclasses.replace(large.training, seed=3))
    assert configured("--config", file) == expected
    small = preset("paper-12x1024")
    expected = dataclasses.replace(small.run(), training=dataclasses.replace(small.training, seed=3))
    assert configured("--config", file, "--preset", "paper-12x1024") == expected


def test_several_files_are_read_one_after_the_other(configured, write):
    one, two = write("training.tokens: 64\ntraining.seed: 3\n", "one.yaml"), write("training.seed: 4\n", "two.yaml")
    config = configured("--config", one, "--config", two)
    assert (config.training.tokens, config.training.seed) == (64, 4)


def test_numbers_in_a_file_are_read_as_on_the_command_line(configured, write):
    file = write("training:\n  learning_rate: 1e-3\n  betas: [0.8, 0.9]\nmemory.query_hidden: [8]\n")
    config = configured("--config", file)
    assert (config.training.learning_rate, config.training.betas) == (1e-3, (0.8, 0.9))
    assert config.memory.query_hidden == (8,)


@pytest.mark.parametrize("typed", ["010", "1:30"])
def test_what_yaml_alone_takes_for_a_number_is_refused(typed, trainings, write, tmp_path, capsys):
    """To YAML 1.1 they are eight and ninety."""
    for arguments in (["--training.seed", typed], ["--config", write(f"training.seed: {typed}\n")]):
        assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 2
        assert f"training.seed must be an integer from 0 to 4294967295, got '{typed}'" in capsys.readouterr().err


def test_the_configuration_of_a_run_can_be_given_back(configured, write):
    config = dataclasses.replace(preset("paper-12x1024").run(), memory_layers=(2, 9))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    file = write(json.dumps(config.to_dict(), indent=2), "config.json")
    assert configured("--config", file) == config
    assert configured("--config", write(json.dumps(config.to_dict(), indent="\t"), "tabs.json")) == config
    # The width of the memory follows the model's, as it does without a file.
    narrow = configured("--config", file, "--model.dim", "512")
    assert (narrow.model.dim, narrow.memory.dim) == (512, 512)


def test_the_width_of_the_memory_may_be_said_if_it_is_that_of_the_model(configured, write):
    assert configured("--memory.dim", "128").memory.dim == 128
    assert configured("--config", write("memory.dim: 128\n")).memory.dim == 128
    assert configured("--config", write("memory.dim: 64\n"), "--model.dim", "64").memory.dim == 64


def test_a_comparison_takes_the_configuration_of_a_run(write, monkeypatch, tmp_path):
    import memlayers.cli.training_commands as module

    def stop(config, *args, **settings):
        given.append(config)
        raise KeyboardInterrupt

    given = []
    monkeypatch.setattr(module, "compare", stop)
    run = dataclasses.replace(preset("demo").run(), memory_layers=(2,))
    file = write(json.dumps(run.to_dict()), "config.json")
    arguments = ["compare", "--output", str(tmp_path / "out"), "--config", file, "--deep_learning_rate", "1e-4"]
    assert main(arguments) == 130
    assert given[0].run() == run
    assert given[0].deep_learning_rate == 1e-4


def test_resuming_and_overwriting_are_passed_on(trainings, tmp_path):
    output = str(tmp_path / "run")
    for option, expected in (([], (False, False)), (["--resume"], (False, True)), (["--overwrite"], (True, False))):
        assert main(["train", "--output", output, *option]) == 0
        settings = trainings[-1][2]
        assert (settings["overwrite"], settings["resume"]) == expected


def test_help_shows_every_field_with_its_comment_and_the_preset_s_value(capsys):
    assert main(["train", "--help", "--preset", "paper-12x1024"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--memory.topk TOPK K, slots read per head (an integer; default: 32)" in shown
    assert (
        "vocab_size VOCAB_SIZE tokens, the 256 bytes and <|endoftext|> included (an integer; default: 60000)" in shown
    )
    assert "go on with the run that the folder holds, from its last checkpoint; begin it if there is none" in shown
    for name in ("accumulate", "save_every_tokens", "keep_checkpoints"):
        assert f"--training.{name} " in shown


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--data.sources", "play.txt"], "data.sources", ("play.txt",)),
        (["--data.sources", "a b.txt", "1.0"], "data.sources", ("a b.txt", "1.0")),
        (["--data.sources", '["a", "b"]'], "data.sources", ("a", "b")),
        (["--data.text_field", "1"], "data.text_field", "1"),
        (["--memory_layers", "3"], "memory_layers", (3,)),
        (["--memory_layers", "3", "1"], "memory_layers", (3, 1)),
        (["--memory_layers=[3, 1]"], "memory_layers", (3, 1)),
        (["--memory_layers", "[]"], "memory_layers", ()),
        (["--training.learning_rate", "1e-3"], "training.learning_rate", 1e-3),
        (["--training.learning-rate", "1e-3"], "training.learning_rate", 1e-3),
        (["--training.betas", "0.8", "0.9"], "training.betas", (0.8, 0.9)),
        (["--training.save_every_tokens", "null"], "training.save_every_tokens", None),
        (["--training.save_every_tokens", "None"], "training.save_every_tokens", None),
        (["--training.save_every_tokens", "64"], "training.save_every_tokens", 64),
        (["--training.gradient_checkpointing", "true"], "training.gradient_checkpointing", True),
        (["--memory.query_norm", "none"], "memory.query_norm", "none"),
        (["--training.seed", "3", "--training.seed", "4"], "training.seed", 4),
    ],
)
def test_values_are_typed_as_people_type_them(words, field, value, configured):
    config = configured(*words)
    section, _, name = field.rpartition(".")
    assert getattr(getattr(config, section) if section else config, name) == value


def test_files_may_be_named_together(configured, write):
    files = [write("training.tokens: 64\n", "one.yaml"), write("training.seed: 4\n", "two.yaml")]
    config = configured("--config", *files, "--model.layers", "5")
    assert (config.training.tokens, config.training.seed, config.model.layers) == (64, 4, 5)


def test_generation_has_the_same_defaults_as_a_function():
    import inspect

    from memlayers.cli.commands import COMMANDS
    from memlayers.lm.generate import generate

    options = COMMANDS["generate"].options
    defaults = {name: parameter.default for name, parameter in inspect.signature(generate).parameters.items()}
    assert set(options) == set(defaults)
    for name, default in defaults.items():
        assert default is inspect.Parameter.empty or options[name].default == default


@pytest.mark.parametrize(
    "command",
    ["train", "compare", "reproduce", "prepare", "eval", "generate", "explore", "doctor", "bench", "info"],
)
def test_every_command_has_a_help(command, capsys):
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: memlayers {command} ")


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in (
        "train",
        "compare",
        "reproduce",
        "prepare",
        "eval",
        "generate",
        "explore",
        "doctor",
        "bench",
        "info",
    ):
        assert f"\n  {command} " in shown
