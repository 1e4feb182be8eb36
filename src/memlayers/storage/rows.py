"""MappedRows: rows in a file as a tensor that shares the file's pages, and Ahead: rows asked for before they are used.

The kernels of a table read and write such a tensor as any other. Where a page is not in memory yet they wait for the
disk, one page after the other; so the slots of a step, which are known before, are read ahead by several threads. The
system keeps what was read in its page cache; what of it counts as memory of this process is given back over a budget.

Letters: S slots, V width.
"""

import math
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

THREADS = 24  # that wait for the disk; it answers many at a time
_FEW = 8  # reads that are made without the threads
_PIECE = 2**20  # bytes that are read at a time
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
        assert self._bytes.flags.writeable is writable, f"a map that is {flags}writable"

    def take(self, slots: np.ndarray) -> np.ndarray:
        """The bytes of some rows, copied."""
        return self._bytes[slots]

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

    def give_back(self) -> None:
        """Has no page of the file count as memory of this process; they stay in the system's cache."""
        self.map.madvise(mmap.MADV_DONTNEED)

    def runs(self, slots: np.ndarray) -> list[tuple[int, int]]:
        """The bytes of ascending slots in whole pages, first and the one behind the last, neighbours together."""
        page = mmap.PAGESIZE
        begin = (self.start + slots * self.row_bytes) // page * page
        end = -(-(self.start + (slots + 1) * self.row_bytes) // page) * page
        opens = np.flatnonzero(np.concatenate(([True], begin[1:] > end[:-1])))
        closes = np.concatenate((opens[1:], [len(slots)])) - 1
        return list(zip(begin[opens].tolist(), end[closes].tolist(), strict=True))

    def read(self, runs: Iterable[tuple[int, int]]) -> None:
        """Reads stretches of the file into the system's cache."""
        for begin, end in runs:
            for place in range(begin, end, _PIECE):
                os.pread(self.descriptor, min(_PIECE, end - place), place)

    def close(self) -> None:
        """Closes the file. The tensor stays, and its pages, until nobody has it any more."""
        self._close()


class Ahead:
    """Reads rows of some files ahead of their use, and gives back what has gathered over a budget.

    Args:
        slots: S, of each of the files.
        budget_bytes: of pages that count as memory of this process, about.
    """

    def __init__(self, slots: int, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.asked = self.cold = 0  # rows, since the beginning: asked for, and not asked for before
        self.pages = 0  # that were read ahead
        self._slots = slots
        self._warm: dict[MappedRows, np.ndarray] = {}  # the rows of each file that were asked for
        self._held = 0  # bytes of them
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def fetch(self, files: Iterable[MappedRows], slots: np.ndarray) -> list[Future[None]]:
        """Begins to read the rows of ascending slots of each file; see `wait`."""
        started: list[Future[None]] = []
        for file in files:
            warm = self._warm.setdefault(file, np.zeros(self._slots, np.bool_))
            cold = slots[~warm[slots]]
            self.asked += len(slots)
            self.cold += len(cold)
            if not len(cold):
                continue
            warm[cold] = True
            runs = file.runs(cold)
            size = sum(end - begin for begin, end in runs)
            self.pages += size // mmap.PAGESIZE
            self._held += size
            if len(runs) <= _FEW:
                file.read(runs)
                continue
            count = min(THREADS, len(runs))
            started += [self._threads().submit(file.read, runs[number::count]) for number in range(count)]
        return started

    def know(self, file: MappedRows, slots: np.ndarray) -> None:
        """Tells of rows that were just written, and so need no reading."""
        self._warm.setdefault(file, np.zeros(self._slots, np.bool_))[slots] = True
        self._held += len(slots) * file.row_bytes

    @staticmethod
    def wait(started: list[Future[None]]) -> None:
        """Returns when all is read. Raises `OSError` for what could not be."""
        wait(started)
        for future in started:
            future.result()

    def keep_to_budget(self) -> None:
        """Gives all pages back where more have gathered than the budget allows; to be called between two steps."""
        if self._held > self.budget_bytes:
            self.forget()
            for file in self._warm:
                file.give_back()

    def forget(self) -> None:
        """Takes no row for read any more."""
        self._held = 0
        for warm in self._warm.values():
            warm[:] = False

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():  # a fork has no threads
            self._pool, self._process = ThreadPoolExecutor(THREADS, "memlayers-rows"), os.getpid()
        return self._pool
