"""Kill processes that train a table in files, cut the power, fill the disk: is the last checkpoint there, bit for bit?

    python benchmarks/kill_tables.py --kills 50
    python benchmarks/kill_tables.py --cuts 1000
    python benchmarks/kill_tables.py --disk FOLDER      of a small file system that this may fill, as of
                                                        mount -t tmpfs -o size=3m tmpfs FOLDER

Kills: SIGKILL at random moments, each time what the last checkpoint was must come back, and the training goes on to the
end as if it had never stopped. Cuts: power losses (`power_loss`) at random moments of training, of checkpoints and of
the putting back itself; some of them are gone on from. A full disk: an `OSError`, and nothing has changed.
"""

import errno
import hashlib
import io
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli

from memlayers.config import MemoryConfig
from memlayers.layer import MemoryLayer
from memlayers.optim import RowAdam
from memlayers.storage import MappedFile, MappedTable
from power_loss import Disk

CONFIG = MemoryConfig(dim=96, heads=2, topk=4, num_subkeys=16, query_dim=8, query_norm="none")
TOKENS = 3


def build(folder: Path) -> tuple[MemoryLayer, MappedTable, RowAdam]:
    """A layer whose table is in the folder; all else is the same each time."""
    torch.manual_seed(0)
    layer = MemoryLayer(CONFIG, values=MappedFile(folder))
    assert isinstance(layer.values, MappedTable)
    return layer, layer.values, RowAdam(layer.values)


def step(layer: MemoryLayer, optimizer: RowAdam, number: int) -> None:
    """Step `number`, which is the same each time."""
    x = torch.randn(TOKENS, CONFIG.dim, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    (layer(x) - 1).square().mean().backward()
    optimizer.step()


def digest(table: MappedTable) -> str:
    """Of the bits of all rows and states; rows that were not written count as they are drawn."""
    files = table._files
    parts = [files.as_bytes(files.rows(np.arange(files.slots)))]
    states = [files.states[name] for name in sorted(files.states)]
    parts += [file.take(np.arange(files.slots)) for file in states if file.tensor.any()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


# Kills.


def _child(folder: Path, steps: int, every: int, tell: int) -> None:
    """Trains on from the last checkpoint, of which there is one each `every` steps; tells of its first step."""
    layer, table, optimizer = build(folder)
    for number in range(table.checkpoints[-1] * every, steps):
        step(layer, optimizer, number)
        os.write(tell, b"x")
        if (number + 1) % every == 0:
            table.checkpoint()
    table.close()


def _in_child(function: Callable[[], None]) -> int:
    if child := os.fork():
        return child
    try:
        function()
    finally:
        os._exit(0)


def kill(kills: int, seed: int, folder: Path, *, steps: int = 120, every: int = 3) -> dict[str, float]:
    """Kills, and compares what is found after each with what training that was not killed had at that checkpoint."""
    draw = random.Random(seed)
    expected = _expected(folder / "whole", steps, every)
    found: dict[str, float] = {"kills": 0, "wrong": 0, "runs": 0, "with_logs": 0}
    number = 0
    while found["kills"] < kills:
        place = folder / f"run-{number}"
        listen, tell = os.pipe()
        child = _in_child(lambda place=place, tell=tell: _child(place, steps, every, tell))
        os.close(tell)
        if draw.random() < 0.8:  # else while it starts
            os.read(listen, 1)
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(listen)
        was_killed = os.WIFSIGNALED(status)
        found["kills"] += was_killed
        found["with_logs"] += any(place.glob("undo-*.log"))
        last = _state_in_child(place)
        if last is None:  # before there was a table
            continue
        found["wrong"] += last[1] != expected[last[0]]
        if not was_killed:
            found["wrong"] += last[0] != steps // every
            found["runs"] += 1
            shutil.rmtree(place)
            number += 1
    return found


def _expected(folder: Path, steps: int, every: int) -> list[str]:
    """The digest of each checkpoint of training that nobody stops; in a child, for threads do not survive forks."""
    file = folder.with_suffix(".txt")

    def train() -> None:
        layer, table, optimizer = build(folder)
        digests = [digest(table)]
        for number in range(steps):
            step(layer, optimizer, number)
            if (number + 1) % every == 0:
                digests.append(digest(table))
        file.write_text("\n".join(digests))

    os.waitpid(_in_child(train), 0)
    return file.read_text().split("\n")


def _state_in_child(folder: Path) -> tuple[int, str] | None:
    """The checkpoint that whoever opens the folder finds, and the digest of what is there."""
    file = folder.with_suffix(".txt")
    file.unlink(missing_ok=True)
    if not (folder / "table.json").exists():
        return None

    def look() -> None:
        _, table, _ = build(folder)
        file.write_text(f"{table.checkpoints[-1]} {digest(table)}")

    os.waitpid(_in_child(look), 0)
    number, found = file.read_text().split()
    return int(number), found


# Cuts.


class Cuts:
    """Power losses while a table is trained, each verified at once, and some gone on from."""

    def __init__(self, folder: Path, seed: int, *, share: float = 0.05):
        self.cuts = self.wrong = self.lives = 0
        self._folder, self._draw, self._share = folder, random.Random(seed), share
        self._acceptable: dict[int, str] = {}  # by checkpoint, what it is

    def run(self, cuts: int) -> None:
        """Lives of a table, each from what a cut has left, until there were so many cuts."""
        place = self._folder / "life-0"
        place.mkdir()
        _, table, _ = build(place)
        self._acceptable = {0: digest(table)}
        table.close()
        while self.cuts < cuts:
            self.lives += 1
            disk = Disk(place, self._after_event)
            with disk.recording():
                layer, table, optimizer = build(place)  # which puts back what the life before has left
                self._acceptable = {number: self._acceptable[number] for number in table.checkpoints}
                for _ in range(self._draw.randrange(1, 8)):
                    self._do_something(disk, layer, table, optimizer)
            following = self._folder / f"life-{self.lives}"
            disk.image(following, self._draw)
            table.close()
            shutil.rmtree(place)
            place = following

    def _do_something(self, disk: Disk, layer: MemoryLayer, table: MappedTable, optimizer: RowAdam) -> None:
        action = self._draw.random()
        if action < 0.15 and len(table.checkpoints) > 1:
            number = self._draw.choice(table.checkpoints)
            table.restore(number)
            self._acceptable = {one: known for one, known in self._acceptable.items() if one <= number}
        elif action < 0.35:
            self._acceptable[table.checkpoints[-1] + 1] = digest(table)
            table.checkpoint(keep=2)
        else:
            step(layer, optimizer, self._draw.randrange(10_000))
        disk.look()

    def _after_event(self, disk: Disk) -> None:
        if self._draw.random() >= self._share:
            return
        place = self._folder / "cut"
        disk.image(place, self._draw)
        try:
            _, table, optimizer = build(place)
            optimizer.release()
            found = table.checkpoints[-1], digest(table)
            is_right = self._acceptable.get(found[0]) == found[1]
            table.close()
        except ValueError:
            is_right = False
        self.cuts += 1
        self.wrong += not is_right
        shutil.rmtree(place)


# A full disk.


def fill_disk(disk: Path) -> dict[str, float]:
    """Trains until the disk is full, and goes on from its last checkpoint; the steps that failed changed nothing."""
    layer, table, optimizer = build(disk / "table")
    step(layer, optimizer, 0)
    table.checkpoint()
    expected, errors, changed = digest(table), 0, 0
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        _fill_up(ballast)
        for number in range(1, 200):
            ballast.truncate(max(0, ballast.tell() - 4096))
            ballast.seek(0, os.SEEK_END)
            before = digest(table)
            try:
                step(layer, optimizer, number)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                errors += 1
                changed += digest(table) != before
    table.close()
    (disk / "ballast").unlink()
    _, table, _ = build(disk / "table")
    return {"errors": errors, "changed": changed, "wrong": digest(table) != expected}


def _fill_up(file: io.FileIO) -> None:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def main(kills: int = 0, cuts: int = 0, disk: str | None = None, seed: int = 0) -> None:
    """Says what happened, and ends with 1 if anything was lost.

    Args:
        kills: processes to be killed.
        cuts: power losses.
        disk: the folder of a small file system, to be filled.
        seed: of the moments.
    """
    torch.set_num_threads(1)
    wrong: float = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        if kills:
            found = kill(kills, seed, Path(folder))
            wrong += found["wrong"]
            print(f"kills: {found}")
        if disk is not None:
            found = fill_disk(Path(disk))
            wrong += found["wrong"] + found["changed"] + (found["errors"] == 0)
            print(f"full disk: {found}")
        if cuts:
            losses = Cuts(Path(folder), seed)
            losses.run(cuts)
            wrong += losses.wrong
            print(f"cuts: {losses.cuts}, in {losses.lives} lives, wrong: {losses.wrong}")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
