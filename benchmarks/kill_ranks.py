"""Kill a rank of a training under torchrun at random moments, resume the training, and see whether anything was lost.

    python benchmarks/kill_ranks.py --kills 50

Small trainings in several processes, by `memlayers train` and by a loop of one's own in turn, lose a random rank by
SIGKILL at a random moment: from the start of their processes on, or after a random step. The rest must end within 60 s,
with an error; then the training is resumed, until it finishes. It must be bit for bit one that lost no rank: losses,
and the model. Each kill leaves a line of JSON, and so does each training that finished. Linux only.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kill_and_resume import fingerprint, small_run, write_text
from memlayers import MemoryConfig, MemoryLayer
from memlayers.launch import is_launched
from memlayers.lm.data import prepare
from memlayers.optim import MemoryAdamW

MOST_SECONDS = 60.0  # until the rest have ended
SAVE_EVERY = 7


# A loop of one's own.


def own_loop(folder: Path, steps: int) -> None:
    """Trains in all processes; rank 0 writes the loss of each step, and a checkpoint after some. Goes on with one."""
    dist.init_process_group("gloo")
    rank, checkpoint, losses = dist.get_rank(), folder / "checkpoint.pt", folder / "losses.txt"
    torch.manual_seed(0)
    config = MemoryConfig(dim=16, heads=2, topk=4, num_subkeys=16, query_dim=8, query_norm="rms")
    model = nn.Sequential(nn.Linear(16, 16), MemoryLayer(config), nn.Linear(16, 16))
    optimizer = MemoryAdamW(model, lr=1e-2, value_lr=1e-2)
    replica = DistributedDataParallel(model)
    first = 0
    if checkpoint.is_file():
        held = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"]
    dist.barrier()  # all have read it
    written = losses.read_text().splitlines()[:first] if losses.is_file() else []
    for step in range(first, steps):
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
        loss = (replica(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            written.append(float(loss).hex())
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                _replace(losses, lambda aside: aside.write_text("\n".join(written)))
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                _replace(checkpoint, lambda aside, state=state: torch.save(state, aside))
    if rank == 0:
        bits = b"".join(one.detach().contiguous().view(-1).view(torch.uint8).numpy() for one in model.parameters())
        _replace(folder / "model.txt", lambda aside: aside.write_text(hashlib.sha256(bits).hexdigest()))
    dist.destroy_process_group()


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    aside = file.with_name(f".{file.name}")
    write(aside)
    aside.replace(file)


# What is killed.


@dataclasses.dataclass(frozen=True)
class Script:
    """A training under torchrun."""

    name: str
    command: Callable[[Path], list[str]]  # that goes on with the training of a folder
    found: Callable[[Path], Any]  # in the end, all that must be equal
    step: Callable[[Path], int]  # of what is on disk


def train_script(folder: Path, steps: int) -> Script:
    """`memlayers train`."""
    config = small_run(steps, SAVE_EVERY)
    write_text(folder / "text.txt")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(str(folder / "text.txt"),)))
    prepare(config.data, folder / "corpus", progress=False)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))

    def command(run: Path) -> list[str]:
        options = {"config": folder / "config.json", "corpus": folder / "corpus", "output": run}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return ["-m", "memlayers", "train", *words, "--resume"]

    def step(run: Path) -> int:
        metrics = run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    return Script("train", command, fingerprint, step)


def loop_script(folder: Path, steps: int) -> Script:
    """The loop above."""

    def command(run: Path) -> list[str]:
        run.mkdir(exist_ok=True)
        return [str(Path(__file__).resolve()), str(run), str(steps)]

    def step(run: Path) -> int:
        return len((run / "losses.txt").read_text().splitlines()) if (run / "losses.txt").is_file() else 0

    def found(run: Path) -> Any:
        return [(run / name).read_text() for name in ("losses.txt", "model.txt")]

    return Script("loop", command, found, step)


class Launch:
    """A training that torchrun started, once its processes are there."""

    def __init__(self, script: Script, run: Path, ranks: int):
        self._log = run.parent / f"{run.name}.log"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self._log, "wb") as log:
            command = [*launcher, *script.command(run)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.ranks: dict[int, int] = {}  # rank -> process
        while len(self.ranks) < ranks:
            if self.process.poll() is not None:
                raise RuntimeError(f"torchrun ended before its processes began:\n{self.said()}")
            self.ranks = _children(self.process.pid)
            time.sleep(0.01)
        self.started = time.perf_counter()

    def ends_within(self, seconds: float) -> bool:
        """Waits for torchrun, at most so long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ends_before(self, step: int, steps_made: Callable[[], int]) -> bool:
        """Waits for torchrun, at most until so many steps are on disk."""
        while steps_made() < step and self.process.poll() is None:
            time.sleep(0.01)
        return self.process.poll() is not None

    def kill(self, rank: int) -> bool:
        """By SIGKILL; False: it had ended by itself."""
        try:
            os.kill(self.ranks[rank], signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def left(self) -> list[int]:
        """Ranks whose processes are there still; they are ended."""
        found = [rank for rank, process in self.ranks.items() if Path(f"/proc/{process}").exists()]
        if found or self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            for rank in found:
                os.kill(self.ranks[rank], signal.SIGKILL)
            self.process.wait()
        return found

    def said(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-3000:]

    def error(self) -> str:
        """The error of a rank that was left, or of torchrun."""
        lines = self._log.read_text(errors="replace").splitlines()
        wanted = ("memlayers: error:", "gloo", "Connection", "SIGKILL", "Signal 9")
        return next((line.strip()[:200] for word in wanted for line in lines if word in line), "")


def _children(parent: int) -> dict[int, int]:
    """The ranks among the children of a process, and their processes."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                words = (status.parent / "environ").read_bytes().split(b"\0")
                rank = next((word[5:] for word in words if word.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank)] = int(status.parent.name)
        except (OSError, ValueError):  # it has ended
            continue
    return found


def run_kills(
    folder: Path, *, kills: int, steps: int, ranks: int = 2, seed: int = 0, scripts: Sequence[str] = ("train", "loop")
) -> bool:
    """Kills a rank as many times, and has each training come to its end; whether all was as it must be."""
    draw, makers = random.Random(seed), {"train": train_script, "loop": loop_script}
    known = {name: makers[name](folder, steps) for name in scripts}
    whole, usual = {}, {}
    for name, script in known.items():
        launch = Launch(script, folder / f"{name}-whole", ranks)
        if not launch.ends_within(600) or launch.process.returncode:
            launch.left()
            raise RuntimeError(f"a training that was left alone failed:\n{launch.said()}")
        usual[name], whole[name] = time.perf_counter() - launch.started, script.found(folder / f"{name}-whole")
    numbers, killed, is_good, is_open = dict.fromkeys(known, 0), 0, True, dict.fromkeys(known, False)
    while killed < kills or any(is_open.values()):
        name = scripts[killed % len(scripts)] if killed < kills else next(one for one in scripts if is_open[one])
        script, run = known[name], folder / f"{name}-{numbers[name]}"
        launch, is_open[name] = Launch(script, run, ranks), True
        # By turns of both scripts: at any time, or in the middle of the steps.
        aim = 0
        if killed // len(scripts) % 2 and killed < kills:
            aim = draw.randrange(min(script.step(run), steps - 1) + 1, steps + 1)
        if aim:
            launch.ends_before(aim, lambda script=script, run=run: script.step(run))
        moment, rank = draw.uniform(0, 0.2 if aim else usual[name]), draw.randrange(ranks)
        has_finished = launch.ends_within(moment if killed < kills else 600)
        if not has_finished and killed < kills and not launch.kill(rank):
            has_finished = launch.ends_within(MOST_SECONDS)
        if has_finished:
            is_equal = launch.process.returncode == 0 and script.found(run) == whole[name]
            _say(script=name, run=numbers[name], finished=launch.process.returncode == 0, equal=is_equal)
            if not is_equal:
                raise RuntimeError(f"a training that was resumed failed, or is another one:\n{launch.said()}")
            shutil.rmtree(run)
            numbers[name], is_open[name] = numbers[name] + 1, False
            continue
        if killed >= kills:
            launch.left()
            raise RuntimeError(f"a training that was resumed does not end:\n{launch.said()}")
        clock = time.perf_counter()
        has_ended = launch.ends_within(MOST_SECONDS)
        seconds, left = time.perf_counter() - clock, launch.left()
        is_right = has_ended and not left and launch.process.returncode != 0 and bool(launch.error())
        killed, is_good = killed + 1, is_good and is_right
        _say(
            kill=killed,
            script=name,
            run=numbers[name],
            rank=rank,
            aim=aim,
            after_s=round(time.perf_counter() - launch.started - seconds, 2),
            step=script.step(run),
            ended_s=round(seconds, 2),
            status=launch.process.returncode,
            left=left,
            right=is_right,
            error=launch.error(),
        )
    return is_good


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main(kills: int = 50, steps: int = 150, ranks: int = 2, seed: int = 0) -> None:
    """Kill ranks, and resume.

    Args:
        kills: SIGKILLs in all.
        steps: of a training.
        ranks: processes of each.
        seed: of the moments and the ranks.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        is_good = run_kills(Path(folder), kills=kills, steps=steps, ranks=ranks, seed=seed)
    _say(kills=kills, ranks=ranks, seed=seed, seconds=round(time.perf_counter() - started), good=is_good)
    sys.exit(not is_good)


if __name__ == "__main__":
    if is_launched():
        own_loop(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        auto_cli(main)
