"""Parquet: one document a row."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from memlayers.lm.data.sources.base import Document, FileSource, Skip, read_records, text_and_id_columns, to_document
from memlayers.lm.data.sources.streams import READ_BYTES

ROWS = 64  # decoded at a time: small, for a row may be a book


@dataclass(frozen=True)
class Parquet(FileSource):
    """One document a row; only the columns of the text and of the id are read, of any kind of string.

    Pages are compared with their checksums where a file has them.

    A file without the column of the id is held out by its texts, as a row is whose id is null.
    """

    format: ClassVar[str] = "parquet"
    text_field: str = "text"
    id_field: str = "id"

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        return read_records(self._rows(), self._document, skip)

    def _document(self, number: int, row: dict[str, Any]) -> Document:
        place = f"{self.file}, row {number}"
        try:
            record = {name: scalar.as_py() for name, scalar in row.items()}
        except UnicodeDecodeError:  # writers do not all check
            raise ValueError(f"{place}: a string is not UTF-8") from None
        return to_document(record, place, text_field=self.text_field, id_field=self.id_field)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield rows as Arrow's scalars, by column."""
        import pyarrow  # optional
        import pyarrow.parquet

        try:
            # Buffered, or it reads the column of a whole row group before the first row.
            with pyarrow.parquet.ParquetFile(
                self.file, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as parquet:
                columns = text_and_id_columns(
                    parquet.schema_arrow, self.name, text_field=self.text_field, id_field=self.id_field
                )
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
