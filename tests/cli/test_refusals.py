import re
import subprocess
import sys

import pytest

import memlayers
from memlayers.cli import main

NEW = ("train", "--output", "new")

OPTIONS = [
    # Options and commands that do not exist.
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["nonsense"], "unknown command 'nonsense'; allowed: train, retrofit, compare, reproduce, prepare, eval, .*"),
    ([], "a command is missing; allowed: train, .*"),
    ([*NEW, "--data.vocab_sise", "3"], r"unknown option --data.vocab_sise; did you mean --data.vocab_size\?"),
    ([*NEW, "--data.vocab_sise=3"], r"unknown option --data.vocab_sise; did you mean --data.vocab_size\?"),
    ([*NEW, "--topk", "3"], r"unknown option --topk; did you mean --memory.topk\?"),
    ([*NEW, "--heads", "3"], r"unknown option --heads; did you mean --memory.heads or --model.heads\?"),
    ([*NEW, "--model.topk", "3"], r"unknown option --model.topk; did you mean --memory.topk\?"),
    ([*NEW, "--model.zzz", "3"], "unknown option --model.zzz; see memlayers train --help"),
    (["train", "--outp", "new"], r"unknown option --outp; did you mean --output\?"),
    (["generate", "run", "--promt", "a"], r"unknown option --promt; did you mean --prompt\?"),
    ([*NEW, "extra"], "unrecognized arguments: extra"),
    # What is missing.
    (["train"], "output must be given: --output FOLDER, .*"),
    ([*NEW, "--config", ""], "config must be the name of a file, got ''"),
    ([*NEW, "--config="], "config must be the name of a file, got ''"),
    (["train", "--output", ""], "output must not be empty, got ''"),
    ([*NEW, "--corpus="], "corpus must not be empty, got ''"),
    (["generate", "", "--prompt", "a"], "run must not be empty, got ''"),
    (["reproduce", "noise", "--output", ""], "output must not be empty, got ''"),
    (["compare"], "memlayers compare needs --output .*"),
    (["reproduce"], "memlayers reproduce needs NAME .*"),
    (["reproduce", "depht"], r"experiment must be one that is known, got 'depht'; did you mean 'depth'\?"),
    (["reproduce", "depth"], "output must be given: --output FOLDER, .*"),
    (["reproduce", "depth", "--output", "new", "--scale", "huge"], "scale must be one of 'laptop', .*, got 'huge'"),
    (["reproduce", "depth", "--output", "new", "--jobs", "0"], "jobs must be an integer of at least 1, got 0"),
    (["eval"], "memlayers eval needs RUN .folder of a finished run or .*"),
    (["generate", "run"], "memlayers generate needs --prompt .*"),
    (["explore", "run"], "memlayers explore needs --text .*"),
    (["explore", "nowhere", "--text", "a"], "run must be the folder of a run, .*, got 'nowhere'"),
    (["explore", "/", "--text", "nowhere.txt"], "sources: no such file or folder: nowhere.txt"),
    (["explore", "/", "--text", __file__, "--output", "/"], "output must be a file in a folder that is there, got '/'"),
    ([*NEW, "--memory.topk"], "argument --memory.topk: expected one argument; .*"),
    (
        ["generate", "run", "--prompt", "-x"],
        "argument --prompt: expected one argument; a value that begins with a hyphen is written --prompt=VALUE",
    ),
    # Values of another type.
    ([*NEW, "--memory.topk", "many"], "memory.topk must be an integer of at least 1, got 'many'"),
    ([*NEW, "--memory.topk=2.5"], "memory.topk must be an integer of at least 1, got 2.5"),
    ([*NEW, "--memory.value_dim", "wide"], "memory.value_dim must be an integer of at least 1, got 'wide'"),
    ([*NEW, "--memory.query_hidden", "64", "x"], "memory.query_hidden must be an integer of at least 1, got 'x'"),
    ([*NEW, "--memory.query_bias", "2"], "memory.query_bias must be True or False, got 2"),
    ([*NEW, "--memory_layers", "[1, x]"], "memory_layers must be an integer of at least 1, got 'x'"),
    ([*NEW, "--training.betas", "[0.9]"], r"training.betas must be a list of 2 numbers, got \[0.9\]"),
    ([*NEW, "--training.learning_rate", "nan"], "training.learning_rate must be a finite number above 0 .*, got 'nan'"),
    ([*NEW, "--training.learning_rate", "[1"], "training.learning_rate must be a finite number above 0 .*, got '.1'"),
    ([*NEW, "--training.learning_rate", "1e38"], r"training.learning_rate must be .* below 1e\+06, got 1e\+38"),
    ([*NEW, "--training.betas", "0.9"], r"training.betas must be a list of 2 numbers, got \[0.9\]"),
    ([*NEW, "--data.sources", "a", "--data.sources", "b"], "--data.sources must be given once, with all its values .*"),
    ([*NEW, "--memory_layers=1", "--memory-layers", "2"], "--memory_layers must be given once, with all its values .*"),
    ([*NEW, "--data.sources"], "argument --data.sources: expected at least one argument; .* --data.sources=VALUE"),
    (["generate", "run", "--prompt", "a", "--top_p", "b"], "top_p must be a finite number above 0, got 'b'"),
    (["eval", "run", "--tokens", "many"], "tokens must be an integer of at least 2, got 'many'"),
    (["bench", "--threads", "many"], "threads must be an integer of at least 1, got 'many'"),
    # Values that are not allowed.
    ([*NEW, "--preset", "dmeo"], "preset must be one of 'demo', .*, got 'dmeo'"),
    ([*NEW, "--memory.topk", "129"], "memory.topk must be at most num_subkeys = 128 for product keys, got 129"),
    ([*NEW, "--memory.query_dim", "7"], "memory.query_dim must be even for product keys .*, got 7"),
    ([*NEW, "--memory.query_norm", "layer"], "memory.query_norm must be one of 'batch', 'rms', 'none', got 'layer'"),
    ([*NEW, "--memory.dim", "3"], "memory.dim must be model.dim = 128, got 3"),
    ([*NEW, "--memory.value_dropout", "1"], "memory.value_dropout must be .* and below 1, got 1.*"),
    ([*NEW, "--model.family", "bert"], "model.family must be one of 'gpt2', 'llama', 'pretrained', got 'bert'"),
    ([*NEW, "--model.heads", "3"], "model.heads must divide model.dim = 128, got 3"),
    ([*NEW, "--memory_layers", "[9]"], "memory_layers must be an integer from 1 to 4, got 9"),
    ([*NEW, "--training.accumulate", "3"], "training.accumulate must divide the 4 windows of a step .*, got 3"),
    (["compare", "--output", "new", "--deep_learning_rate", "-1"], "deep_learning_rate must be .* above 0 .* got -1.*"),
    (["compare", "--output", "new", "--deep_learning_rate", "1e38"], r"deep_learning_rate must be .*, got 1e\+38.*"),
    ([*NEW, "--mesh", "2"], "mesh is for --dry_run: torchrun says how many processes train"),
    (["info", "--mesh", "0"], "mesh must be an integer of at least 1, got 0"),
    (["info", "--mesh", "1", "2", "2"], r"mesh must have 1 or 2 numbers .*, got 3"),
    (
        ["info", "--mesh", "3"],
        "training.batch_tokens / training.accumulate must be a multiple of 3 windows .*, got 4.*",
    ),
    (["info", "paper-24x1024", "--mesh", "2"], "mesh is for a model with memories.*"),
    (["train", "--dry_run", "--mesh", "3"], "training.batch_tokens / .* must be a multiple of 3 windows .*, got 4.*"),
    ([*NEW, "--resume", "--overwrite"], "overwrite and resume exclude each other.*"),
    (["info", "demo", "--preset", "demo"], "'demo' is a configuration already: .*"),
    (["info", "missing"], "run must be the folder of a run, got 'missing': it has no config.json"),
    (["eval", "missing"], "run must be the folder of a run, got 'missing': it has no result.json"),
]


@pytest.mark.parametrize(("arguments", "message"), OPTIONS, ids=[" ".join(arguments) for arguments, _ in OPTIONS])
def test_a_wrong_option_is_one_line_that_names_it(arguments, message, refused, trainings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.fullmatch(message.replace("?", r"\?") if message.endswith("'?") else message, refused(*arguments))
    assert trainings == []
    assert list(tmp_path.iterdir()) == []


FILES = [
    (b"memory:\n  topk_: 3\n", r"unknown configuration field 'memory.topk_' in FILE; did you mean 'memory.topk'\?"),
    (b"memory.topk_: 3\n", r"unknown configuration field 'memory.topk_' in FILE; did you mean 'memory.topk'\?"),
    (b'{"memory": {"topk_": 3}}', r"unknown configuration field 'memory.topk_' in FILE; did you mean 'memory.topk'\?"),
    (b"memori:\n  topk: 3\n", r"unknown configuration field 'memori' in FILE; did you mean 'memory'\?"),
    (b"topk: 3\n", r"unknown configuration field 'topk' in FILE; did you mean 'memory.topk'\?"),
    (b"model:\n  zzz: 3\n", "unknown configuration field 'model.zzz' in FILE; allowed: model.family, model.layers, .*"),
    (b"1: 3\n", "unknown configuration field '1' in FILE; allowed: .*data, model, memory, training"),
    (b"model.dim: 8\nmodel:\n  dim: 8\n", "configuration field 'model.dim' is given twice in FILE"),
    (b"model.dim: 8\nmodel.dim: 9\n", r"config file FILE is not readable: 'model.dim' is given twice \(line 2\)"),
    (b"model:\n  dim: 8\n  'dim': 9\n", r"config file FILE is not readable: 'dim' is given twice \(line 3\)"),
    (b'{"data.sources": [{"a": 1, "a": 2}]}', r"config file FILE is not readable: 'a' is given twice \(line 1\)"),
    (b"memory: &a\n  topk_: *a\n", "unknown configuration field 'memory.topk_' in FILE.*"),
    (b"model.dim: 1" + b"0" * 400, r"model.dim must be an integer from 1 to 2\*\*53, got 10+ \(in FILE\)"),
    (b"model.dim: 8\nmemory:\n", "memory must hold fields and their values, got None in FILE"),
    (b"memory: 3\n", "memory must hold fields and their values, got 3 in FILE"),
    (b"memory:\n  topk: many\n", r"memory.topk must be an integer of at least 1, got 'many' \(in FILE\)"),
    (b"memory.topk: 129\n", r"memory.topk must be at most num_subkeys = 128 .*, got 129 \(in FILE\)"),
    (b"memory.dim: 8\n", r"memory.dim must be model.dim = 128, got 8 \(in FILE\)"),
    (b"model.dim: 64\nmemory.dim: 8\n", r"memory.dim must be model.dim = 64, got 8 \(in FILE\)"),
    (b"model:\n  family: bert\n", r"model.family must be one of 'gpt2', 'llama', 'pretrained', got 'bert' \(in FILE\)"),
    (b"model:\n  layers: true\n", r"model.layers must be an integer of at least 1, got True \(in FILE\)"),
    (b"preset: dmeo\n", "preset must be one of 'demo', .*, got 'dmeo'"),
    (b"preset: [1]\n", r"preset must be one of 'demo', .*, got \[1\]"),
    (b"", "config file FILE is empty"),
    (b"# nothing\n", "config file FILE is empty"),
    (b"- a\n- b\n", "config file FILE must hold fields and their values, got .*"),
    (b"just words\n", "config file FILE must hold fields and their values, got 'just words'"),
    (b"memory:\n  topk: [1\n", r"config file FILE is not valid YAML: .* \(line 3, column 1\)"),
    (b'{"memory": {"topk": 3}', r"config file FILE is not valid YAML: .* \(line 1, column 23\)"),
    (b"a: b: c\n", r"config file FILE is not valid YAML: .* \(line 1, column 5\)"),
    (b"\x00\x01\x02\x03", "config file FILE is not valid YAML: .*"),
    (b"\x89PNG\xff\xfe", "config file FILE is no text: not UTF-8 at byte 0"),
    (b"[" * 100_000, r"config file FILE is not readable: more than 16 levels of nesting \(line 1\)"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[repr(content[:24]) for content, _ in FILES])
def test_a_wrong_configuration_file_is_one_line_that_names_it(content, message, refused, trainings, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_bytes(content)
    said = refused("train", "--config", file, "--output", tmp_path / "new")
    assert re.fullmatch(message.replace("FILE", re.escape(str(file))), said)
    assert trainings == []
    assert list(tmp_path.iterdir()) == [file]


def test_a_configuration_file_that_cannot_be_read_is_named(refused, tmp_path):
    for file, why in ((tmp_path / "missing.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        said = refused("train", "--config", file, "--output", tmp_path / "new")
        assert said == f"config file {file} cannot be read: {why}"
    assert "argument --config: expected at least one argument" in refused("train", "--config")


def test_a_fault_of_a_field_that_an_option_changed_is_not_blamed_on_the_file(refused, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("memory.topk: 8\n")
    said = refused("train", "--config", file, "--output", tmp_path / "new", "--memory.topk", "129")
    assert said == "memory.topk must be at most num_subkeys = 128 for product keys, got 129"


SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "tokenizers", "accelerate", "safetensors", *sys.argv[1:]}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from memlayers.cli import main
print(main(["--version"]), main(["train", "--topk", "3"]), main(["generate", ".", "--prompt", "a"]))
"""


def test_only_what_a_command_does_is_imported_for_it():
    def run(*blocked):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *blocked], capture_output=True, text=True, check=True, timeout=100
        )
        return done.stdout.splitlines(), done.stderr.splitlines()

    version = f"memlayers {memlayers.__version__}"
    needs = "memlayers: error: this command needs {}: pip install 'memlayers[lm]'"
    out, err = run()
    assert out == [version, "0 2 2"]
    assert err[0] == "memlayers: error: unknown option --topk; did you mean --memory.topk?"
    assert err[1] in [needs.format(name) for name in ("transformers", "safetensors")]
    assert run("yaml") == ([version, "0 2 2"], [needs.format("yaml")] * 2)


EARLY = """
import sys
from memlayers.cli import main
for words in sys.stdin.read().splitlines():
    print(main(words.split()), sorted({"torch", "transformers", "tokenizers", "numba"} & set(sys.modules)))
"""
REFUSED = [
    "nonsense", "train --nonsense", "train", "train --output x --model.dim 7", "train --output x --model.heads many",
    "train --output x --resume --overwrite", "train --output x --preset none", "train --output x --config none.yaml",
    "prepare --output x --data.vocab_size 3", "prepare --output x --data.sources none.txt",
    "compare --output x --model.dim -1", "reproduce none", "reproduce noise",
    "train --output x --from none", "retrofit", "retrofit missing --data a --output x", "retrofit . --output x",
    "eval . --base none", "eval missing", "doctor", "doctor missing", "generate missing --prompt a",
    "generate missing", "info --preset x", "info missing",
]  # fmt: skip


@pytest.mark.promise(
    "Command line and files",
    "a command line with a mistake: an unknown option, a wrong value, a folder that is not there",
    "refused",
    "at once, before torch and transformers are imported",
)
def test_a_refusal_does_not_wait_for_torch():
    done = subprocess.run(
        [sys.executable, "-c", EARLY], input="\n".join(REFUSED), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["2 []"] * len(REFUSED), done.stderr
    assert done.stderr.count("memlayers: error: ") == len(REFUSED)


@pytest.mark.parametrize("words", [["play.txt"], ["a", "b"], ['["a", "b"]'], ["[a, b]"]])
def test_sources_are_words_or_a_list(words, trainings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--output", "new", "--data.sources", *words]) == 0
    assert trainings[0][0].data.sources == (("play.txt",) if words == ["play.txt"] else ("a", "b"))


@pytest.mark.parametrize("word", ["null", "None"])
@pytest.mark.parametrize("field", ["begin_with", "save_every_tokens"])
def test_null_is_null_for_text_and_for_numbers(word, field, trainings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--output", "new", f"--training.{field}", word]) == 0
    assert getattr(trainings[0][0].training, field) is None


def test_the_usage_line_is_a_line(capsys):
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: memlayers train [--OPTION VALUE ...]\n\nTrain one model.")
    assert main(["eval", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: memlayers eval RUN [--OPTION VALUE ...]\n")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "memlayers", "trian"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "memlayers: error: unknown command 'trian'; did you mean 'train'?\n"


@pytest.mark.promise(
    "Several processes",
    "other commands under `torchrun`: `prepare`, `eval`, `doctor`, `bench`, `reproduce`, `train --dry_run`",
    "refused",
    "start them without it",
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "--output", "new"],
        ["eval", "run"],
        ["generate", "run", "--prompt", "a"],
        ["doctor", "run"],
        ["bench"],
        ["info"],
        ["reproduce", "depth", "--output", "new"],
        ["train", "--dry_run"],
    ],
)
def test_a_command_of_one_process_is_refused_under_torchrun(arguments, refused, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    what = arguments[0] if "--dry_run" not in arguments else "train --dry_run"
    assert refused(*arguments) == (
        f"memlayers {what} runs in one process: start it without torchrun, which has started 3"
    )
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", "")  # one of each machine says it
