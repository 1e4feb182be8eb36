"""Datasets of the Hugging Face Hub, or in its layout on disk."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlayers.lm.data.sources.base import Document, Read, Skip, nobody
from memlayers.lm.data.sources.records import to_document

PREFIX = "hf:"
ROWS = 64  # fetched at a time: few, for a row may be a book


@dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face Hub, streamed with `datasets`; one document a row.

    Named `hf:NAME`, `hf:NAME:CONFIG` or `hf:NAME:CONFIG:SPLIT`; NAME may be a local folder of data files, CONFIG may
    be left empty. News articles much like those that product-key memories were published with are
    `hf:vblagoje/cc_news`, with the field `text`.

    A stream has no place to go on from: preparing that goes on after a kill reads the dataset again from its first
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
        for number, row in enumerate(self._rows(), start=1):
            place = f"{self.name}, row {number}"
            try:
                document = to_document(row, place, text_field=self.text_field, id_field=self.id_field)
            except ValueError as error:
                if skip is None:
                    raise
                skip(str(error))
                continue
            yield document

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
        import datasets

        try:
            with _quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stream = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        except Exception as error:
            raise ValueError(f"{self.name}: not readable with `datasets`: {error}") from error
        columns = self._columns(stream.features)
        return iter(stream.select_columns(columns) if columns else stream)

    def _columns(self, features: dict[str, Any] | None) -> list[str]:
        """The columns to read; none named if the dataset does not say which it has, so that its rows have to tell."""
        if features is None:
            return []
        if self.text_field not in features:
            names = ", ".join(map(repr, features))
            raise ValueError(f"{self.name}: no column {self.text_field!r} (text_field); it has {names}")
        kind = features[self.text_field]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"{self.name}: column {self.text_field!r} (text_field) is {kind}, expected string")
        return [name for name in features if name in (self.text_field, self.id_field)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither log messages nor progress bars of `datasets` and its hub while this lasts."""
    import datasets
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
