"""JSON lines: one object a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from memlayers.lm.data.sources.base import Document, FileSource, Skip, read_records, to_document
from memlayers.lm.data.sources.streams import read_lines, without_mark


@dataclass(frozen=True)
class JsonLines(FileSource):
    """One JSON object a line; blank lines are left out. A document without an id is held out by its text."""

    format: ClassVar[str] = "jsonl"
    text_field: str = "text"
    id_field: str = "id"

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        return read_records(self._lines(), self._document, skip)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line, and where it begins in the decompressed file."""
        offset = 0
        for number, line in enumerate(read_lines(self.file), start=1):
            content = without_mark(line, f"{self.file}, line 1") if number == 1 else line
            offset += len(line)
            yield offset - len(content), content

    def _document(self, number: int, found: tuple[int, bytes]) -> Document | None:
        place = f"{self.file}, line {number}"
        start, line = found
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
