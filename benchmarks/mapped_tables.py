"""A table larger than memory, trained in files: how much memory it takes, and how fast it is, warm and cold.

    python benchmarks/mapped_tables.py --folder FOLDER --limit_gb 4

A step reads 256 tokens x 128 rows: 95 % of 200,000 rows that are scattered by a fixed permutation, the rest anywhere.
`warm` are steps after 200 others, as a share of the speed of a table in memory of 1M rows under the same distribution;
the steps after a checkpoint, which write each row that they are the first to change to the log, are given beside them;
`cold` are steps after the pages of the files were dropped, against faults one by one (MADV_RANDOM, nothing read ahead).
Each part runs in a process of its own. With `limit_gb` that of the files runs in a memory control group of its own,
whose limit counts the files' pages, too; where there is none to be had, RLIMIT_DATA bounds what is anonymous. The
folder needs some 10 GB for what is touched, and is empty afterwards.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from memlayers.optim import RowAdam
from memlayers.storage import MappedFile, MappedTable
from memlayers.values import ValueTable

WIDTH, TOKENS, READS, HOT_SHARE = 1024, 256, 128, 0.95


class Reads:
    """The slots of step after step: the same for each table of as many slots."""

    def __init__(self, slots: int, hot: int):
        self._draw = torch.Generator().manual_seed(0)
        self._slots = slots
        self._hot = torch.randperm(slots, generator=self._draw)[:hot]

    def next(self) -> tuple[Tensor, Tensor]:
        """Slots and weights of a step."""
        shape = TOKENS, READS
        hot = self._hot[torch.randint(len(self._hot), shape, generator=self._draw)]
        cold = torch.randint(self._slots, shape, generator=self._draw)
        is_hot = torch.rand(shape, generator=self._draw) < HOT_SHARE
        return torch.where(is_hot, hot, cold), torch.rand(shape, generator=self._draw).softmax(1)


def step(table: ValueTable, optimizer: RowAdam, given: tuple[Tensor, Tensor]) -> float:
    """Forward, backward, step; returns the loss."""
    optimizer.zero_grad()
    loss = (table.read(*given) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def memory() -> dict[str, float]:
    """Anonymous memory of this process, and its pages of files, in GB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) * 1024 / 1e9 for name in ("RssAnon", "RssFile")}


def times(table: ValueTable, optimizer: RowAdam, reads: Reads, steps: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, and the most memory after any."""
    seconds, most = [], memory()
    for _ in range(steps):
        given, start = reads.next(), time.perf_counter()
        step(table, optimizer, given)
        seconds.append(time.perf_counter() - start)
        most = {name: max(size, most[name]) for name, size in memory().items()}
    return seconds, most


def in_memory(slots: int, hot: int, warm_up: int, steps: int) -> dict[str, Any]:
    """The table in memory."""
    table = ValueTable(slots, WIDTH)
    optimizer, reads = RowAdam([table]), Reads(slots, hot)
    times(table, optimizer, reads, warm_up)
    seconds, most = times(table, optimizer, reads, steps)
    return {"step": median(seconds), **most}


def in_files(folder: str, slots: int, hot: int, warm_up: int, steps: int, cold: int, budget: float) -> dict[str, Any]:
    """The table in files."""
    table = MappedFile(folder, budget_bytes=int(budget * 1e9)).make_table(slots, WIDTH)
    optimizer, reads = RowAdam([table]), Reads(slots, hot)
    first, most_at_first = times(table, optimizer, reads, warm_up)
    before = table.figures()
    seconds, most = times(table, optimizer, reads, steps)
    figures = {name: after - before[name] for name, after in table.figures().items()}
    start, log = time.perf_counter(), table.figures()["logged_bytes"]
    table.checkpoint()
    checkpoint = time.perf_counter() - start
    after, _ = times(table, optimizer, reads, steps)
    found: dict[str, Any] = {
        "virtual_gb": 3 * slots * WIDTH * 4 / 1e9,
        "first_step": first[0],
        "step": median(seconds),
        "checkpoint": checkpoint,
        "step_after_checkpoint": median(after),
        "hit_rate": 1 - figures["rows_read"] / figures["rows_asked"],
        "pages_a_step": figures["pages_read"] / steps,
        "logged_share": logged_share(table, table.figures()["logged_bytes"] - log),
        **{name: max(size, most_at_first[name]) for name, size in most.items()},
    }
    found["cold_step"] = median([cold_step(table, optimizer, reads) for _ in range(cold)])
    table._files.ahead.fetch = lambda *_: None  # type: ignore[method-assign]  # nothing is read ahead
    found["cold_step_by_faults"] = median([cold_step(table, optimizer, reads) for _ in range(cold)])
    found["disk_gb"] = table.figures()["disk_bytes"] / 1e9
    return found


def logged_share(table: MappedTable, logged: int) -> float:
    """Bytes of the log and of the next checkpoint, over those of the rows that have changed."""
    rows = len(table.changed_slots())
    row_bytes = sum(file.row_bytes for file in table._files.files.values())
    return (logged + table._files.slots / 8) / (rows * row_bytes)


def cold_step(table: MappedTable, optimizer: RowAdam, reads: Reads) -> float:
    """Seconds of a step whose rows are not in memory."""
    for file in table._files.files.values():
        file.flush()  # what is to be written cannot be dropped
    table._files.ahead.forget()
    for file in table._files.files.values():
        file.give_back()
        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    given, start = reads.next(), time.perf_counter()
    step(table, optimizer, given)
    return time.perf_counter() - start


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def losses_are_equal(folder: Path) -> bool:
    """Whether a small table in files has the losses of one in memory, bit for bit."""
    reads, losses = Reads(4096, 1024), []
    steps = [reads.next() for _ in range(4)]
    mapped = MappedFile(folder).make_table(4096, WIDTH)
    held = ValueTable(4096, WIDTH)
    mapped.fill()
    held.load_state_dict(mapped.state_dict())
    for table in (mapped, held):
        optimizer = RowAdam([table])
        losses.append([step(table, optimizer, given) for given in steps])
    mapped.close()
    return losses[0] == losses[1]


@contextmanager
def control_group(limit_gb: float) -> Iterator[Path | None]:
    """A memory control group of this run's own, or None where the system gives none."""
    own = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), "")
    root = Path("/sys/fs/cgroup/memory") / own.rpartition(":")[2].strip("/")
    group = root / f"memlayers-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(limit_gb * 1e9)))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def in_process(what: str, arguments: dict[str, Any], limit_gb: float | None = None) -> dict[str, Any]:
    """A part in a process of its own, with a limit of its memory."""

    def limit(group: Path | None) -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        elif limit_gb is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 1e9), int(limit_gb * 1e9)))

    def run(group: Path | None) -> dict[str, Any]:
        command = [sys.executable, __file__, "--part", what, "--arguments", json.dumps(arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=lambda: limit(group))
        return json.loads(done.stdout.splitlines()[-1]) | {"limited_by": str(group or limit_gb)}

    if limit_gb is None:
        return run(None)
    with control_group(limit_gb) as group:
        return run(group)


def main(
    folder: str = "",
    slots: int = 4_000_000,
    slots_in_memory: int = 1_000_000,
    hot: int = 200_000,
    warm_up: int = 200,
    steps: int = 20,
    cold: int = 3,
    budget_gb: float = 3.0,
    limit_gb: float | None = None,
    part: str | None = None,
    arguments: str = "{}",
) -> None:
    """Prints what was measured, as JSON.

    Args:
        folder: on the disk to be measured; new, or empty.
        slots: of the table in files.
        slots_in_memory: of the other.
        hot: rows that most reads are of.
        warm_up: steps that are not measured.
        steps: that are.
        cold: steps from dropped pages, of each kind.
        budget_gb: of the table's pages.
        limit_gb: of all memory of the process with the files.
        part: is used by this script itself.
        arguments: of the part.
    """
    if part is not None:
        print(json.dumps({"files": in_files, "memory": in_memory}[part](**json.loads(arguments))))
        return
    place = Path(folder)
    if not folder or (place.exists() and any(place.iterdir())):
        raise SystemExit("folder must be the name of a new folder, or of an empty one")
    try:
        same = losses_are_equal(place / "small")
        shared = {"hot": hot, "warm_up": warm_up, "steps": steps}
        files = {"folder": str(place / "large"), "slots": slots, "cold": cold, "budget": budget_gb, **shared}
        found = {"in_files": in_process("files", files, limit_gb)}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    found["in_memory"] = in_process("memory", {"slots": slots_in_memory, **shared})
    found["losses_are_equal"] = same
    found["warm_speed"] = found["in_memory"]["step"] / found["in_files"]["step"]
    found["cold_speed_over_faults"] = found["in_files"]["cold_step_by_faults"] / found["in_files"]["cold_step"]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
