"""Kill a training at random moments, resume it, and see whether anything was lost.

    python benchmarks/kill_and_resume.py --kills 200

Small runs on one thread are ended by SIGKILL again and again, at random moments and, a quarter of the times, while a
checkpoint is being written; each is resumed until it finishes. Its metrics, line by line and bit for bit, and its model
must be those of a run that was never stopped, and no kill may cost more than one save interval.
"""

import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from memlayers.config import MemoryConfig
from memlayers.hardware import hardware, versions
from memlayers.lm.checkpoint import Checkpoints
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.data import DataConfig, open_corpus, prepare
from memlayers.lm.run import RunFolder
from memlayers.lm.train import train
from memlayers.ops import cpu

TIMES = {"seconds", "tokens_per_s", "words_per_s"}  # what no two runs have in common


@dataclass
class Kills:
    """What happened."""

    kills: int = 0
    in_checkpoints: int = 0  # of them, while a checkpoint was being written
    runs: int = 0  # that finished in the end
    differing: int = 0  # of them, that are not bit for bit the run that was never stopped
    most_steps_lost: int = 0
    save_interval: int = 0

    @property
    def passed(self) -> bool:
        return self.kills > 0 and self.runs > 0 and self.differing == 0 and self.most_steps_lost <= self.save_interval


def small_run(steps: int = 150, save_every: int = 7) -> RunConfig:
    """A run of `steps` short steps with everything in it that a checkpoint must bring back."""
    return RunConfig(
        data=DataConfig(sources=(), vocab_size=300),
        model=ModelConfig(layers=2, dim=16, heads=2, context=16, dropout=0.1),
        memory=MemoryConfig(dim=16, heads=2, topk=4, num_subkeys=8, query_dim=8, value_dropout=0.1),
        memory_layers=(2,),
        training=TrainingConfig(
            tokens=64 * steps,
            batch_tokens=64,
            accumulate=2,
            eval_every_tokens=64 * 40,
            eval_tokens=300,
            save_every_tokens=64 * save_every,
            learning_rate=1e-2,
        ),
    )


def write_text(file: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(50)]
    file.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(4000)))


def run_kills(folder: Path, *, kills: int, config: RunConfig, seed: int = 0) -> Kills:
    """Kill `kills` times in all, and let every run that was begun come to its end."""
    draw = random.Random(seed)
    write_text(folder / "text.txt")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(str(folder / "text.txt"),)))
    corpus = folder / "corpus"
    _must_finish(folder, lambda: prepare(config.data, corpus, progress=False))

    def work(name: str) -> None:
        train(config, folder / name, corpus=open_corpus(corpus), resume=True, progress=False)

    started = time.perf_counter()
    _must_finish(folder, lambda: work("whole"))
    usual_seconds = time.perf_counter() - started
    whole = fingerprint(folder / "whole")

    found = Kills(save_interval=config.training.save_every_steps)
    while found.kills < kills:
        run = folder / f"run-{found.runs}"
        while not RunFolder(run).finished:
            aims = found.kills % 4 == 3
            checkpoints = Checkpoints(RunFolder(run).checkpoints)
            left = _half_written(checkpoints)  # by earlier kills, if the process does not come to removing it
            child = _fork(folder, lambda run=run: work(run.name))
            is_over = found.kills >= kills  # let it finish
            if is_over:
                _wait(child, folder)
                break
            moment = draw.uniform(0, usual_seconds / 2)
            hit = _aim(child, run, draw.uniform(0, 0.03)) if aims else _sleep(child, folder, moment)
            if not hit:  # it was done first
                continue
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found.kills += 1
            found.in_checkpoints += bool(_half_written(checkpoints) - left)
            if RunFolder(run).metrics.is_file() and not RunFolder(run).finished:
                made = len(RunFolder(run).metrics.read_bytes().split(b"\n")) - 1
                found.most_steps_lost = max(found.most_steps_lost, made - (checkpoints.newest_step() or 0))
        found.runs += 1
        found.differing += fingerprint(run) != whole
        shutil.rmtree(run)
    return found


def fingerprint(run: Path) -> Any:
    """All that must be equal: every line but its times, the evaluation, and the hashes of the model's files."""
    folder = RunFolder(run)
    lines = [{name: value for name, value in line.items() if name not in TIMES} for line in folder.read_metrics()]
    result = folder.read_result()
    return lines, result["validation"], result["model_files"]


def _half_written(checkpoints: Checkpoints) -> set[Path]:
    return set(checkpoints.folder.glob(".step-*.partial"))


def _fork(folder: Path, work: Callable[[], Any]) -> int:
    """A process that does `work`. Forked, since starting Python anew would take longer than a run."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, folder: Path) -> None:
    _require_success(os.waitpid(child, 0)[1], folder)


def _require_success(status: int, folder: Path) -> None:
    if status:
        raise RuntimeError(f"a run failed instead of going on:\n{(folder / 'log.txt').read_text()[-2000:]}")


def _must_finish(folder: Path, work: Callable[[], Any]) -> None:
    _wait(_fork(folder, work), folder)


def _sleep(child: int, folder: Path, seconds: float) -> bool:
    """Wait; whether the process is still there."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if _has_ended(child, folder):
            return False
        time.sleep(0.001)
    return not _has_ended(child, folder)


def _aim(child: int, run: Path, seconds: float) -> bool:
    """Wait until a checkpoint is begun, and `seconds` longer."""
    checkpoints = RunFolder(run).checkpoints
    before = set(checkpoints.glob(".step-*"))
    while not set(checkpoints.glob(".step-*")) - before:
        if _has_ended(child, run.parent):
            return False
        time.sleep(0.0005)
    return _sleep(child, run.parent, seconds)


def _has_ended(child: int, folder: Path) -> bool:
    """Whether a process has ended by itself; one that failed ends all."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        _require_success(status, folder)
    return bool(pid)


def main(kills: int = 200, steps: int = 150, seed: int = 0) -> None:
    """Kill and resume.

    Args:
        kills: SIGKILLs in all.
        steps: of a run.
        seed: of the moments.
    """
    torch.set_num_threads(1)
    cpu.compile_all()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run_kills(Path(folder), kills=kills, config=small_run(steps), seed=seed)
    for name, value in dataclasses.asdict(found).items():
        print(f"{name.replace('_', ' '):<18} {value}")
    print(f"{'seconds':<18} {time.perf_counter() - started:.0f}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()), "|", hardware()["cpu"])
    sys.exit(not found.passed)


if __name__ == "__main__":
    auto_cli(main)
