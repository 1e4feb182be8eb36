"""`memlayers.lm.train` in two processes: one run, whose steps are those of one process with twice as many parts."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from memlayers.config import MemoryConfig
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.data import DataConfig, prepare
from memlayers.lm.run import RunFolder

TIMES = {"seconds", "tokens_per_s", "words_per_s"}
CONFIG = RunConfig(
    data=DataConfig(vocab_size=300, holdout_percent=10),
    model=ModelConfig(layers=2, dim=16, heads=2, context=16),
    memory=MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=4, query_dim=8, query_norm="rms"),
    memory_layers=(2,),
    training=TrainingConfig(
        tokens=64 * 6,
        batch_tokens=64,
        eval_every_tokens=64 * 3,
        save_every_tokens=64 * 2,
        eval_tokens=300,
        learning_rate=1e-2,
        max_grad_norm=0.1,
    ),
)


def variant(training=None, memory=None, model=None, **fields):
    sections = {"training": training, "memory": memory, "model": model}
    changed = {
        name: dataclasses.replace(getattr(CONFIG, name), **value)
        for name, value in sections.items()
        if value is not None
    }
    return dataclasses.replace(CONFIG, **changed, **fields)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, write_text):
    """The folder of a text in which a word depends on the one before it."""
    folder = tmp_path_factory.mktemp("text")
    data = dataclasses.replace(CONFIG.data, sources=(write_text(folder / "text.jsonl", documents=120),))
    return prepare(data, folder / "corpus", progress=False).folder


def trained(rank, config, folder, corpus, signalled=None, spoiled=None, stopped=None, resume=False, killed=None):
    """The result, the lines that were said, and what was raised.

    Args:
        signalled: a step after which rank 1 alone is sent a signal.
        spoiled: after so many steps rank 1 alone has a loss that is not a number.
        stopped: a step after which all are interrupted.
        killed: (rank, step, seconds): which rank kills itself, and so long after which step.
    """
    # Here and not above: who only collects these tests need not wait for it.
    import memlayers.lm.train as module
    from memlayers.lm.data import open_corpus
    from memlayers.lm.footprint import Footprint

    said, raised, result = [], None, None
    finish, loss_of = module.Loop.finish_step, module.Loop._loss

    def finish_step(loop, line):
        if loop.step == signalled and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if killed is not None and killed[:2] == (rank, loop.step):
            threading.Timer(killed[2], os.kill, (os.getpid(), signal.SIGKILL)).start()
        if loop.step == stopped:
            raise KeyboardInterrupt
        return finish(loop, line)

    def spoiled_loss(loop, *tokens):
        loss = loss_of(loop, *tokens)
        return loss * float("nan") if loop.step == spoiled and rank == 1 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Loop, "finish_step", finish_step)
        patch.setattr(module.Loop, "_loss", spoiled_loss)
        patch.setattr(module, "LOG_ENTRIES", 2)  # a window of figures has checkpoints in it
        patch.setattr(
            module,
            "require_memory",
            lambda *_, **__: Footprint(parameters=1, gradients=1, optimizer_state=1, activations=1),
        )
        try:
            text = open_corpus(corpus)
            result = module.train(config, folder, corpus=text, progress=False, resume=resume, say=said.append)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            raised = error
    return result, said, raised if raised is None else (type(raised).__name__, str(raised))


def lines(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(folder).read_metrics()]


def close(ours, theirs, rel, usage=1e-9):
    """Whether metrics are the same; figures of usage to rounding, since hits are summed in another order."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for name, value in line.items():
            assert value == pytest.approx(expected[name], rel=usage if "/" in name else rel, abs=0), name


def weights(folder):
    return RunFolder(folder).load_model().state_dict()


@pytest.mark.promise(
    "Several processes",
    "`memlayers train` and `memlayers compare` under `torchrun`",
    "supported",
    "each process reads its share of a batch, rank 0 writes; two are, bit for bit, one that accumulates two parts",
)
def test_two_processes_train_as_one_that_accumulates_two_parts(pair, start_ranks, corpus, tmp_path):
    # In a process of its own, too: what other tests leave in this one moves sums by rounding.
    with start_ranks(tmp_path, 1) as alone:
        [(one, _, raised)] = alone(trained, variant({"accumulate": 2}), tmp_path / "one", corpus)
    assert raised is None
    (result, said, raised), (other, other_said, _) = pair(trained, CONFIG, tmp_path / "two", corpus)
    assert raised is None
    assert other == result
    assert said == other_said == []
    assert (result["processes"], one["processes"]) == (2, 1)
    assert len(lines(tmp_path / "two")) == 6  # of one process alone
    close(lines(tmp_path / "two"), lines(tmp_path / "one"), 0)
    assert result["validation"]["nll"] == one["validation"]["nll"]
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_all_end_with_a_checkpoint_when_one_is_signalled_and_go_on_bit_for_bit(pair, corpus, tmp_path):
    config = variant({"accumulate": 2}, {"query_norm": "batch", "value_dropout": 0.1}, {"dropout": 0.1})
    pair(trained, config, tmp_path / "whole", corpus)
    ended = [(None, None, ("Stopped", "ended by SIGTERM"))] * 2
    found = pair(trained, config, tmp_path / "halves", corpus, 4)
    assert [(result, None, raised) for result, _, raised in found] == ended
    assert found[1][1] == []
    assert found[0][1] == [
        f"ended by SIGTERM after step 4, of which {tmp_path / 'halves' / 'checkpoints'} has a checkpoint for --resume"
    ]
    (_, said, raised), _ = pair(trained, config, tmp_path / "halves", corpus, None, None, None, True)
    assert raised is None
    assert said == ["going on from the checkpoint of step 4"]
    close(lines(tmp_path / "halves"), lines(tmp_path / "whole"), 0)
    ours, theirs = weights(tmp_path / "halves"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.promise(
    "Several processes",
    "`memlayers train --resume` with another number of processes",
    "supported",
    "the text is read in the same order; losses are the same to rounding. At the same number bit for bit",
)
def test_a_run_goes_on_with_another_number_of_processes(pair, corpus, tmp_path):
    config = variant({"accumulate": 2})
    trained(0, config, tmp_path / "whole", corpus)
    pair(trained, config, tmp_path / "run", corpus, None, None, 3)
    _, said, raised = trained(0, config, tmp_path / "run", corpus, stopped=5, resume=True)
    assert (raised[0], said) == ("KeyboardInterrupt", ["going on from the checkpoint of step 2"])
    (_, said, raised), _ = pair(trained, config, tmp_path / "run", corpus, None, None, None, True)
    assert (raised, said) == (None, ["going on from the checkpoint of step 4"])
    close(lines(tmp_path / "run"), lines(tmp_path / "whole"), 1e-5, usage=1e-3)


def test_what_one_process_finds_all_raise(pair, corpus, tmp_path):
    (_, _, raised), (_, _, other) = pair(trained, CONFIG, tmp_path / "run", corpus, None, 4)
    assert raised == other
    assert raised[0] == "Diverged"
    assert raised[1].startswith("stopped at step 5 of 6: the loss is nan. First not to be finite: the loss itself")
    assert raised[1].endswith("the last good checkpoint is of step 4")
    held = RunFolder(tmp_path / "run").metrics.read_bytes()
    found = pair(trained, CONFIG, tmp_path / "run", corpus)
    assert [kind for _, _, (kind, _) in found] == ["ValueError"] * 2
    assert "which holds a run that did not finish" in found[0][2][1]
    assert RunFolder(tmp_path / "run").metrics.read_bytes() == held


def test_a_batch_that_processes_cannot_share_is_refused(pair, corpus, tmp_path):
    for _, _, raised in pair(trained, variant({"accumulate": 4}), tmp_path / "run", corpus):
        assert raised == (
            "ValueError",
            "training.batch_tokens / training.accumulate must be a multiple of 2 windows of model.context = 16 for as "
            "many processes, got 1: change the batch, or start a number of processes that divides it",
        )
    assert not (tmp_path / "run").exists()


def test_processes_read_the_windows_of_a_part_in_the_order_of_one():
    from memlayers.distributed.processes import Processes
    from memlayers.lm.share import order_of_share

    order = np.arange(16)  # two steps of two parts of four windows
    assert order_of_share(order, 4, Processes()).tolist() == [*range(16)]
    read = []
    for rank in range(2):
        processes = Processes()
        processes.size, processes.rank = 2, rank
        read.append(order_of_share(order, 2, processes).tolist())
    assert read == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


@pytest.mark.slow
@pytest.mark.promise(
    "Several processes",
    "a process of `memlayers train` is killed",
    "supported",
    "the others end with a message that names the last checkpoint; `--resume` goes on bit for bit",
)
@pytest.mark.parametrize("seed", range(5))
def test_the_others_end_when_one_is_killed_and_the_run_goes_on(seed, tmp_path, corpus, start_ranks, pair):
    config = variant(
        {"tokens": 64 * 40, "eval_every_tokens": 64 * 10, "save_every_tokens": 64 * 3}, {"query_norm": "batch"}
    )
    draw = random.Random(seed)
    killed = draw.randrange(2), draw.randrange(1, 35), draw.uniform(0, 0.1)
    (tmp_path / "ranks").mkdir()
    with start_ranks(tmp_path / "ranks", 2) as call:
        found = call(trained, config, tmp_path / "run", corpus, None, None, None, False, killed)
    assert found[killed[0]] == "gone"
    _, _, (kind, message) = found[1 - killed[0]]
    assert kind == "ProcessLost"
    assert message.startswith("another process ended, which this one needs (")
    assert message.endswith(", from which --resume goes on")
    (_, _, raised), _ = pair(trained, config, tmp_path / "run", corpus, None, None, None, True)
    assert raised is None
    pair(trained, config, tmp_path / "whole", corpus)
    close(lines(tmp_path / "run"), lines(tmp_path / "whole"), 0)


@pytest.fixture
def torchrun(tmp_path, corpus):
    """Starts a command of memlayers in two processes of a tiny model, and returns the process that holds both."""
    options = {
        "data.vocab_size": 300,
        "data.holdout_percent": 10,
        "data.sources": corpus.parent / "text.jsonl",
        "model.layers": 1,
        "model.dim": 16,
        "model.heads": 2,
        "model.context": 16,
        "memory.num_subkeys": 4,
        "memory.topk": 2,
        "memory_layers": 1,
        "training.batch_tokens": 64,
        "training.eval_tokens": 300,
        "training.eval_every_tokens": 640,
        "corpus": corpus,
        "output": tmp_path / "run",
    }

    def start(command, **more):
        words = [word for name, value in (options | more).items() for word in (f"--{name}", str(value))]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "memlayers", command]
        return subprocess.Popen(
            [*launch, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.mark.slow
def test_a_comparison_under_torchrun_is_one_comparison(torchrun, tmp_path):
    out, err = (process := torchrun("compare", **{"training.tokens": 640})).communicate(timeout=500)
    assert process.returncode == 0, err
    assert out.count((tmp_path / "run" / "table.md").read_text()) == 1
    assert [line for line in err.splitlines() if line.startswith("[")] == [
        "[1/3] 1 layer: training on 640 tokens",
        "[2/3] 2 layers: training on 640 tokens",
        "[3/3] 1 layer + memory: training on 640 tokens",
    ]
    results = [RunFolder(folder).read_result() for folder in (tmp_path / "run").iterdir() if folder.is_dir()]
    assert [result["processes"] for result in results] == [2, 2, 2]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_torchrun_with_a_message(torchrun, tmp_path):
    process = torchrun("train", **{"training.tokens": 64 * 10**5})
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 15:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "memlayers: error: rank 0: another process ended, which this one needs (" in err
    assert "the last good checkpoint is of step " in err


@pytest.mark.slow
def test_an_error_before_the_work_is_said_once_under_torchrun(torchrun, tmp_path):
    process = torchrun("train", **{"training.tokens": 640, "training.accumulate": 4})
    _, err = process.communicate(timeout=500)
    assert process.returncode == 1
    assert err.count("memlayers: error: training.batch_tokens / training.accumulate must be a multiple of 2") == 1
    assert not (tmp_path / "run").exists()
