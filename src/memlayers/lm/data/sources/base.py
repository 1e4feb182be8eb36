"""What a source of documents is, and what sources have in common: files, records, columns of a table."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

R = TypeVar("R")

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


def read_records(
    records: Iterable[R], document: Callable[[int, R], Document | None], skip: Skip | None
) -> Iterator[Document]:
    """Yield what `document` makes of each record and its number, from 1; it returns None where there is no document.

    What is malformed raises `ValueError`, or is told to `skip`; an error of `records` itself always raises.
    """
    for number, record in enumerate(records, start=1):
        try:
            found = document(number, record)
        except ValueError as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        if found is not None:
            yield found


def to_document(record: Mapping[str, Any], place: str, *, text_field: str, id_field: str) -> Document:
    """Return the document of a record. One without an id, or with an empty one, has its text as its key.

    Raises `ValueError` naming the `place` if the text is missing or no string, or the id no string or integer.
    """
    if text_field not in record:
        raise ValueError(f"{place}: no field {text_field!r} (text_field); it has {', '.join(map(repr, record))}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {text_field!r} is {type(text).__name__}, expected a string")
    key = record.get(id_field) if id_field else None
    if key is None or key == "":
        key = text
    elif isinstance(key, bool) or not isinstance(key, str | int):
        raise ValueError(f"{place}: field {id_field!r} is {type(key).__name__}, expected a string or an integer")
    try:
        f"{key}{text}".encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        raise ValueError(f"{place}: a string holds a lone surrogate, which UTF-8 cannot encode") from None
    return Document(str(key), text)


def text_and_id_columns(schema: Any, name: str, *, text_field: str, id_field: str) -> list[str]:
    """Return the columns of an Arrow schema that documents are made of.

    Raises `ValueError` naming the table if one is there twice or of another type, or if the text is missing.
    """
    from pyarrow import types  # optional

    def plain(kind: Any) -> Any:
        """A column of few values may be stored as numbers of them: pandas' categories, polars' enumerations."""
        return kind.value_type if types.is_dictionary(kind) else kind

    def is_text(kind: Any) -> bool:
        return any(is_kind(plain(kind)) for is_kind in (types.is_string, types.is_large_string, types.is_string_view))

    names = ", ".join(map(repr, schema.names))
    if schema.names.count(text_field) != 1:
        raise ValueError(f"{name}: no single column {text_field!r} (text_field); it has {names}")
    kind = schema.field(text_field).type
    if not is_text(kind):
        raise ValueError(f"{name}: column {text_field!r} (text_field) is {kind}, expected string; it has {names}")
    if not id_field or id_field not in schema.names or id_field == text_field:
        return [text_field]
    if schema.names.count(id_field) != 1:
        raise ValueError(f"{name}: no single column {id_field!r} (id_field); it has {names}")
    kind = schema.field(id_field).type
    if not (is_text(kind) or types.is_integer(plain(kind)) or types.is_null(kind)):
        raise ValueError(f"{name}: column {id_field!r} (id_field) is {kind}, expected string or integer")
    return [text_field, id_field]
