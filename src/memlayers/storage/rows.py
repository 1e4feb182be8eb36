"""MappedRows: rows in a file as a tensor that shares the file's pages, and Ahead: rows asked for before they are used.

The kernels of a table read and write such a tensor as any other. Where a page is not in memory yet they wait for the
disk, one page after the other; so the system is asked to read the rows of a step, which are known before, all at once.
It keeps what was read in its page cache; what of it counts as memory of this process is given back over a budget.

Letters: S slots, V width.
"""

import errno
import functools
import math
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memlayers.storage.advice import POPULATE_WRITE, advise

_PIECE = 2**20  # bytes that are written at a time
_ASKED = 2**17  # bytes that are asked for at a time: systems read no more of what is advised at once
_TURN = 1 / 64  # of the budget: what is read while rows count as equally old
_STAYS = 8  # turns in which a row that was made ready is not again
_KEPT = 15 / 16  # of the budget, where it was overstepped
_UNKNOWN = errno.EINVAL, errno.ENOSYS, errno.EPERM  # of advice that the system does not know
_NONE = np.empty(0, np.int64)
_NEW_FILE = os.O_RDWR | os.O_CREAT


def require_mapping() -> None:
    """Raises `ValueError` on a system that has no tables in files."""
    if sys.platform not in ("linux", "darwin"):
        raise ValueError(
            f"tables in files need Linux or macOS, this is {sys.platform}: keep the table in memory (leave values out) "
            f"or run under WSL"
        )


class MappedRows:
    """[S, V], or [S], in a file.

    Args:
        file: is made, or made longer, where it may be written to.
        shape: of the tensor.
        dtype: of the tensor.
        start: the byte of the file where the first row begins.
        writable: whether the rows may be changed; else nothing may write to the tensor.

    Raises:
        OSError: the file cannot be opened, made or mapped, or is too short.
    """

    def __init__(self, file: Path, shape: Sequence[int], dtype: torch.dtype, *, start: int = 0, writable: bool = False):
        self.file, self.start = file, start
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self.nbytes = shape[0] * self.row_bytes
        self._writable = writable
        self.descriptor = os.open(file, _NEW_FILE if writable else os.O_RDONLY, 0o666)
        try:
            size = os.fstat(self.descriptor).st_size
            if size < start + self.nbytes:
                if not writable:
                    raise OSError(f"{file} is too short: {size} bytes of {start + self.nbytes}")
                os.ftruncate(self.descriptor, start + self.nbytes)  # no block is taken
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self.map = mmap.mmap(self.descriptor, start + self.nbytes, mmap.MAP_SHARED, access)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._close = weakref.finalize(self, os.close, self.descriptor)
        if len(shape) > 1:
            self.map.madvise(mmap.MADV_RANDOM)  # else each fault reads some 64 pages; raises OSError where refused
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self.map, dtype=dtype, count=math.prod(shape), offset=start)
        self.tensor: Tensor = flat.view(*shape)
        flags = "" if writable else "not "
        self._bytes = np.frombuffer(self.map, np.uint8, self.nbytes, start).reshape(shape[0], self.row_bytes)
        self._address = self._bytes.ctypes.data - start
        assert self._bytes.flags.writeable is writable, f"a map that is {flags}writable"

    def take(self, slots: np.ndarray) -> np.ndarray:
        """The bytes of some rows, copied."""
        return self._bytes[slots]

    def make_ready(self, slots: np.ndarray) -> bool:
        """Has some rows in memory, with room for them on the disk; returns whether the system can.

        Raises `OSError` on a full disk.
        """
        try:
            advise(self.map, self._address, self.runs(slots), POPULATE_WRITE)
        except OSError as error:
            if error.errno in _UNKNOWN:
                return False
            if error.errno == errno.EFAULT:  # a write to the tensor would end the process
                error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        return True

    def make_room(self, slots: np.ndarray) -> None:
        """Has the disk keep room for rows of zeros. Raises `OSError` on a full disk."""
        if not self.make_ready(slots):
            self.fill(slots, np.zeros(self.row_bytes, np.uint8))

    def put(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Writes some rows, given as bytes, which are read soon. Raises `OSError` on a full disk."""
        if self.make_ready(slots):
            self._bytes[slots] = rows
        else:
            self.write(slots, rows)

    def write(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Writes some rows, given as bytes, through the system: a full disk is an `OSError` here.

        In a page that the file has no block for yet a write to the tensor would end the process instead.
        """
        size, start = self.row_bytes, self.start
        first = 0
        while first < len(slots):  # neighbours at once
            last = first + 1
            while last < len(slots) and slots[last] == slots[last - 1] + 1 and (last - first) * size < _PIECE:
                last += 1
            self._write_at(start + int(slots[first]) * size, memoryview(rows[first:last].data).cast("B"))
            first = last

    def _write_at(self, place: int, data: memoryview) -> None:
        while data:
            try:
                done = os.pwrite(self.descriptor, data, place)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.file)) from None
            data, place = data[done:], place + done

    def fill(self, slots: np.ndarray, row: np.ndarray) -> None:
        """Writes one row to many slots."""
        self.write(slots, np.broadcast_to(row, (len(slots), self.row_bytes)).copy())

    def flush(self) -> None:
        """Returns once what was changed is on the disk."""
        if sys.platform != "linux":  # where fsync has the pages of a map, too
            self.map.flush()
        os.fsync(self.descriptor)

    def give_back(self, runs: np.ndarray | None = None) -> None:
        """Has pages of the file (None: all) not count as memory of this process; they stay in the system's cache."""
        if runs is None:
            self.map.madvise(mmap.MADV_DONTNEED)
        else:
            advise(self.map, self._address, runs, mmap.MADV_DONTNEED)

    def runs(self, slots: np.ndarray) -> np.ndarray:
        """The bytes [R, 2] of ascending slots in whole pages, first and one behind the last, neighbours together."""
        if not len(slots):
            return np.empty((0, 2), np.int64)
        page = mmap.PAGESIZE
        begin = (self.start + slots * self.row_bytes) // page * page
        end = -(-(self.start + (slots + 1) * self.row_bytes) // page) * page
        opens = np.flatnonzero(np.concatenate(([True], begin[1:] > end[:-1])))
        closes = np.concatenate((opens[1:], [len(slots)])) - 1
        return np.stack((begin[opens], end[closes]), 1)

    def ask(self, runs: np.ndarray) -> None:
        """Has the system begin to read stretches of the file into its cache."""
        begin, end = runs.T
        pieces = -(-(end - begin) // _ASKED)
        number = np.arange(pieces.sum()) - (pieces.cumsum() - pieces).repeat(pieces)  # of each piece in its stretch
        begin = begin.repeat(pieces) + number * _ASKED
        end = np.minimum(begin + _ASKED, end.repeat(pieces))
        advise(self.map, self._address, np.stack((begin, end), 1), mmap.MADV_WILLNEED)

    def close(self) -> None:
        """Closes the file. The tensor stays, and its pages, until nobody has it any more."""
        self._close()
        self.descriptor = -1  # its number may be that of another file by now


_Stretches = Sequence[tuple[MappedRows, np.ndarray]]


class Ahead:
    """Asks for rows of some files ahead of their use, and gives back what has gathered over a budget.

    Args:
        slots: S, of each of the files.
        budget_bytes: of pages that count as memory of this process, about.
    """

    def __init__(self, slots: int, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.asked = self.cold = 0  # rows, since the beginning: asked for, and not asked for before
        self.pages = 0  # that the system was asked for
        self._slots = slots
        self._asked_in: dict[MappedRows, np.ndarray] = {}  # by slot, 0 or the turn in which it was asked for last
        self._turn, self._gathered = 1, 0  # bytes since the turn began
        self._ready_in = np.zeros(slots, np.uint8)  # by slot, the turns so far when it was made ready
        self._turns = _STAYS  # modulo 256
        self._held: dict[MappedRows, int] = {}  # rows of each file that were asked for
        self._prepared: Future[np.ndarray] | None = None  # the last of what is done in the background

    def fetch(
        self,
        files: Sequence[MappedRows],
        slots: np.ndarray,
        states: Sequence[MappedRows] = (),
        fresh: np.ndarray = _NONE,
    ) -> None:
        """Has the rows of ascending slots of each file read; whoever uses one that is not there yet waits for it.

        states: files whose rows are read afterwards, in the background. With them, rows of all files that were not made
            ready to be written to for some turns are now, and so are those of `fresh` in the files of the states.
        """
        for file, runs in self._cold(files, slots):
            file.ask(runs)
        if states:
            due = slots[np.uint8(self._turns) - self._ready_in[slots] >= _STAYS]  # modulo 256
            self._ready_in[due] = self._turns
            cold = self._cold(states, slots)
            self._prepared = self._background.submit(_prepare, cold, [*files, *states], due, states, fresh)

    def wait(self) -> np.ndarray:
        """Returns once all rows that are read in the background are there: the fresh ones that were given room last."""
        prepared, self._prepared = self._prepared, None
        return _NONE if prepared is None else prepared.result()

    @functools.cached_property
    def _background(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "memlayers-ahead")

    def _cold(self, files: Sequence[MappedRows], slots: np.ndarray) -> _Stretches:
        """What is to be read of each file."""
        found = []
        for file in files:
            cold = self._note(file, slots)
            self.asked += len(slots)
            self.cold += len(cold)
            if len(cold):
                runs = file.runs(cold)
                self.pages += int(np.diff(runs).sum()) // mmap.PAGESIZE
                found.append((file, runs))
        return found

    def know(self, file: MappedRows, slots: np.ndarray) -> None:
        """Tells of rows that were just written, and so need no reading."""
        self._note(file, slots)

    def keep_to_budget(self) -> None:
        """Gives pages back where more have gathered than the budget allows; to be called between two steps.

        Those of rows that were not asked for the longest go first, until a sixteenth of the budget is free.
        """
        if self._gathered > self.budget_bytes * _TURN:
            self._turn, self._gathered = min(self._turn + 1, 255), 0
            self._turns = (self._turns + 1) % 256
        if self.held_bytes <= self.budget_bytes:
            return
        first = 2  # of the turns that stay
        while first < 256 and self._asked_since(first) > self.budget_bytes * _KEPT:
            first += 1
        for file, asked_in in self._asked_in.items():
            old = np.flatnonzero((asked_in != 0) & (asked_in < first))
            file.give_back(file.runs(old) if len(old) < self._held[file] else None)
            self._ready_in[old] = (self._turns - _STAYS) % 256
            np.maximum(asked_in, first - 1, out=asked_in)
            asked_in -= np.uint8(first - 1)
            self._held[file] -= len(old)
        self._turn = max(1, self._turn - (first - 1))

    def _asked_since(self, turn: int) -> int:
        """Bytes of the pages of rows that were asked for in a turn or later."""
        return sum(int(np.count_nonzero(asked_in >= turn)) * _paged(file) for file, asked_in in self._asked_in.items())

    @property
    def held_bytes(self) -> int:
        """Of the pages of rows that were asked for, at most."""
        return sum(min(file.nbytes, rows * _paged(file)) for file, rows in self._held.items())

    def forget(self) -> None:
        """Takes no row for read any more."""
        for file, asked_in in self._asked_in.items():
            asked_in[:] = self._held[file] = 0
        self._ready_in[:] = (self._turns - _STAYS) % 256

    def _note(self, file: MappedRows, slots: np.ndarray) -> np.ndarray:
        """Takes rows for asked for now; returns those that were not."""
        if file not in self._asked_in:
            self._asked_in[file], self._held[file] = np.zeros(self._slots, np.uint8), 0
        asked_in = self._asked_in[file]
        cold = slots[asked_in[slots] == 0]
        asked_in[slots] = self._turn
        self._held[file] += len(cold)
        self._gathered += len(cold) * _paged(file)
        return cold


def _prepare(
    cold: _Stretches, files: Sequence[MappedRows], due: np.ndarray, states: Sequence[MappedRows], fresh: np.ndarray
) -> np.ndarray:
    """Asks for stretches, makes rows ready, and returns the fresh ones if they have room.

    The system takes what is made ready for used. It does not see the reads of a map whose places are random, and would
    take rows that are read again and again from memory before those that were given back; so what is due are also rows
    that are there.
    """
    for file, runs in cold:
        file.ask(runs)
    try:
        have_room = [file.make_ready(slots) for slots, some in ((due, files), (fresh, states)) for file in some]
    except OSError:
        return _NONE  # whoever writes to them makes room
    return fresh if all(have_room) else _NONE


def _paged(file: MappedRows) -> int:
    """The bytes of the pages of a row."""
    return -(-file.row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
