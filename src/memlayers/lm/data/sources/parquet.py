"""Parquet: one document a row."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from memlayers.lm.data.sources.base import Document, FileSource, Skip
from memlayers.lm.data.sources.records import to_document
from memlayers.lm.data.sources.streams import READ_BYTES

ROWS = 64  # decoded at a time: small, for a row may be a book


@dataclass(frozen=True)
class Parquet(FileSource):
    """One document a row; only the columns of the text and of the id are read.

    A file without the column of the id is held out by its texts, as a row is whose id is null.
    """

    format: ClassVar[str] = "parquet"
    text_field: str = "text"
    id_field: str = "id"

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        for number, row in enumerate(self._rows(), start=1):
            place = f"{self.file}, row {number}"
            try:
                document = to_document(_values(row, place), place, text_field=self.text_field, id_field=self.id_field)
            except ValueError as error:
                if skip is None:
                    raise
                skip(str(error))
                continue
            yield document

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The rows as Arrow's scalars, by column."""
        import pyarrow
        import pyarrow.parquet

        try:
            # Buffered, or it reads the column of a whole row group before the first row.
            with pyarrow.parquet.ParquetFile(self.file, buffer_size=READ_BYTES, pre_buffer=False) as parquet:
                columns = self._columns(parquet.schema_arrow)
                for batch in parquet.iter_batches(ROWS, columns=columns, use_threads=False):
                    arrays = [batch.column(name) for name in columns]
                    for values in zip(*arrays, strict=True):
                        yield dict(zip(columns, values, strict=True))
        except MemoryError:  # which is one of Arrow's errors, too
            raise
        except (pyarrow.ArrowException, OSError) as error:
            number = getattr(error, "errno", None)  # Arrow's own have none, but for those of the operating system
            if number is not None:
                raise OSError(number, os.strerror(number), str(self.file)) from error
            raise ValueError(f"{self.file}: not readable as Parquet: {error}") from None

    def _columns(self, schema: Any) -> list[str]:
        """The columns to read. Raises `ValueError` if one is missing or of another type."""
        from pyarrow import types

        names = ", ".join(map(repr, schema.names))
        if schema.names.count(self.text_field) != 1:
            raise ValueError(f"{self.file}: no single column {self.text_field!r} (text_field); it has {names}")
        kind = schema.field(self.text_field).type
        if not types.is_string(kind) and not types.is_large_string(kind):
            raise ValueError(
                f"{self.file}: column {self.text_field!r} (text_field) is {kind}, expected string; it has {names}"
            )
        if self.id_field not in schema.names or self.id_field == self.text_field:
            return [self.text_field]
        if schema.names.count(self.id_field) != 1:
            raise ValueError(f"{self.file}: no single column {self.id_field!r} (id_field); it has {names}")
        kind = schema.field(self.id_field).type
        if not any(check(kind) for check in (types.is_string, types.is_large_string, types.is_integer, types.is_null)):
            raise ValueError(f"{self.file}: column {self.id_field!r} (id_field) is {kind}, expected string or integer")
        return [self.text_field, self.id_field]


def _values(row: dict[str, Any], place: str) -> dict[str, Any]:
    try:
        return {name: scalar.as_py() for name, scalar in row.items()}
    except UnicodeDecodeError:  # writers do not all check
        raise ValueError(f"{place}: a string is not UTF-8") from None
