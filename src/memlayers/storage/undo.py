"""Undo logs: what rows were before they changed, in files that are only appended to.

A record is there, and on the disk, before the first change of its rows reaches their file. So whatever happens after a
checkpoint, the rows of the checkpoint can be put back: those that had been written get their bytes again, those that
had not are zeros again, as in a file that was never written. A record whose end is missing or torn is none: its rows
were not changed yet.

A record is 24 bytes (the CRC-32 of all that follows, kind, number of rows, bytes), the slots, and for each file of the
table the bytes of all the rows. A log begins with a record that says which files, and the bytes of a row in each.
"""

import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memlayers.files import flush

_HEAD = struct.Struct("<IIQQ")
_STREAMS, _FRESH, _OLD = 1, 2, 3


class Record(NamedTuple):
    """Rows that were changed after it was written."""

    slots: np.ndarray
    rows: dict[str, np.ndarray]  # by file, their bytes before; empty: zeros, in all files


class UndoLog:
    """The log that is being written.

    Args:
        file: a new one.
        row_bytes: by the name of each file of the table, the bytes of a row.
    """

    def __init__(self, file: Path, row_bytes: Mapping[str, int]):
        self.file = file
        self._row_bytes = dict(row_bytes)
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._end = self._durable = 0
        try:
            self._append(_STREAMS, 0, np.frombuffer(json.dumps(self._row_bytes).encode(), np.uint8))
            self.flush()
            flush(file.parent)
        except BaseException:
            self.close()
            with suppress(OSError):
                file.unlink()
            raise

    def add_fresh(self, slots: np.ndarray) -> None:
        """Rows that had not been written."""
        self._append(_FRESH, len(slots), slots.astype("<i8"))

    def add_old(self, slots: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """The bytes of rows, by file."""
        parts = [np.ascontiguousarray(rows[name]) for name in self._row_bytes]
        self._append(_OLD, len(slots), slots.astype("<i8"), *parts)

    def flush(self) -> None:
        """Returns once all records are on the disk."""
        os.fsync(self._descriptor)
        if hasattr(os, "posix_fadvise"):  # nobody reads it soon: the memory is for rows
            os.posix_fadvise(self._descriptor, self._durable, self._end - self._durable, os.POSIX_FADV_DONTNEED)
        self._durable = self._end

    def drop_unflushed(self) -> None:
        """Takes away what was added since: the rows will not be changed."""
        with suppress(OSError):
            os.ftruncate(self._descriptor, self._durable)
        self._end = self._durable

    def close(self) -> None:
        """Closes the file."""
        self._close()

    @property
    def nbytes(self) -> int:
        """What was written."""
        return self._end

    def _append(self, kind: int, count: int, *parts: np.ndarray) -> None:
        views = [memoryview(part.data).cast("B") for part in parts if part.size]
        size = sum(map(len, views))
        checksum = zlib.crc32(_HEAD.pack(0, kind, count, size))
        for view in views:
            checksum = zlib.crc32(view, checksum)
        try:
            for view in (memoryview(_HEAD.pack(checksum, kind, count, size)), *views):
                while view:
                    done = os.write(self._descriptor, view)
                    self._end += done
                    view = view[done:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from None


def read_log(file: Path) -> Iterator[Record]:
    """The records of a log in order, to the first that is not whole."""
    row_bytes: dict[str, int] | None = None
    with file.open("rb") as stream:
        while len(head := stream.read(_HEAD.size)) == _HEAD.size:
            checksum, kind, count, size = _HEAD.unpack(head)
            if size > os.fstat(stream.fileno()).st_size - stream.tell():
                return
            body = stream.read(size)
            if zlib.crc32(body, zlib.crc32(_HEAD.pack(0, kind, count, size))) != checksum:
                return
            if kind == _STREAMS:
                row_bytes = json.loads(body)
                continue
            assert row_bytes is not None, "a log begins with the names of its files"
            slots = np.frombuffer(body, "<i8", count).astype(np.int64)
            rows, place = {}, 8 * count
            for name, width in row_bytes.items() if kind == _OLD else ():
                rows[name] = np.frombuffer(body, np.uint8, count * width, place).reshape(count, width)
                place += count * width
            yield Record(slots, rows)
