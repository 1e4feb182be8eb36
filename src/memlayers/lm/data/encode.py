"""The second pass over the documents: encode what is not encoded yet, span after span."""

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from memlayers.lm.data.corpus import progress_bar
from memlayers.lm.data.sources import Source
from memlayers.lm.data.spans import Place, Span, SpanWriter
from memlayers.lm.data.survey import Measured, measured_documents
from memlayers.lm.data.tokenize import encode_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from memlayers.lm.data.config import DataConfig

# Training tokens that end a shard: 32 MB of them, some twenty seconds of work that a kill can cost.
SHARD_TOKENS = 1 << 24
# Characters encoded at once: enough to keep every core busy, little enough to be forgotten.
BATCH_CHARACTERS = 4 << 20
# What a document costs besides its characters, so that a batch of very short ones is of bounded size, too.
DOCUMENT_CHARACTERS = 100

T = TypeVar("T")


class ChangedError(ValueError):
    """A source has other documents than it had in the first pass."""


class _Read(NamedTuple):
    document: Measured
    place: Place
    words: int


def encode_documents(
    entries: Sequence[Sequence[Source]],
    config: "DataConfig",
    tokenizer: "Tokenizer",
    dtype: np.dtype,
    files: list[list[str]],
    folder: Path,
    spans: list[Span],
    *,
    num_bytes: int,
    eot_id: int,
    progress: bool,
) -> list[Span]:
    """Return all spans: those that `folder` has, and the rest, which this writes.

    `files` are the hashes of the survey and `num_bytes` what it counted. A span ends with the document with which its
    training tokens reach `SHARD_TOKENS`, and at the end of a source. (Held-out tokens end it too when they reach that:
    they wait in memory as well.) Raises `ChangedError` if a file does not have the documents that the survey saw.
    """
    spans = list(spans)
    start = spans[-1].end if spans else Place(0, 0)
    done = sum(counts["bytes"] for span in spans for counts in span.counts.values())
    span: SpanWriter | None = None
    with (
        progress_bar("encoding", num_bytes, progress, initial=done) as bar,
        read_ahead(
            _documents(entries, config, files, start),
            size=lambda read: DOCUMENT_CHARACTERS + len(read.document.text),
            limit=BATCH_CHARACTERS,
        ) as batches,
    ):
        for batch in batches:
            encoded = encode_texts(tokenizer, [read.document.text for read in batch])
            for read, tokens in zip(batch, encoded, strict=True):
                document, place = read.document, read.place
                if span is not None and span.source != place.source:
                    spans.append(span.write(Place(place.source, place.file)))
                    span = None
                if span is None:
                    span = SpanWriter(folder, len(spans), place.source, dtype)
                span.add(
                    document.split,
                    [eot_id, *tokens],
                    rank=document.rank,
                    words=read.words,
                    bytes=document.num_bytes,
                )
                if span.longest >= SHARD_TOKENS:
                    spans.append(span.write(place))
                    span = None
            bar.update(sum(read.document.num_bytes for read in batch))
    if span is not None:
        spans.append(span.write(Place(len(entries), 0)))
    return spans


def _documents(
    entries: Sequence[Sequence[Source]], config: "DataConfig", files: list[list[str]], start: Place
) -> Generator[_Read | None]:
    """Yield the documents from `start` on, and None for each before it in its file; earlier files are not opened."""
    percent = config.resolved_holdout_percent()
    skip = (lambda message: None) if config.skip_malformed else None  # the survey has counted them
    for at in ((source, file) for source, group in enumerate(entries) for file in range(len(group))):
        if at < start[:2]:
            continue
        source, expected = entries[at[0]][at[1]], files[at[0]][at[1]]
        digest = hashlib.sha256()
        encoded = start.documents if at == start[:2] else 0
        for number, document in enumerate(measured_documents(source, percent, digest, skip=skip), start=1):
            if number > encoded:
                yield _Read(document, Place(*at, number, document.digest.hex()), len(document.text.split()))
                continue
            if number == encoded and document.digest.hex() != start.digest:
                raise ChangedError(f"{source.name} changed while it was read")
            yield None
        if digest.hexdigest() != expected:
            raise ChangedError(f"{source.name} changed while it was read")


@contextmanager
def read_ahead(items: Generator[T | None], *, size: Callable[[T], int], limit: int) -> Iterator[Iterator[list[T]]]:
    """Give lists of `items`, each ended by the item that brings it to `limit`; a thread reads while the caller works.

    A None among the items is left out; like every item it is a place at which the thread can stop. What the items
    raise reaches the caller in its turn, after the lists before it. The thread has ended when the context is left.
    """
    stop = threading.Event()

    def read() -> list[T]:
        collected: list[T] = []
        total = 0
        for item in items:
            if stop.is_set():
                break
            if item is None:
                continue
            collected.append(item)
            total += size(item)
            if total >= limit:
                break
        return collected

    def lists() -> Iterator[list[T]]:
        reading = pool.submit(read)
        while collected := reading.result():
            reading = pool.submit(read)
            yield collected

    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        try:
            yield lists()
        finally:
            stop.set()
