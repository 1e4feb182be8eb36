"""TableFolder: the files of one table, and the checkpoints to which they can be put back.

    table.json            sealed: shape, dtype, seed of fresh rows, states, the checkpoints that are kept
    weight.rows           the rows, in the order of slots, sparse: a row that was never written takes no room
    exp_avg+exp_avg_sq.rows, steps.rows, ...
                          states of the optimizer, likewise; those of a row side by side, so that they are read at once
    written-00000001.bits the rows that had been written at checkpoint 1, a bit each
    undo-00000001.log     what rows were before they changed (`memlayers.storage.undo`), after a checkpoint

Rows change in place. A checkpoint flushes them, names what had been written, and from then on the next log keeps what
changes; to open a folder is to put back what the logs after its last checkpoint say. Rows that have not been written
are zeros in all files of states, and fresh ones are drawn by slot.

Letters: S slots, V width.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memlayers.files import file_aside, flush, read_sealed, write_sealed
from memlayers.storage.draw import draw_rows
from memlayers.storage.rows import Ahead, MappedRows
from memlayers.storage.undo import UndoLog, read_log

FORMAT = 2  # 1 had each state in a file of its own
DESCRIPTION, WEIGHT = "table.json", "weight"
_ROWS_AT_ONCE = 2**23  # bytes of a file's rows that are copied at a time


class Checkpoint(NamedTuple):
    """A state that the table can be put back to."""

    number: int
    log: int  # the first one after it
    bits: int  # of the checkpoint whose file says which rows had been written; 0: none


class TableFolder:
    """One table's files, open for this process alone.

    Args:
        folder: of the table; one that is not there, or is empty, gets a new table.
        slots: S.
        width: V.
        dtype: float32 or bfloat16.
        std: standard deviation of fresh rows.
        new_seed: called for the seed of a new table.
        budget_bytes: as of `Ahead`.

    Raises:
        ValueError: the folder holds another table or a damaged one, or another process has it.
        OSError: it cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        slots: int,
        width: int,
        *,
        dtype: torch.dtype,
        std: float,
        new_seed: Callable[[], int],
        budget_bytes: int,
    ):
        folder = folder.absolute()  # whatever the working folder becomes
        self.folder, self.slots, self.width, self.dtype, self.std = folder, slots, width, dtype, std
        self.seed = 0
        # By slot: whether a row has been written, was so at the last checkpoint, is in the log that is open.
        self.written, self.kept, self.logged = (np.zeros(slots, np.bool_) for _ in range(3))
        self.states: dict[str, MappedRows] = {}  # of one state or several, by their names
        self.checkpoints = [Checkpoint(0, 1, 0)]
        self.ahead = Ahead(slots, budget_bytes)
        self.logged_bytes = 0  # of all logs, as long as the folder is open
        self._log: UndoLog | None = None
        self._next_log = 1
        self._unlock: Callable[[], None] | None = None
        self._process = os.getpid()
        self.is_closed = False
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"the folder of a table must be none or a folder, got the file {str(folder)!r}")
        folder.mkdir(parents=True, exist_ok=True)
        self._require_table_or_nothing()  # before a file is made longer
        self.weight = self._open_rows(WEIGHT, (slots, width), dtype)
        try:
            self._lock()
            if (folder / DESCRIPTION).exists():
                self._go_on(self._checked_description())
            else:
                self._begin(new_seed())
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> dict[str, MappedRows]:
        """The rows and the states, by name."""
        return {WEIGHT: self.weight, **self.states}

    @property
    def disk_bytes(self) -> int:
        """What the folder takes on the disk."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir() if path.is_file())

    @property
    def is_changed(self) -> bool:
        """Whether rows have changed since the last checkpoint."""
        return any(number >= self.checkpoints[-1].log for number in self._logs())

    # Rows.

    def write_fresh(self, slots: np.ndarray) -> None:
        """Writes the fresh values of rows that have not been written. Raises `OSError` on a full disk."""
        self._require_own()
        for part in self._pieces(slots):
            self.ahead.keep_to_budget()  # these may be all rows of the table
            self.weight.put(part, self.as_bytes(torch.from_numpy(self._drawn(part))))
            self.ahead.know(self.weight, part)
            self.written[part] = True

    def rows(self, slots: np.ndarray) -> Tensor:
        """Rows [len(slots), V] of ascending slots, copied; those that have not been written are drawn."""
        is_written = self.written[slots]
        rows = torch.empty(len(slots), self.width, dtype=self.dtype)
        rows[torch.from_numpy(is_written)] = self.weight.tensor[torch.from_numpy(slots[is_written])]
        for part in self._pieces(np.flatnonzero(~is_written)):
            drawn = torch.from_numpy(self._drawn(slots[part]))
            rows[torch.from_numpy(part)] = drawn.to(self.dtype)
        return rows

    def _drawn(self, slots: np.ndarray) -> np.ndarray:
        return draw_rows(self.seed, slots, self.width, self.std)

    def as_bytes(self, rows: Tensor) -> np.ndarray:
        """Rows as they stand in the file."""
        return rows.to(self.dtype).contiguous().view(torch.uint8).numpy()

    def _pieces(self, slots: np.ndarray) -> Iterator[np.ndarray]:
        step = max(1, _ROWS_AT_ONCE // self.weight.row_bytes)
        for start in range(0, len(slots), step):
            yield slots[start : start + step]

    # Changes.

    def before_change(self, slots: np.ndarray, *, drawn: bool = True) -> None:
        """Keeps what ascending slots are, on the disk; afterwards their rows, in all files, may be changed.

        drawn: whether rows that have not been written get their fresh values; else the caller writes all of them.
        Raises `OSError`, as on a full disk; no row has changed then.
        """
        self._require_own()
        have_room = self.ahead.wait()
        new = slots[~self.logged[slots]]
        if not len(new):
            return
        fresh, old = new[~self.kept[new]], new[self.kept[new]]
        if drawn:
            self.write_fresh(fresh[~self.written[fresh]])
        log = self._open_log()
        before = log.nbytes
        try:
            if len(fresh):
                for file in self._sparse_states().values():
                    file.make_room(np.setdiff1d(fresh, have_room) if file in self.large_states() else fresh)
                for file in self.large_states():
                    self.ahead.know(file, fresh)
                log.add_fresh(fresh)
            self.ahead.fetch([self.weight, *self.large_states()], old)
            for part in self._pieces(old):
                rows = {name: file.take(part) for name, file in self.files.items()}
                log.add_old(part, rows)
                for name, file in self._sparse_states().items():
                    file.make_room(part[~rows[name].any(1)])  # a hole in the file, perhaps
            log.flush()
        except BaseException:
            log.drop_unflushed()
            raise
        self.logged_bytes += log.nbytes - before
        self.logged[new] = True
        self.written[new] = True

    def _require_own(self) -> None:
        if self._process != os.getpid():
            raise ValueError(
                f"the table in {str(self.folder)!r} is written by the process that opened it alone, got one that was "
                f"forked from it: train in that process"
            )

    def large_states(self) -> list[MappedRows]:
        """The states of which pages are asked for; one number a row is read as a whole."""
        return [file for file in self.states.values() if file.tensor.ndim > 1]

    def _sparse_states(self) -> dict[str, MappedRows]:
        """The states that get their room on the disk row by row."""
        has_room = hasattr(os, "posix_fallocate")  # as `_open_rows` asked for it
        return {name: file for name, file in self.states.items() if file.tensor.ndim > 1 or not has_room}

    def _open_log(self) -> UndoLog:
        if self._log is None:
            row_bytes = {name: file.row_bytes for name, file in self.files.items()}
            number, self._next_log = self._next_log, self._next_log + 1  # not again, if this is interrupted
            self._log = UndoLog(self._log_file(number), row_bytes)
        return self._log

    def _end_log(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = None
        self.logged[:] = False

    # States.

    def make_states(self, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's states, of the shapes and dtypes of `likes`: those of the folder, or new ones of zeros.

        Raises `ValueError` for states of another optimizer.
        """
        asked = {name: _described(like) for name, like in likes.items()}
        if self.states:
            if (held := self._described_states()) != asked:
                raise ValueError(
                    f"the table in {str(self.folder)!r} has the states {_in_words(held)}, this optimizer has "
                    f"{_in_words(asked)}: build the optimizer that trained it, or call drop_states() on the table"
                )
            return self.state_tensors()
        self.ahead.wait()  # for room in files of states that may be gone
        for name in _side_by_side(asked):
            (self.folder / f"{name}.rows").unlink(missing_ok=True)  # of a table that was killed here
        made = self._open_states(asked)
        for file in made.values():
            file.flush()
        flush(self.folder)
        self.states = made
        try:
            self._describe()
        except BaseException:
            self.states = {}
            raise
        self._end_log()  # which knows nothing of them
        return self.state_tensors()

    def state_tensors(self) -> dict[str, Tensor]:
        """The states [S, V] or [S] by name; several of one file have their rows side by side."""
        found: dict[str, Tensor] = {}
        for names, file in self.states.items():
            tensors = file.tensor.unbind(1) if file.tensor.ndim > 1 else [file.tensor]
            found |= zip(names.split("+"), tensors, strict=True)
        return found

    def drop_states(self) -> None:
        """Removes the optimizer's states; what the rows are is the only checkpoint then."""
        dropped, self.states = self.states, {}
        try:
            self.checkpoint()  # which removes their files
        except BaseException:
            self.states = dropped
            raise
        for file in dropped.values():
            file.close()

    def _described_states(self) -> dict[str, list[Any]]:
        return {name: _described(tensor) for name, tensor in self.state_tensors().items()}

    # Checkpoints.

    def checkpoint(self, *, keep: int = 1) -> int:
        """Makes what the rows are a checkpoint, once it is on the disk; returns its number. `keep` of them stay.

        Raises `OSError`; the checkpoints are then those that they were.
        """
        for file in self.files.values():
            file.flush()
        # From here on changes go to a new log, which goes back to what rows are now: so both this checkpoint and the
        # last one can be restored, whichever of them an interruption leaves in the description.
        self._end_log()
        self.kept = self.written.copy()
        last = self.checkpoints[-1]
        number, bits = last.number + 1, last.bits
        if not np.array_equal(self._read_bits(bits), self.written):
            bits = number
            with file_aside(self._bits_file(number)) as aside:
                aside.write_bytes(np.packbits(self.written).tobytes())
        self._keep([*self.checkpoints, Checkpoint(number, self._next_log, bits)][-keep:])
        self._remove_unused()
        return number

    def restore(self, number: int | None = None) -> None:
        """Puts the rows back to a checkpoint, the last one where none is named; later ones are forgotten.

        Raises `ValueError` for one that is not kept.
        """
        kept = [one for one in self.checkpoints if number is None or one.number <= number]
        if not kept or number not in (None, kept[-1].number):
            numbers = ", ".join(str(one.number) for one in self.checkpoints)
            raise ValueError(f"the table in {str(self.folder)!r} has the checkpoints {numbers}, got {number}")
        self._end_log()
        if kept != self.checkpoints:
            self._keep(kept)  # so that what follows is gone on with by whoever opens the folder
        self._undo()

    def _keep(self, checkpoints: list[Checkpoint]) -> None:
        """Describes these; where that fails or is interrupted, the checkpoints are what the description says."""
        self.checkpoints = checkpoints
        try:
            self._describe()
        except BaseException:
            self.checkpoints = _checkpoints_in(self._checked_description())
            raise

    def _undo(self) -> None:
        """Puts back what the logs after the last checkpoint say, the newest first."""
        last = self.checkpoints[-1]
        logs = sorted((number for number in self._logs() if number >= last.log), reverse=True)
        self._next_log = max([last.log, *(number + 1 for number in logs)])
        for number in logs:
            for slots, rows in read_log(self._log_file(number)):
                for name, file in self.files.items():
                    if name in rows:
                        file.write(slots, rows[name])
                    elif not rows:  # what is no hole has its room on the disk
                        held = slots[file.take(slots).any(1)]
                        file.fill(held, np.zeros(file.row_bytes, np.uint8))
        if logs:
            for file in self.files.values():
                file.flush()
        for number in logs:  # a newer one is never there without those before it
            self._log_file(number).unlink()
            flush(self.folder)
        self.written = self._read_bits(last.bits)
        self.kept = self.written.copy()
        self.logged[:] = False
        self.ahead.forget()

    # The folder.

    def _require_table_or_nothing(self) -> None:
        """Raises `ValueError` for a folder of something else, or of a table whose description is gone."""
        if (self.folder / DESCRIPTION).exists():
            self._checked_description()
            return
        for path in self.folder.iterdir():  # what a process leaves that is killed here is empty
            if path.name != f".{DESCRIPTION}.partial" and (path.name != f"{WEIGHT}.rows" or path.stat().st_blocks):
                raise ValueError(
                    f"the folder of a new table must be empty, got {str(self.folder)!r} with {path.name!r} and no "
                    f"{DESCRIPTION}: name another folder, or move its files away"
                )

    def _begin(self, seed: int) -> None:
        self.seed = seed
        os.ftruncate(self.weight.descriptor, self.weight.nbytes)
        self.weight.flush()
        self._describe()

    def _go_on(self, description: Mapping[str, Any]) -> None:
        self.seed = description["seed"]
        self.checkpoints = _checkpoints_in(description)
        self.states = self._open_states(description["states"])
        self._remove_unused()
        self._undo()

    def _checked_description(self) -> dict[str, Any]:
        description = read_sealed(self.folder / DESCRIPTION)
        if description.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} holds a table of format {description.get('format')!r}, this version reads {FORMAT}"
            )
        asked = {"slots": self.slots, "width": self.width, "dtype": _name(self.dtype), "std": self.std}
        for name, value in asked.items():
            if description[name] != value:
                raise ValueError(f"{self.folder} holds a table whose {name} is {description[name]}, asked for {value}")
        files = _side_by_side({WEIGHT: (asked["dtype"], 2)}) | _side_by_side(description["states"])
        for name, (kind, per_row) in files.items():
            file = self.folder / f"{name}.rows"
            size = self.slots * getattr(torch, kind).itemsize * (per_row * self.width or 1)
            if not file.is_file() or file.stat().st_size != size:
                found = f"has {file.stat().st_size} bytes of {size}" if file.is_file() else "is missing"
                raise ValueError(f"{self.folder} is damaged: {file.name} {found}")
        return description

    def _describe(self) -> None:
        write_sealed(
            self.folder / DESCRIPTION,
            {
                "format": FORMAT,
                "slots": self.slots,
                "width": self.width,
                "dtype": _name(self.dtype),
                "std": self.std,
                "seed": self.seed,
                "states": self._described_states(),
                "checkpoints": [list(one) for one in self.checkpoints],
            },
        )

    def _remove_unused(self) -> None:
        """Logs and bits of checkpoints that are not kept, and states that nobody describes."""
        used = {self._bits_file(one.bits) for one in self.checkpoints} | {file.file for file in self.files.values()}
        used |= {self._log_file(number) for number in self._logs() if number >= self.checkpoints[0].log}
        for path in self.folder.iterdir():
            if re.fullmatch(r"written-\d+\.bits|undo-\d+\.log|[\w+]+\.rows", path.name) and path not in used:
                path.unlink()

    def _read_bits(self, number: int) -> np.ndarray:
        if not number:
            return np.zeros(self.slots, np.bool_)
        bits = np.fromfile(self._bits_file(number), np.uint8)
        return np.unpackbits(bits, count=self.slots).astype(np.bool_)

    def _open_states(self, described: Mapping[str, Sequence[Any]]) -> dict[str, MappedRows]:
        opened = {}
        for name, (kind, per_row) in _side_by_side(described).items():
            shape = (self.slots, per_row, self.width) if per_row else (self.slots,)
            opened[name] = self._open_rows(name, shape, getattr(torch, kind))
        return opened

    def _open_rows(self, name: str, shape: Any, dtype: torch.dtype) -> MappedRows:
        file = MappedRows(self.folder / f"{name}.rows", tuple(shape), dtype, writable=True)
        if len(shape) == 1:  # a few bytes a row: all of it is there
            with suppress(AttributeError):  # macOS has no such call
                os.posix_fallocate(file.descriptor, 0, max(1, file.nbytes))
        return file

    def _lock(self) -> None:
        import fcntl  # which Windows lacks

        try:
            fcntl.flock(self.weight.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"the table in {str(self.folder)!r} is open already, here or in another process: end that one, or call "
                f"close() on its table"
            ) from None
        self._unlock = functools.partial(fcntl.flock, self.weight.descriptor, fcntl.LOCK_UN)

    def _logs(self) -> list[int]:
        names = (re.fullmatch(r"undo-(\d+)\.log", path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in names if match]

    def _log_file(self, number: int) -> Path:
        return self.folder / f"undo-{number:08d}.log"

    def _bits_file(self, number: int) -> Path:
        return self.folder / f"written-{number:08d}.bits"

    def close(self) -> None:
        """Closes all files; what has changed since the last checkpoint is put back when the folder is opened again."""
        self.is_closed = True
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._unlock is not None and self._process == os.getpid():  # the map, which stays, would hold on to it
            self._unlock()
        self._unlock = None
        for file in self.files.values():
            file.close()


def _checkpoints_in(description: Mapping[str, Any]) -> list[Checkpoint]:
    return [Checkpoint(*one) for one in description["checkpoints"]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _side_by_side(described: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, int]]:
    """Of each file, by the names of its states: their dtype, and how many have a row [V] in it; 0: a number a row."""
    together: dict[tuple[str, str], list[str]] = {}
    for name, (kind, ndim) in sorted(described.items()):
        together.setdefault((kind, "" if ndim > 1 else name), []).append(name)
    return {"+".join(names): (kind, 0 if alone else len(names)) for (kind, alone), names in together.items()}


def _described(tensor: Tensor) -> list[Any]:
    return [_name(tensor.dtype), tensor.ndim]


def _in_words(states: Mapping[str, list[Any]]) -> str:
    return ", ".join(f"{name} ({kind})" for name, (kind, _) in states.items()) or "none"
