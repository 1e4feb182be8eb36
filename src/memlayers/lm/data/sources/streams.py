"""The bytes of a file in pieces or in lines, and what they cannot be if they are text."""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from memlayers.lm.data.sources.compressed import ERRORS, open_bytes

READ_BYTES = 1 << 20
LONGEST_LINE = 1 << 30  # bytes: what has a line longer than this is no text, and would fill the memory

# The longer mark first: UTF-32's begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_pieces(file: Path) -> Iterator[bytes]:
    """What a file holds, decompressed, in pieces of `READ_BYTES`. Raises `ValueError` if it is cut off or damaged."""
    return _read(file, lambda stream: stream.read(READ_BYTES))


def read_lines(file: Path) -> Iterator[bytes]:
    """What a file holds, decompressed, in lines with their ends.

    Raises `ValueError` if it is cut off or damaged, or if a line is longer than `LONGEST_LINE`.
    """
    for number, line in enumerate(_read(file, lambda stream: stream.readline(LONGEST_LINE + 1)), start=1):
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{file}, line {number}: longer than {LONGEST_LINE} bytes, so these are no JSON lines")
        yield line


def _read(file: Path, read: Callable[[BinaryIO], bytes]) -> Iterator[bytes]:
    with open_bytes(file) as stream:
        while True:
            try:
                piece = read(stream)
            except ERRORS as error:
                raise ValueError(f"{file}: not a complete {file.suffix[1:]} file: {error}") from None
            if not piece:
                return
            yield piece


def without_mark(start: bytes, place: str) -> bytes:
    """The start of a file without UTF-8's byte-order mark. Raises `ValueError` if it has that of another encoding."""
    for mark, encoding in _OTHER_MARKS.items():
        if start.startswith(mark):
            raise ValueError(f"{place}: not UTF-8 at byte 0: it begins with a {encoding} byte-order mark")
    return start.removeprefix(codecs.BOM_UTF8)
