"""The bytes of a file in pieces or in lines, decompressed, and what they cannot be if they are text.

A compressed file is a stream of what it holds: every member of it, in bounded memory, and an error if it is cut off.
Neither `lzma` nor `zstandard` reads so by itself: the first ends without a word at a stream that it cannot read, the
second where a frame is cut off.
"""

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

SUFFIXES = (".gz", ".xz", ".zst")
PIECE_BYTES = 1 << 16  # compressed, read at a time

ZST_SKIPPABLE = 0x184D2A50  # and the 15 numbers after it
ZST_LONGEST_HEADER = 18
ZST_RLE = 1

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


class NotCompleteError(Exception):
    """The compressed stream is cut off or damaged."""


# All that a damaged file raises while it is read.
ERRORS = (NotCompleteError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def open_bytes(file: Path) -> BinaryIO:
    """What a file holds, decompressed if its suffix says that it is compressed."""
    match file.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(file, "rb"))
        case ".xz":
            return io.BufferedReader(_Xz(file), PIECE_BYTES)
        case ".zst":
            return io.BufferedReader(_Zst(file), PIECE_BYTES)
        case _:
            return file.open("rb")


class _Xz(io.RawIOBase):
    """All streams of an .xz file, with the zero bytes that may lie between them."""

    def __init__(self, file: Path) -> None:
        self._compressed = file.open("rb")
        self._stream = lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = b""
        while not data:
            if self._stream.eof:
                piece = self._next_stream()
                if not piece:
                    return 0
                self._stream = lzma.LZMADecompressor()
            else:
                piece = self._compressed.read(PIECE_BYTES) if self._stream.needs_input else b""
                if self._stream.needs_input and not piece:
                    raise NotCompleteError("it ends within a stream")
            data = self._stream.decompress(piece, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bytes:
        piece = self._stream.unused_data.lstrip(b"\0")
        while not piece:
            read = self._compressed.read(PIECE_BYTES)
            if not read:
                return b""
            piece = read.lstrip(b"\0")
        return piece

    def close(self) -> None:
        self._compressed.close()
        super().close()


class _Zst(io.RawIOBase):
    """All frames of a .zst file."""

    def __init__(self, file: Path) -> None:
        import zstandard  # optional

        self._file = file
        # Archives of the web are packed with windows of up to 2 GiB. Only such a file takes that much memory.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._reader = decompressor.stream_reader(file.open("rb"), read_size=PIECE_BYTES, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        import zstandard  # optional

        try:
            count = self._reader.readinto(buffer)
            if count == 0 and not _is_whole_zst(self._file):
                raise NotCompleteError("it ends within a frame")
        except zstandard.ZstdError as error:
            raise NotCompleteError(str(error)) from None
        return count

    def close(self) -> None:
        self._reader.close()
        super().close()


def _is_whole_zst(file: Path) -> bool:
    """Whether the last frame ends where the file does: from block to block by their headers, nothing decompressed."""
    import zstandard  # optional

    size, place = file.stat().st_size, 0
    with file.open("rb") as stream:
        while place < size:
            stream.seek(place)
            head = stream.read(ZST_LONGEST_HEADER)
            if ZST_SKIPPABLE <= int.from_bytes(head[:4], "little") < ZST_SKIPPABLE + 16:
                place += 8 + int.from_bytes(head[4:8], "little")
                continue
            place += zstandard.frame_header_size(head)
            is_last = False
            while not is_last and place < size:
                stream.seek(place)
                block = int.from_bytes(stream.read(3), "little")
                is_last, kind = bool(block & 1), block >> 1 & 3
                place += 3 + (1 if kind == ZST_RLE else block >> 3)
            if not is_last:
                return False
            place += 4 * zstandard.get_frame_parameters(head).has_checksum
    return place == size
