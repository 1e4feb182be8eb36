"""Where documents come from: JSON lines, plain text, Python's own standard library.

A source is anything with `describe()` and `documents()`. Documents are read as a stream, in an order that is always the
same, and what cannot be read is a `ValueError` that names the file and the place.
"""

import codecs
import hashlib
import json
import lzma
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

# A plain text is cut into documents of at most this many characters. Small enough that a megabyte has some 250 of them,
# so that a hold-out by hash finds some; large enough that most of a document is predicted with a context.
TEXT_DOCUMENT_CHARACTERS = 4096
READ_BYTES = 1 << 20


class Document(NamedTuple):
    """One document: its text, and the string whose hash decides in which split it lands."""

    key: str
    text: str


class Source(Protocol):
    """A stream of documents, and a description of the bytes behind it."""

    def describe(self) -> dict[str, Any]:
        """`format`, `name`, `bytes` and `sha256` of the source as it lies on disk."""

    def documents(self) -> Iterator[Document]:
        """The documents, in an order that is always the same."""


def open_source(path: str, *, text_field: str, id_field: str) -> "TextFile | JsonLines":
    """The source for a file, by its suffix: `.jsonl` is JSON lines, else plain text, with `.xz` after it either one.

    Raises `ValueError` if there is no such file, if it is empty, or if its suffix names another format.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"sources: no such file: {path}")
    if not file.is_file():
        raise ValueError(f"sources: {path} is not a file; give the files in a folder one by one")
    if file.stat().st_size == 0:
        raise ValueError(f"sources: {path} is empty")
    suffix = Path(file.stem).suffix if file.suffix == ".xz" else file.suffix
    if suffix == ".jsonl":
        return JsonLines(file, text_field=text_field, id_field=id_field)
    if suffix in (".json", ".gz", ".bz2", ".zst", ".zip", ".parquet"):
        raise ValueError(f"sources: {path} is neither plain text nor JSON lines (.jsonl), plain or .xz")
    return TextFile(file)


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; blank lines are skipped. A document without an id is held out by its text."""

    file: Path
    text_field: str = "text"
    id_field: str = "id"

    def describe(self) -> dict[str, Any]:
        return _describe_file("jsonl", self.file)

    def documents(self) -> Iterator[Document]:
        offset = 0
        with _open_bytes(self.file) as stream:
            for number, line in enumerate(_guarded(stream, self.file), start=1):
                place = f"{self.file}, line {number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    decoded = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{place}: not UTF-8 at byte {offset + error.start}") from None
                offset += len(line)
                if not decoded.isspace():
                    yield self._document(decoded.rstrip("\r\n"), place)

    def _document(self, line: str, place: str) -> Document:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from None
        except (
            ValueError,
            RecursionError,
        ) as error:  # an integer of thousands of digits, nesting of thousands of levels
            raise ValueError(f"{place}: not readable as JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected a JSON object, found {type(record).__name__}")
        if self.text_field not in record:
            raise ValueError(
                f"{place}: no field {self.text_field!r} (text_field); it has {', '.join(map(repr, record))}"
            )
        text = record[self.text_field]
        if not isinstance(text, str):
            raise ValueError(f"{place}: field {self.text_field!r} is {type(text).__name__}, expected a string")
        key = record.get(self.id_field)
        if key is None:
            key = text
        elif isinstance(key, bool) or not isinstance(key, str | int):
            raise ValueError(
                f"{place}: field {self.id_field!r} is {type(key).__name__}, expected a string or an integer"
            )
        try:
            f"{key}{text}".encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
            raise ValueError(f"{place}: a string holds a lone surrogate, which UTF-8 cannot encode") from None
        return Document(str(key), text)


@dataclass(frozen=True)
class TextFile:
    """A plain UTF-8 text, cut into documents of whole paragraphs, each at most `TEXT_DOCUMENT_CHARACTERS` long.

    A paragraph that is longer is cut at white space where it has some. Joined, the documents are the file again.
    They have no id, so the hash of their text decides about the split.
    """

    file: Path

    def describe(self) -> dict[str, Any]:
        return _describe_file("text", self.file)

    def documents(self) -> Iterator[Document]:
        for text in cut_text(self._decoded(), TEXT_DOCUMENT_CHARACTERS):
            yield Document(text, text)

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0
        with _open_bytes(self.file) as stream:
            for chunk in _guarded(iter(lambda: stream.read(READ_BYTES), b""), self.file):
                if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
                    chunk, offset = chunk[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                offset += len(chunk)
                yield _decode(decoder, chunk, self.file, offset)
            yield _decode(decoder, b"", self.file, offset, final=True)


def cut_text(pieces: Iterator[str], limit: int) -> Iterator[str]:
    """Cut a stream of text into documents of at most `limit` characters, joined the same text again.

    A cut is after the last blank line that fits, else after the last white space, else at the limit.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        while len(rest) - start > limit:
            end = start + _cut_at(rest[start : start + limit])
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _cut_at(text: str) -> int:
    for boundary in (r"\n[^\S\n]*\n", r"\s"):
        if match := re.match(f".*{boundary}", text, re.DOTALL):  # greedy, so the last one
            return match.end()
    return len(text)


@dataclass(frozen=True)
class StandardLibrary:
    """The sources of the running Python's standard library: a corpus that every machine has.

    One document a file, in the order of the relative paths, which are their ids. Left out are tests, installed
    packages, and files that are generated for the machine (build configuration, site customisation).
    """

    root: Path | None = None  # None: where `sysconfig` says that it lies

    def describe(self) -> dict[str, Any]:
        digest, size, files = hashlib.sha256(), 0, 0
        for name, path in self._files():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            size, files = size + len(content), files + 1
        name = f"standard library of Python {platform.python_version()}"
        return {"format": "stdlib", "name": name, "bytes": size, "sha256": digest.hexdigest(), "files": files}

    def documents(self) -> Iterator[Document]:
        for name, path in self._files():
            try:
                yield Document(name, path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None

    def _files(self) -> list[tuple[str, Path]]:
        root = self.root or Path(sysconfig.get_path("stdlib"))
        found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
        files = sorted((name.as_posix(), path) for name, path in found if _is_library(name))
        if not files:
            raise ValueError(f"sources: empty, but Python's standard library has no source files in {root}")
        return files


def _is_library(name: Path) -> bool:
    folders = name.parts[:-1]
    if {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}.intersection(folders):
        return False
    generated = name.name.startswith("_sysconfigdata") or name.name in ("sitecustomize.py", "usercustomize.py")
    return not generated and not any(folder.startswith("config-") for folder in folders)


def _open_bytes(file: Path) -> BinaryIO:
    return cast(BinaryIO, lzma.open(file, "rb") if file.suffix == ".xz" else file.open("rb"))


def _guarded(chunks: Iterator[bytes] | BinaryIO, file: Path) -> Iterator[bytes]:
    try:
        yield from chunks
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{file}: not a complete xz file: {error}") from None


def _decode(decoder: Any, chunk: bytes, file: Path, end: int, final: bool = False) -> str:
    """Decode `chunk`, which ends `end` bytes into the file."""
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:  # its object is the chunk and what the decoder had kept of the one before
        raise ValueError(f"{file}: not UTF-8 at byte {end - len(error.object) + error.start}") from None


def _describe_file(format: str, file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"format": format, "name": file.name, "bytes": file.stat().st_size, "sha256": digest}
