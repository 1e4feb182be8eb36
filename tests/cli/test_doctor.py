"""memlayers doctor: what it examines, what it prints, and its exit status."""

import json
import random
import shutil

import pytest
import torch

from memlayers import MemoryConfig
from memlayers.cli import main
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.data import DataConfig, prepare
from memlayers.lm.run import RunFolder
from memlayers.lm.train import train
from memlayers.models import add_memory, causal_lm, memory_layers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and beside it `unfinished`, which holds a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    draw = random.Random(0)
    with open(folder / "text.jsonl", "w") as stream:
        for number in range(200):
            words = " ".join(
                draw.choice(["tea", "cup", "pot", "milk", "sun", "rain"]) + draw.choice("abcde") for _ in range(40)
            )
            stream.write(json.dumps({"id": number, "text": words}) + "\n")
    data = DataConfig(sources=(str(folder / "text.jsonl"),), vocab_size=280, holdout_percent=10)
    config = RunConfig(
        data=data,
        model=ModelConfig(layers=2, dim=16, heads=2, context=16),
        memory=MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8),
        memory_layers=(2,),
        training=TrainingConfig(tokens=64 * 8, batch_tokens=64, eval_every_tokens=64 * 4, eval_tokens=200),
    )
    corpus = prepare(data, folder / "corpus", progress=False)
    keep, removed = shutil.rmtree, []

    def keep_checkpoints(path, **options):
        if str(path).endswith("checkpoints"):
            removed.append(shutil.copytree(path, folder / "unfinished" / "checkpoints"))
        keep(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", keep_checkpoints)
        train(config, folder / "run", corpus=corpus, progress=False)
    return folder / "run"


def call(capsys, *arguments):
    status = main(["doctor", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_finished_run(run, capsys):
    status, out, err = call(capsys, run)
    assert (status, err) == (0, ""), out
    lines = out.splitlines()
    assert lines[0] == f"64 tokens: validation text of {run.parent / 'corpus'}"
    assert lines[1].endswith("passed") or "warned" in lines[1]
    assert any(line.startswith("  ok    written") for line in lines)
    assert any("MemoryAdamW" in line for line in lines)


def test_as_json(run, capsys):
    status, out, _ = call(capsys, run, "--json")
    content = json.loads(out)
    assert (status, content["ok"]) == (0, True)
    assert "written" in {finding["check"] for finding in content["findings"]}


def test_a_checkpoint_of_a_run(run, capsys):
    checkpoints = run.parent / "unfinished" / "checkpoints"
    step = max(checkpoints.glob("step-*"))
    status, out, err = call(capsys, step)
    assert (status, err) == (0, ""), out
    assert out.startswith(f"64 tokens: validation text of {run.parent / 'corpus'}")
    status, _, err = call(capsys, run.parent / "unfinished")
    assert status == 2
    assert "name one of its checkpoints" in err


def test_a_saved_model_and_random_tokens(tmp_path, capsys):
    model = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    (memory,) = memory_layers(model).values()
    memory.query.norm.weight.data.fill_(1e-5)
    memory.query.norm.bias.data.normal_()
    model.save_pretrained(tmp_path / "model")
    status, out, err = call(capsys, tmp_path / "model")
    assert (status, err) == (0, ""), out
    assert out.startswith("128 tokens: random tokens, so usage cannot fail")
    assert "WARN  usage" in out
    memory.values.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    status, out, err = call(capsys, tmp_path / "model")
    assert status == 1
    assert "its output is zero" in out
    assert err.startswith("memlayers: error: ")
    assert "checks failed" in err
    assert err.count("\n") == 1


def test_text_for_a_model_that_has_none(run, capsys):
    status, out, _ = call(capsys, RunFolder(run).model, "--corpus", run.parent / "corpus")
    assert status == 0, out
    assert "validation text" in out


def test_what_is_refused(run, refused, tmp_path):
    assert "checkpoint must be the folder of a run" in refused("doctor", tmp_path)
    assert "memlayers doctor needs CHECKPOINT" in refused("doctor")
    assert "corpus" in refused("doctor", run, "--corpus", tmp_path)
    causal_lm("gpt2", vocab_size=40, layers=1, dim=16, heads=2, context=32).save_pretrained(tmp_path / "plain")
    assert "model must have at least one memory" in refused("doctor", tmp_path / "plain")
    broken = shutil.copytree(run.parent / "unfinished", tmp_path / "broken") / "checkpoints"
    step = max(broken.glob("step-*"))
    with open(step / "model.safetensors", "r+b") as stream:
        stream.seek(-3, 2)
        stream.write(b"xxx")
    assert "is damaged" in refused("doctor", step)
    shutil.copytree(RunFolder(run).model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    assert "model.safetensors must be a file of safetensors" in refused("doctor", tmp_path / "model")


def test_the_model_is_not_changed_on_disk(run, capsys):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    torch.manual_seed(0)
    call(capsys, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
