"""Datasets of the Hugging Face Hub, or in its layout on disk."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlayers.lm.data.sources.base import (
    Document,
    Read,
    Skip,
    nobody,
    read_records,
    text_and_id_columns,
    to_document,
)

PREFIX = "hf:"
ROWS = 64  # fetched at a time: few, for a row may be a book


@dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face Hub, streamed with `datasets`; one document a row.

    Named `hf:NAME`, `hf:NAME:CONFIG` or `hf:NAME:CONFIG:SPLIT`; NAME may be a local folder of data files, CONFIG may
    be left empty. News articles much like those that product-key memories were published with are
    `hf:vblagoje/cc_news`, with the field `text`.

    A stream cannot be read from its middle: preparing that resumes after a kill reads the dataset again from its first
    row, over the network, though it encodes only what is not encoded yet.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    id_field: str = "id"

    @classmethod
    def parse(cls, entry: str, *, text_field: str, id_field: str) -> "HuggingFace":
        """From `hf:NAME:CONFIG:SPLIT`. A colon within a NAME is understood if that is a folder."""
        parts = entry.removeprefix(PREFIX).split(":")
        folders = [count for count in range(2, len(parts) + 1) if Path(":".join(parts[:count])).is_dir()]
        count = max(folders, default=1)
        dataset, rest = ":".join(parts[:count]), ":".join(parts[count:])
        if not dataset.strip():
            raise ValueError(f"sources: {entry!r} is not hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
        config, _, split = rest.partition(":")
        return cls(dataset, config or None, split or "train", text_field, id_field)

    @property
    def name(self) -> str:
        split = "" if self.split == "train" else self.split
        return PREFIX + ":".join([self.dataset, self.config or "", split]).rstrip(":")

    def stamp(self) -> None:
        """None: only reading it all would show that it has changed."""

    def describe(self, *, read: Read = nobody) -> dict[str, Any]:
        return {"format": "huggingface", "name": self.dataset, "config": self.config, "split": self.split}

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        return read_records(self._rows(), self._document, skip)

    def _document(self, number: int, row: dict[str, Any]) -> Document:
        return to_document(row, f"{self.name}, row {number}", text_field=self.text_field, id_field=self.id_field)

    def _rows(self) -> Iterator[dict[str, Any]]:
        rows = self._stream()
        while True:
            try:
                with _quiet():
                    some = list(itertools.islice(rows, ROWS))
            except Exception as error:  # it raises whatever its network and file layers do
                raise ValueError(f"{self.name}: not readable with `datasets` to its end: {error}") from error
            if not some:
                return
            yield from some

    def _stream(self) -> Iterator[dict[str, Any]]:
        import datasets  # optional

        try:
            with _quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stream = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        except Exception as error:
            raise ValueError(f"{self.name}: not readable with `datasets`: {error}") from error
        if stream.features is None:  # it does not say which columns it has, so its rows have to tell
            return iter(stream)
        schema = stream.features.arrow_schema
        columns = text_and_id_columns(schema, self.name, text_field=self.text_field, id_field=self.id_field)
        return iter(stream.select_columns(columns))


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch off log messages and progress bars of `datasets` and its hub while this lasts."""
    import datasets  # optional
    import huggingface_hub

    utilities = (datasets.utils, huggingface_hub.utils)
    before = [(utils, utils.logging.get_verbosity(), utils.are_progress_bars_disabled()) for utils in utilities]
    try:
        for utils in utilities:
            utils.logging.set_verbosity_error()
            utils.disable_progress_bars()
        yield
    finally:
        for utils, verbosity, were_disabled in before:
            utils.logging.set_verbosity(verbosity)
            if not were_disabled:
                utils.enable_progress_bars()
