import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from memlayers.lm.build import build_model
from memlayers.lm.run import RunFolder
from memlayers.lm.train import Loop, train

TIMES = {"seconds", "tokens_per_s", "words_per_s"}


def variant(config, **changes):
    """A configuration with some fields of its sections changed."""
    sections = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **sections)


@pytest.fixture
def config(tiny_config):
    """Twenty steps with a window of figures every third, all sources of randomness, checkpoints off that beat."""
    return variant(
        tiny_config,
        model={"dropout": 0.1},
        memory={"value_dropout": 0.1, "query_dropout": 0.1},
        training={"tokens": 64 * 20, "accumulate": 2, "eval_every_tokens": 64 * 8, "save_every_tokens": 64 * 5},
    )


@pytest.fixture
def stop(monkeypatch):
    """Have the step that follows so many steps end the process's work."""
    original = Loop.forward_backward
    at = {"step": None}

    def forward_backward(self, batches):
        if self.step == at["step"]:
            raise KeyboardInterrupt
        return original(self, batches)

    monkeypatch.setattr(Loop, "forward_backward", forward_backward)

    def after(step):
        at["step"] = step

    return after


@pytest.fixture
def stopped(config, tiny_corpus, tmp_path, stop):
    """The folder of a run that stopped after twelve steps; its last checkpoint is of step 10."""
    stop(12)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    stop(None)
    return RunFolder(tmp_path / "run")


def lines(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(folder).read_metrics()]


@pytest.mark.parametrize("kind", ["memory", pytest.param("llama without a memory", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_ends_as_if_it_never_was(config, tiny_corpus, tmp_path, stop, kind):
    if kind != "memory":
        config = variant(config, model={"family": "llama"}, memory_layers=())
    said = []
    whole = train(config, tmp_path / "whole", corpus=tiny_corpus, progress=False)
    for step in (3, 7, 11, 19):
        stop(step)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    stop(None)
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True, say=said.append)

    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 21))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert result["validation"] == whole["validation"]
    assert result["training"]["tokens"] == whole["training"]["tokens"]
    assert [{k: v for k, v in point.items() if k != "seconds"} for point in result["curve"]] == [
        {k: v for k, v in point.items() if k != "seconds"} for point in whole["curve"]
    ]
    ours, theirs = (RunFolder(tmp_path / name).load_model().state_dict() for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert said == [
        f"{tmp_path / 'run'} has no checkpoint yet: the run begins again",
        "going on from the checkpoint of step 5",
        "going on from the checkpoint of step 10",
        "going on from the checkpoint of step 15",
    ]


def test_the_loss_scaler_of_float16_goes_on_too(config, tiny_corpus, tmp_path, stop, monkeypatch):
    monkeypatch.setattr("memlayers.lm.train.resolve_precision", lambda asked, device: "fp16")
    config = variant(config, memory_layers=())
    original, scales = Loop.checked_norm, []

    def overflow(self, loss):
        if self.step == 2:
            next(self.model.parameters()).grad[0] = math.inf
        scales.append((self.step, self.scaler.get_scale()))
        return original(self, loss)

    monkeypatch.setattr(Loop, "checked_norm", overflow)
    train(config, tmp_path / "whole", corpus=tiny_corpus, progress=False)
    whole, scales[:] = list(scales), []
    stop(12)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    stop(None)
    scales.clear()
    train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
    assert scales == whole[10:]
    assert scales[0] == (10, 32768.0)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_all_random_generators_go_on(config, tiny_corpus, tmp_path, stop, monkeypatch):
    """Those of Python and NumPy, too, which a user's own layer may draw from."""
    draws, original = {}, Loop.finish_step

    def draw(self, line):
        draws.setdefault(line["step"], []).append((random.random(), np.random.rand(), torch.rand(()).item()))
        return original(self, line)

    monkeypatch.setattr(Loop, "finish_step", draw)
    stop(12)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    stop(None)
    random.seed(1)
    np.random.seed(1)
    train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
    assert [step for step, drawn in draws.items() if len(drawn) == 2] == [11, 12]
    assert all(first == again for first, again in (drawn for drawn in draws.values() if len(drawn) == 2))


def test_tensorboard_shows_each_step_once(stopped, config, tiny_corpus):
    """What the stopped process wrote after its last checkpoint is hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    assert len(list(stopped.tensorboard.iterdir())) == 2
    events = EventAccumulator(str(stopped.tensorboard)).Reload()
    held = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    found = stopped.read_metrics()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert held["train/grad_norm"] == pytest.approx({line["step"]: line["grad_norm"] for line in found})
    assert held["train/loss"] == pytest.approx({line["step"]: line["mean_loss"] for line in found})
    assert held["eval/perplexity"] == pytest.approx(
        {line["step"]: line["eval_perplexity"] for line in found if "eval_perplexity" in line}
    )
    assert {"train/usage/transformer.h.1.mlp.memory", "eval/usage/transformer.h.1.mlp.memory"} <= set(held)


def test_seconds_go_on_too(stopped, config, tiny_corpus):
    before = [line["seconds"] for line in stopped.read_metrics() if "seconds" in line and line["step"] <= 10]
    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    seconds = [line["seconds"] for line in stopped.read_metrics() if "seconds" in line]
    assert seconds[: len(before)] == before
    assert seconds == sorted(seconds)


def test_a_finished_run_leaves_no_checkpoints_and_is_left_alone(stopped, config, tiny_corpus):
    assert [path.name for path in sorted(stopped.checkpoints.iterdir())] == ["step-00000005", "step-00000010"]
    result = train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    assert not stopped.checkpoints.exists()
    before = {path: path.stat().st_mtime_ns for path in stopped.path.rglob("*")}
    said = []
    assert train(config, stopped.path, corpus=tiny_corpus, resume=True, progress=False, say=said.append) == result
    assert said == [f"{stopped.path} holds a finished run, which is left as it is"]
    assert {path: path.stat().st_mtime_ns for path in stopped.path.rglob("*")} == before


def test_how_often_and_how_many_may_change(stopped, config, tiny_corpus):
    config = variant(config, training={"save_every_tokens": 64 * 2, "keep_checkpoints": 1})
    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    assert stopped.finished


def test_another_configuration_is_refused_with_its_differences(stopped, config, tiny_corpus, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in stopped.path.rglob("*")}
    other = variant(config, training={"learning_rate": 0.5}, memory={"topk": 3})
    with pytest.raises(ValueError, match=r"differs in \(there, asked for\): memory.topk: 2, 3; training.learning_rate"):
        train(other, stopped.path, corpus=tmp_path / "not prepared for this", progress=False, resume=True)
    assert {path: path.stat().st_mtime_ns for path in stopped.path.rglob("*")} == before
    assert not (tmp_path / "not prepared for this").exists()


def test_other_text_is_refused(stopped, config, tiny_corpus):
    manifest = {**tiny_corpus.manifest, "corpus_sha256": "0" * 64}
    other = dataclasses.replace(tiny_corpus, manifest=manifest)
    with pytest.raises(ValueError, match="on the same text to be resumed, .* was trained with another corpus"):
        train(config, stopped.path, corpus=other, progress=False, resume=True)


def test_a_damaged_checkpoint_is_refused_and_an_older_one_can_be_used(stopped, config, tiny_corpus):
    folder = stopped.checkpoints / "step-00000010"
    file = folder / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged")):
        train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    for path in (*folder.iterdir(), folder):
        path.rmdir() if path.is_dir() else path.unlink()
    said = []
    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert said == ["going on from the checkpoint of step 5"]


def test_an_incomplete_checkpoint_is_skipped_and_said(stopped, config, tiny_corpus):
    (stopped.checkpoints / ".step-00000012.abcd.partial").mkdir()
    said = []
    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert said == [
        "the checkpoint step-00000012 was not complete and is skipped",
        "going on from the checkpoint of step 10",
    ]


def test_a_half_written_line_is_cut_and_a_lost_one_refused(stopped, config, tiny_corpus):
    whole = stopped.metrics.read_bytes()
    stopped.metrics.write_bytes(whole[:100])
    events = list(stopped.tensorboard.iterdir())
    with pytest.raises(ValueError, match="metrics.jsonl is damaged: it has 100 bytes"):
        train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    assert list(stopped.tensorboard.iterdir()) == events
    stopped.metrics.write_bytes(whole + b'{"step": 13, "lo')
    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    assert [line["step"] for line in lines(stopped.path)] == list(range(1, 21))


def test_another_precision_is_refused(stopped, config, tiny_corpus, monkeypatch):
    """What "auto" means depends on the machine."""
    monkeypatch.setattr("memlayers.lm.train.resolve_precision", lambda asked, device: "bf16")
    with pytest.raises(ValueError, match="was trained in fp32, which means bf16 on this machine"):
        train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(stopped, config, tiny_corpus, monkeypatch):
    finished = []

    def build(*args, **kwargs):
        if not finished:
            finished.append(True)
            train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
        return build_model(*args, **kwargs)

    monkeypatch.setattr("memlayers.lm.train.build_model", build)
    said = []
    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert said == [f"{stopped.path} holds a finished run, which is left as it is"]
    assert not (stopped.path / ".replaced").exists()


def test_the_end_can_be_interrupted_too(config, tiny_corpus, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def end(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", end)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder.path, corpus=tiny_corpus, progress=False)
    assert folder.model.is_dir()
    (folder.path / ".model.0a1b.partial").mkdir()
    train(config, folder.path, corpus=tiny_corpus, progress=False, resume=True)
    assert folder.finished
    assert [line["step"] for line in lines(folder.path)] == list(range(1, 21))
    assert not list(folder.path.glob(".*"))


def test_resume_begins_a_run_where_there_is_none(tiny_config, tiny_corpus, tmp_path):
    said = []
    train(tiny_config, tmp_path / "new" / "run", corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert RunFolder(tmp_path / "new" / "run").finished
    assert said == []
    with pytest.raises(ValueError, match="overwrite must be False to resume"):
        train(tiny_config, tmp_path / "new" / "run", corpus=tiny_corpus, overwrite=True, resume=True)


@pytest.mark.promise(
    "Command line and files",
    "SIGTERM or SIGHUP while `memlayers train` runs (a cluster's notice, a closed terminal)",
    "supported",
    "the step is finished, a checkpoint of it written, the status is 128 + signal; `--resume` goes on from there. A "
    "second signal ends it at once",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_of_the_last_whole_step(config, tiny_corpus, tmp_path, monkeypatch, number):
    original = Loop.checked_norm

    def signalled(self, loss):
        if self.step == 6:  # in the middle of the seventh step
            os.kill(os.getpid(), number)
        return original(self, loss)

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "checked_norm", signalled)
        with pytest.raises(SystemExit) as ended:
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, say=said.append)
    assert ended.value.code == 128 + number
    checkpoints = tmp_path / "run" / "checkpoints"
    assert said == [f"ended by {number.name} after step 7, of which {checkpoints} has a checkpoint for --resume"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000005", "step-00000007"]
    train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert said[1:] == ["going on from the checkpoint of step 7"]
    train(config, tmp_path / "whole", corpus=tiny_corpus, progress=False)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_signal_in_the_last_step_ends_with_a_finished_run(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    original = Loop.finish_step

    def signalled(self, line):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, line)

    monkeypatch.setattr(Loop, "finish_step", signalled)
    with pytest.raises(SystemExit):
        train(tiny_config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert RunFolder(tmp_path / "run").finished


@pytest.mark.promise(
    "Command line and files",
    "a training whose standard error is closed, or a pipe that nobody reads",
    "supported",
    "messages and bars are dropped, the run goes on",
)
def test_a_broken_standard_error_does_not_end_a_training(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    train(tiny_config, tmp_path / "run", corpus=tiny_corpus, resume=True)
    train(tiny_config, tmp_path / "run", corpus=tiny_corpus, resume=True)  # which says that it is finished
    assert RunFolder(tmp_path / "run").finished


@pytest.mark.promise(
    "Command line and files",
    "`--resume` where `checkpoints/` is not there (a disk that is not mounted), though the metrics say that it was",
    "refused",
    "nothing is removed; bring the checkpoints back, or `--overwrite`",
)
@pytest.mark.parametrize("is_empty", [True, False])
def test_resume_does_not_begin_again_where_checkpoints_were(stopped, config, tiny_corpus, is_empty):
    shutil.rmtree(stopped.checkpoints)
    if is_empty:  # where a disk would be mounted
        stopped.checkpoints.mkdir()
    before = stopped.metrics.read_bytes()
    with pytest.raises(ValueError, match="metrics.jsonl has 12 steps, of which step 5 left one: bring them back"):
        train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
    assert stopped.metrics.read_bytes() == before


def test_resume_begins_again_where_no_checkpoint_was_due(config, tiny_corpus, tmp_path, stop):
    stop(5)  # the line of step 5 was written; whether its checkpoint was cannot be known
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, corpus=tiny_corpus, progress=False)
    stop(None)
    shutil.rmtree(tmp_path / "checkpoints")
    said = []
    train(config, tmp_path, corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert said == [f"{tmp_path} has no checkpoint yet: the run begins again"]


def test_a_folder_is_written_by_one_process(stopped, config, tiny_corpus):
    opened = f"os.open({str(stopped.path)!r}, os.O_RDONLY)"
    hold = f"import fcntl, os; fcntl.flock({opened}, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="output must be a folder that no other process writes to"):
            train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)
        other.stdin.write(b"\n")
        other.stdin.flush()
    train(config, stopped.path, corpus=tiny_corpus, progress=False, resume=True)


def test_a_finished_run_that_is_overwritten_goes_only_when_the_new_one_is_finished(
    tiny_config, tiny_corpus, tmp_path, stop
):
    folder = RunFolder(tmp_path / "run")
    train(tiny_config, folder.path, corpus=tiny_corpus, progress=False)
    first = json.loads(folder.result.read_text())
    for step in (2, 3):  # the second attempt replaces the first, not what the first had put aside
        stop(step)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config, folder.path, corpus=tiny_corpus, progress=False, overwrite=True)
    aside = RunFolder(folder.path / ".replaced")
    assert json.loads(aside.result.read_text()) == first
    assert aside.load_model() is not None
    assert not folder.finished
    stop(None)
    train(tiny_config, folder.path, corpus=tiny_corpus, progress=False, resume=True)
    assert not aside.path.exists()
