"""JSON lines: one object a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from memlayers.lm.data.sources.base import Document, FileSource, Skip
from memlayers.lm.data.sources.records import to_document
from memlayers.lm.data.sources.streams import read_lines, without_mark


@dataclass(frozen=True)
class JsonLines(FileSource):
    """One JSON object a line; blank lines are left out. A document without an id is held out by its text."""

    format: ClassVar[str] = "jsonl"
    text_field: str = "text"
    id_field: str = "id"

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        offset = 0  # of the bytes that were read, in the decompressed file
        for number, line in enumerate(read_lines(self.file), start=1):
            place = f"{self.file}, line {number}"
            content = without_mark(line, place) if number == 1 else line
            offset += len(line)
            try:
                document = self._document(content, place, start=offset - len(content))
            except ValueError as error:
                if skip is None:
                    raise
                skip(str(error))
                continue
            if document is not None:
                yield document

    def _document(self, line: bytes, place: str, *, start: int) -> Document | None:
        """The document of a line that begins `start` bytes into the file; None if it is blank."""
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 at byte {start + error.start}") from None
        if not decoded or decoded.isspace():
            return None
        try:
            record = json.loads(decoded.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # integers of thousands of digits, nesting of thousands of levels
            raise ValueError(f"{place}: not readable as JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected a JSON object, found {type(record).__name__}")
        return to_document(record, place, text_field=self.text_field, id_field=self.id_field)
