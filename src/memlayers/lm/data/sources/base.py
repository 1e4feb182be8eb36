"""What a source of documents is, and what all that are files have in common."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

# What is told about a malformed record that is left out.
Skip = Callable[[str], None]
# What is told how many bytes were read. It may raise, to end the reading.
Read = Callable[[int], None]

HASHED_AT_ONCE = 1 << 20  # bytes


def nobody(count: int) -> None:
    """Whom it does not concern how many bytes were read."""


class Document(NamedTuple):
    """One document: its text, and the string whose hash decides in which split it lands."""

    key: str
    text: str


class Source(Protocol):
    """A stream of documents, and a description of the bytes behind it."""

    @property
    def name(self) -> str:
        """As errors name it: the path, or `hf:...`."""

    def stamp(self) -> dict[str, Any] | None:
        """`name`, `bytes` and `mtime_ns`: as long as they are the same, so are the contents. None: no cheap sign."""

    def describe(self, *, read: Read = nobody) -> dict[str, Any]:
        """`format`, `name`, and what tells other contents: `bytes` and `sha256` of what lies on disk, where it does."""

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        """The documents, in an order that is always the same.

        Raises `ValueError` naming the file and the line or row of a malformed record, unless `skip` is given: then it
        is called with that message, and reading goes on. What concerns a whole file always raises.
        """


@dataclass(frozen=True)
class FileSource:
    """A file on disk. `relative` is its path below the folder or the fixed part of the glob that it was found by."""

    format: ClassVar[str]
    file: Path
    relative: str | None = None

    @property
    def name(self) -> str:
        return str(self.file)

    def stamp(self) -> dict[str, Any]:
        """Its name here is the absolute path: two files of equal size and time are not each other's contents."""
        status = self.file.stat()
        return {"name": os.path.abspath(self.file), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def describe(self, *, read: Read = nobody) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        with self.file.open("rb") as stream:
            while piece := stream.read(HASHED_AT_ONCE):
                digest.update(piece)
                size += len(piece)
                read(len(piece))
        name = self.relative or self.file.name
        return {"format": self.format, "name": name, "bytes": size, "sha256": digest.hexdigest()}
