"""The encoded documents on disk while a corpus is made: spans, each of them whole or not there.

A span is a run of documents of one source. Its training documents are a shard of the finished corpus; its held-out
documents wait in parts, until `merge_parts` makes one shard of all of them. A sealed record with the hashes of these
files and the place that was reached is written last.
"""

import hashlib
import heapq
import io
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memlayers.files import file_aside, find_damage, read_if_whole, write_sealed
from memlayers.lm.data.corpus import SPLITS
from memlayers.lm.data.tokenize import DOCUMENT

HELD_OUT = SPLITS[1:]
# One entry a document that waits in a part.
PART = np.dtype([("rank", "<i8"), ("tokens", "<i8"), ("words", "<i8"), ("bytes", "<i8")])
COPIED_AT_ONCE = 1 << 16  # documents, or tokens
TOKENS_AHEAD = 1 << 22  # that are read ahead of the merging, of all parts together


class Place(NamedTuple):
    """Up to where the documents are encoded: source, file of it, documents of that file, and the hash over those."""

    source: int
    file: int
    documents: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Span:
    """A span that is on disk. `counts` and `files` (SHA-256 by name) are those of each split."""

    number: int
    source: int
    end: Place
    counts: dict[str, dict[str, int]]
    files: dict[str, dict[str, str]]

    @property
    def record(self) -> str:
        return record_name(self.number)

    def file_hashes(self) -> dict[str, str]:
        return {name: digest for files in self.files.values() for name, digest in files.items()}


def record_name(number: int) -> str:
    return f"span-{number:05}.json"


class SpanWriter:
    """Collects the encoded documents of one span in memory, and writes it."""

    def __init__(self, folder: Path, number: int, source: int, dtype: np.dtype) -> None:
        self.number, self.source = number, source
        self._folder, self._dtype = folder, dtype
        self._tokens = {split: array("H" if dtype.itemsize == 2 else "I") for split in SPLITS}
        self._entries = {split: array("q") for split in SPLITS}  # of each document what `PART` has

    @property
    def longest(self) -> int:
        """Tokens of the split that has most of them."""
        return max(map(len, self._tokens.values()))

    def add(self, split: str, tokens: Sequence[int], *, rank: int, words: int, bytes: int) -> None:
        """Append one document; `rank` is below 2**63."""
        self._tokens[split].extend(tokens)
        self._entries[split].extend((rank, len(tokens), words, bytes))

    def write(self, end: Place) -> Span:
        """Write the span's files, then its record."""
        counts: dict[str, dict[str, int]] = {}
        files: dict[str, dict[str, str]] = {}
        for split in SPLITS:
            entries = np.frombuffer(self._entries[split], PART.newbyteorder("=")).astype(PART)
            counts[split] = {
                "documents": len(entries),
                **{name: int(entries[name].sum()) for name in ("tokens", "words", "bytes")},
            }
            files[split] = self._write_split(split, entries) if len(entries) else {}
        span = Span(self.number, self.source, end, counts, files)
        write_sealed(self._folder / span.record, asdict(span))
        return span

    def _write_split(self, split: str, entries: np.ndarray) -> dict[str, str]:
        order = np.argsort(entries["rank"], kind="stable")
        unordered = np.frombuffer(self._tokens[split], f"u{self._dtype.itemsize}")
        starts = np.cumsum(entries["tokens"]) - entries["tokens"]
        entries = entries[order]
        tokens = np.empty(len(unordered), self._dtype)
        done = 0
        for start, length in zip(starts[order].tolist(), entries["tokens"].tolist(), strict=True):
            tokens[done : done + length] = unordered[start : start + length]
            done += length
        name = f"{split}-{self.number:05}"
        written = {f"{name}.tokens": write_chunks(self._folder / f"{name}.tokens", [tokens])}
        if split in HELD_OUT:
            file = part_entries(name)
            written[file] = write_chunks(self._folder / file, [entries])
        else:
            file = f"{name}.documents.npy"
            written[file] = write_chunks(self._folder / file, document_chunks([entries]))
        return written


def part_entries(name: str) -> str:
    return f"{name}.entries"


def read_spans(folder: Path) -> list[Span]:
    """The spans that are in `folder`, whole and verified, from the first on. Raises `OSError` if one cannot be read."""
    spans: list[Span] = []
    while True:
        record = read_if_whole(folder / record_name(len(spans)))
        if not record:
            break
        spans.append(Span(**{**record, "end": Place(*record["end"])}))
    described = {name: {"sha256": digest} for span in spans for name, digest in span.file_hashes().items()}
    damaged = dict(find_damage(folder, described))
    whole = next((place for place, span in enumerate(spans) if damaged.keys() & span.file_hashes()), len(spans))
    return spans[:whole]


def merge_parts(folder: Path, split: str, spans: Sequence[Span], dtype: np.dtype) -> dict[str, str]:
    """Make one shard of all parts of a held-out split, ordered by rank; the SHA-256 of its files by their suffix."""
    names = [f"{split}-{span.number:05}" for span in spans if span.counts[split]["documents"]]
    count = sum(span.counts[split]["documents"] for span in spans)
    entries = [folder / part_entries(name) for name in names]
    tokens = [_Reader(folder / f"{name}.tokens", dtype, TOKENS_AHEAD // len(names)) for name in names]
    return {
        "tokens": write_chunks(folder / f"{split}.tokens", _merged_tokens(tokens, entries)),
        "documents.npy": write_chunks(
            folder / f"{split}.documents.npy", document_chunks(_merged_entries(entries), count)
        ),
    }


class _Reader:
    """A file from its beginning on, open only while it is read: there may be more parts than descriptors."""

    def __init__(self, file: Path, dtype: np.dtype, ahead: int) -> None:
        self._file, self._dtype, self._ahead = file, dtype, ahead
        self._rest = np.empty(0, dtype)
        self._reached = 0  # bytes

    def take(self, count: int) -> np.ndarray:
        """The next `count` items, fewer at the end."""
        if count > len(self._rest):
            with self._file.open("rb") as stream:
                stream.seek(self._reached)
                raw = stream.read(max(count - len(self._rest), self._ahead) * self._dtype.itemsize)
            self._reached += len(raw)
            self._rest = np.concatenate([self._rest, np.frombuffer(raw, self._dtype)])
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def _merged_tokens(tokens: Sequence[_Reader], entries: Sequence[Path]) -> Iterator[np.ndarray]:
    collected: list[np.ndarray] = []
    size = 0
    for part, entry in _by_rank(entries):
        document = tokens[part].take(entry[1])
        assert len(document) == entry[1]
        collected.append(document)
        size += len(document)
        if size >= COPIED_AT_ONCE:
            yield np.concatenate(collected)
            collected, size = [], 0
    if collected:
        yield np.concatenate(collected)


def _merged_entries(entries: Sequence[Path]) -> Iterator[np.ndarray]:
    collected: list[tuple[int, ...]] = []
    for _, entry in _by_rank(entries):
        collected.append(entry)
        if len(collected) == COPIED_AT_ONCE:
            yield np.array(collected, PART)
            collected = []
    if collected:
        yield np.array(collected, PART)


def _by_rank(entries: Sequence[Path]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The entries of all parts and the parts they are of, by rank; the earlier document first where ranks are equal."""
    at_once = max(1, COPIED_AT_ONCE // len(entries))

    def walk(part: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        reader = _Reader(entries[part], PART, at_once)
        while len(some := reader.take(at_once)):
            for entry in some.tolist():
                yield entry[0], part, entry

    for _, part, entry in heapq.merge(*map(walk, range(len(entries))), key=lambda item: item[:2]):
        yield part, entry


def document_chunks(chunks: Iterable[np.ndarray], count: int | None = None) -> Iterator[np.ndarray | bytes]:
    """What `np.save` writes for the documents of `PART` entries; `count` of them if there are several chunks."""
    offset = 0
    for number, entries in enumerate(chunks):
        if number == 0:
            yield _npy_header(len(entries) if count is None else count)
        documents = np.empty(len(entries), DOCUMENT)
        documents["offset"] = offset + np.cumsum(entries["tokens"]) - entries["tokens"]
        documents["words"], documents["bytes"] = entries["words"], entries["bytes"]
        offset += int(entries["tokens"].sum())
        yield documents


def _npy_header(count: int) -> bytes:
    stream = io.BytesIO()
    shape = {"descr": np.lib.format.dtype_to_descr(DOCUMENT), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, shape)
    return stream.getvalue()


def write_chunks(file: Path, chunks: Iterable[np.ndarray | bytes]) -> str:
    """Write a file aside, onto the disk, into place; returns its SHA-256."""
    digest = hashlib.sha256()
    with file_aside(file) as aside, aside.open("wb") as stream:
        for chunk in chunks:
            content: Any = chunk if isinstance(chunk, bytes) else chunk.view(np.uint8).data
            digest.update(content)
            stream.write(content)
    return digest.hexdigest()
