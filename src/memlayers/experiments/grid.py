"""The runs that are left of a grid: several at a time, each in a process of its own, until all have a record.

Whatever ends this process ends the others, which write a checkpoint before; whatever ends one of those has it begun
again, from its last checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from memlayers.checks import CommandFailed
from memlayers.experiments.records import GridFolder
from memlayers.experiments.work import run_work
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus
from memlayers.presentation import duration_text
from memlayers.signals import obey_missed

COMMAND = [sys.executable, "-m", "memlayers.experiments.worker"]
LOOK_EVERY = 0.2  # seconds
SAY_EVERY = 30.0  # seconds
ATTEMPTS = 3  # of a run whose process was killed
_CHECKPOINT_SECONDS = 300  # that a run may take for its last step and checkpoint


class Worker:
    """One run in its process."""

    def __init__(
        self, key: str, config: RunConfig, folder: GridFolder, corpus: Corpus, threads: int | None, keep_models: bool
    ) -> None:
        self.key, self.config = key, config
        self.folder = folder.runs / key
        self.log = folder.runs / f"{key}.log"
        request = {
            "key": key,
            "config": config.to_dict(),
            "folder": str(self.folder),
            "result": str(folder.result(key)),
            "corpus": str(corpus.folder),
            "threads": threads,
            "keep_models": keep_models,
        }
        some = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **some},
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others as by a signal
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process ended at once: its status says so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()  # it stays open: that it is says that this process is there

    def step(self) -> int:
        """Steps that the run has made."""
        return steps_made(self.folder)

    def end(self) -> None:
        """Ask the process to write a checkpoint and end; `close` waits for that."""
        if self.process.poll() is None:
            self.process.terminate()

    def close(self) -> None:
        """Wait for the end of the process, and make one."""
        try:
            self.process.wait(_CHECKPOINT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def complaint(self) -> str:
        """The last line that the process said."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self.process.returncode} and said nothing"


def steps_made(folder: Path) -> int:
    """The number of the last complete line in the metrics of a run."""
    try:
        with open(folder / "run" / "metrics.jsonl", "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            lines = stream.read().split(b"\n")
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0
    except (OSError, ValueError, KeyError):
        return 0


def run_grid(
    runs: Mapping[str, RunConfig],
    folder: GridFolder,
    corpus: Corpus,
    *,
    jobs: int,
    threads: int | None,
    keep_models: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Train every run, by its key, that has no record yet.

    Raises `CommandFailed`, when all others are done, if a run ended without a record.
    """
    folder.runs.mkdir(exist_ok=True)
    _remove_finished(folder, keep_models)
    waiting = [key for key in runs if not folder.result(key).is_file()]
    progress = _Progress(runs, folder, waiting, say)
    attempts = dict.fromkeys(waiting, 0)
    failures: dict[str, str] = {}
    with _workers() as working:
        while waiting or working:
            while waiting and len(working) < jobs:
                key = waiting.pop(0)
                attempts[key] += 1
                working.append(Worker(key, runs[key], folder, corpus, threads, keep_models))
            time.sleep(LOOK_EVERY)
            obey_missed()
            for worker in [one for one in working if one.process.poll() is not None]:
                working.remove(worker)
                worker.close()
                if folder.result(worker.key).is_file():
                    worker.log.unlink()
                elif worker.process.returncode < 0 and attempts[worker.key] < ATTEMPTS:
                    say(f"the process of run {worker.key} was killed: it goes on from its checkpoint")
                    waiting.insert(0, worker.key)
                else:
                    failures[worker.key] = worker.complaint()
                    say(f"run {worker.key} failed: {failures[worker.key]}")
            progress.show(working)
    _remove_finished(folder, keep_models)
    if failures:
        key, complaint = next(iter(failures.items()))
        raise CommandFailed(
            f"{len(failures)} of {len(runs)} runs could not be finished, the first is {folder.runs / key}: {complaint}"
        )


@contextmanager
def _workers() -> Iterator[list[Worker]]:
    """A list of workers; those that are in it when an error comes are ended, and waited for."""
    working: list[Worker] = []
    try:
        yield working
    finally:
        for worker in working:
            worker.end()
        for worker in working:
            worker.close()


def _remove_finished(folder: GridFolder, keep_models: bool) -> None:
    """Remove what a process that was killed left of runs that have a record."""
    for left in folder.runs.iterdir():
        if folder.result(left.stem).is_file():
            if left.is_file():
                left.unlink()
            elif not (keep_models and (left / "run" / "result.json").is_file()):
                shutil.rmtree(left)


class _Progress:
    """A line now and then: runs, tokens, and the time that is left at the rate so far."""

    def __init__(
        self, runs: Mapping[str, RunConfig], folder: GridFolder, waiting: list[str], say: Callable[[str], None]
    ) -> None:
        self._runs, self._folder, self._say = runs, folder, say
        self._steps = {
            key: steps_made(folder.runs / key) if key in waiting else config.training.steps
            for key, config in runs.items()
        }
        self._begun = time.monotonic()
        self._done_before = self._work()
        self._said = self._begun - SAY_EVERY + 5

    def _work(self) -> float:
        return sum(run_work(config) * self._steps[key] / config.training.steps for key, config in self._runs.items())

    def show(self, working: list[Worker]) -> None:
        now = time.monotonic()
        if now - self._said < SAY_EVERY:
            return
        self._said = now
        active = {worker.key: worker.step() for worker in working}
        for key, config in self._runs.items():
            self._steps[key] = active.get(key, self._steps[key])
            if self._folder.result(key).is_file():
                self._steps[key] = config.training.steps
        done, every = self._work(), sum(map(run_work, self._runs.values()))
        finished = sum(self._folder.result(key).is_file() for key in self._runs)
        tokens = sum(self._steps[key] * config.training.batch_tokens for key, config in self._runs.items())
        total = sum(config.training.steps * config.training.batch_tokens for config in self._runs.values())
        rate = (done - self._done_before) / (now - self._begun)
        left = f"{duration_text((every - done) / rate)} left" if rate > 0 else "time left not known yet"
        self._say(f"runs {finished}/{len(self._runs)}, tokens {tokens / 1e6:,.2f}/{total / 1e6:,.2f} M, {left}")
