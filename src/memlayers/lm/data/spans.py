"""The encoded documents on disk while a corpus is made: spans, each of them whole or not there.

A span is a run of documents of one source. Its training documents are a shard of the finished corpus; its held-out
documents wait in parts, until `merge_parts` makes one shard of all of them. A sealed record with the hashes of these
files and the place that was reached is written last.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memlayers.files import describe_files, file_aside, find_damage, read_if_whole, write_sealed
from memlayers.lm.data.corpus import DOCUMENT, SPLITS

HELD_OUT = SPLITS[1:]
# One entry a document that waits in a part.
PART = np.dtype([("rank", "<i8"), ("tokens", "<i8"), ("words", "<i8"), ("bytes", "<i8")])
MERGED_BYTES = 32 << 20  # of parts, about, that are in memory at a time while they are merged


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
        """Write a shard, or a part of a held-out split; returns the SHA-256 of its files by their names."""
        name = f"{split}-{self.number:05}"
        ordered = by_rank(entries, np.frombuffer(self._tokens[split], f"u{self._dtype.itemsize}").astype(self._dtype))
        if split not in HELD_OUT:
            return write_shard(self._folder / name, [ordered], len(entries))
        for suffix, array_of in zip(("entries", "tokens"), ordered, strict=True):
            with file_aside(self._folder / f"{name}.{suffix}") as aside:
                aside.write_bytes(array_of.view(np.uint8).data)
        return _hashes(self._folder, (f"{name}.tokens", f"{name}.entries"))


def read_spans(folder: Path) -> list[Span]:
    """Return the verified spans up to the first that is not whole. Raises `OSError` if one cannot be read."""
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
    """Make one shard of all parts of a held-out split, ordered by rank; returns the SHA-256 of its files."""
    parts = [span for span in spans if span.counts[split]["documents"]]
    documents, tokens = (sum(part.counts[split][name] for part in parts) for name in ("documents", "tokens"))
    pieces = -(-(documents * PART.itemsize + tokens * dtype.itemsize) // MERGED_BYTES)
    files = [folder / f"{split}-{part.number:05}" for part in parts]
    return write_shard(folder / split, _merged(files, dtype, pieces), documents)


def _merged(files: Sequence[Path], dtype: np.dtype, pieces: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield documents of all parts by rank: those of the lowest ranks first, as many times as there are `pieces`.

    Ranks are hashes, so pieces are of about equal size. Files are open one at a time: there may be more parts than
    descriptors.
    """
    reached = [(0, 0)] * len(files)  # documents and tokens of each part
    for piece in range(1, pieces + 1):
        found = []
        for place, file in enumerate(files):
            document, token = reached[place]
            part = np.memmap(f"{file}.entries", PART, "r")
            end = int(np.searchsorted(part["rank"], (1 << 63) * piece // pieces - 1, side="right"))
            entries = np.array(part[document:end])
            reached[place] = end, token + int(entries["tokens"].sum())
            found.append((entries, np.array(np.memmap(f"{file}.tokens", dtype, "r")[token : reached[place][1]])))
        entries_of, tokens_of = zip(*found, strict=True)
        yield by_rank(np.concatenate(entries_of), np.concatenate(tokens_of))


def by_rank(entries: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return documents ordered by rank, the earlier one first where ranks are equal."""
    order = np.argsort(entries["rank"], kind="stable")
    starts = np.cumsum(entries["tokens"]) - entries["tokens"]
    ordered = np.empty_like(tokens)
    done = 0
    for start, length in zip(starts[order].tolist(), entries["tokens"][order].tolist(), strict=True):
        ordered[done : done + length] = tokens[start : start + length]
        done += length
    return entries[order], ordered


def write_shard(file: Path, pieces: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> dict[str, str]:
    """Write `count` documents, given in pieces as entries and tokens; returns the SHA-256 of the files by their names.

    The documents are as `np.save` writes them.
    """
    names = f"{file.name}.tokens", f"{file.name}.documents.npy"
    header = {"descr": np.lib.format.dtype_to_descr(DOCUMENT), "fortran_order": False, "shape": (count,)}
    offset = 0
    with (
        file_aside(file.with_name(names[0])) as tokens_aside,
        file_aside(file.with_name(names[1])) as documents_aside,
        tokens_aside.open("wb") as tokens_file,
        documents_aside.open("wb") as documents_file,
    ):
        np.lib.format.write_array_header_1_0(documents_file, header)
        for entries, tokens in pieces:
            documents = np.empty(len(entries), DOCUMENT)
            documents["offset"] = offset + np.cumsum(entries["tokens"]) - entries["tokens"]
            documents["words"], documents["bytes"] = entries["words"], entries["bytes"]
            tokens_file.write(tokens.view(np.uint8).data)
            documents_file.write(documents.view(np.uint8).data)
            offset += len(tokens)
    return _hashes(file.parent, names)


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in describe_files(folder, names).items()}
