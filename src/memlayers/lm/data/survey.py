"""The first pass over the documents: every record is checked, counted and hashed, and a sample is drawn."""

import hashlib
import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memlayers.lm.data.corpus import SPLITS, progress_bar
from memlayers.lm.data.sources import Document, Source

if TYPE_CHECKING:
    from memlayers.lm.data.config import DataConfig

MOST_HASHES = 1 << 18


class Measured(NamedTuple):
    """A document, not blank, with what both passes need to know of it."""

    text: str
    split: str
    rank: int  # a hash, below 2**63, that orders the documents
    num_bytes: int
    digest: bytes  # SHA-256 over the documents of its file up to it


class Survey(NamedTuple):
    """What the first pass found: figures for the record of it, and a sample of the training documents.

    Of the figures, ``files`` has the SHA-256 over the documents of each file of each source, and ``corpus_sha256`` is
    that over these hashes in their order.
    """

    figures: dict[str, Any]
    sample: list[bytes]


def survey_documents(entries: Sequence[Sequence[Source]], config: "DataConfig", progress: bool) -> Survey:
    """Read everything once. Raises `ValueError` for a malformed record and for a split that is left without documents.

    The sample has the training documents of lowest rank, just enough of them for `config.tokenizer_megabytes`.
    """
    percent = config.resolved_holdout_percent()
    counts, num_bytes, left_out, copies = dict.fromkeys(SPLITS, 0), 0, Counter[str](), _Copies()
    skip = (lambda message: left_out.update(["malformed"])) if config.skip_malformed else None
    sample = _Sample(config.tokenizer_megabytes * 1e6)
    hashes: list[list[str]] = []
    with progress_bar("reading", None, progress) as bar:
        for files in entries:
            hashes.append([])
            for source in files:
                digest = hashlib.sha256()
                for document in measured_documents(
                    source, percent, digest, skip=skip, blank=lambda: left_out.update(["blank"])
                ):
                    counts[document.split] += 1
                    num_bytes += document.num_bytes
                    copies.add(document)
                    left_out["strange"] += is_strange(document.text)
                    if document.split == "train":
                        sample.add(document)
                    bar.update(document.num_bytes)
                hashes[-1].append(digest.hexdigest())
    for split, count in counts.items():
        if count == 0:
            raise ValueError(
                f"data.sources: none of the {sum(counts.values())} documents falls into the {split} split with "
                f"data.holdout_percent {percent}; give more documents or another data.holdout_percent"
            )
    figures = {
        "corpus_sha256": hashlib.sha256("".join(itertools.chain(*hashes)).encode()).hexdigest(),
        "files": hashes,
        "num_bytes": num_bytes,
        "blank_documents": left_out["blank"],
        "malformed_records": left_out["malformed"],
        "strange_documents": left_out["strange"],
        "copied_documents": copies.held_out(),
    }
    return Survey(figures, sample.texts())


def measured_documents(
    source: Source,
    percent: int,
    digest: Any,
    *,
    skip: Callable[[str], None] | None,
    blank: Callable[[], None] = lambda: None,
) -> Iterator[Measured]:
    """Yield the documents of a file that are not blank, in its order; `digest` grows with each."""
    for document in source.documents(skip=skip):
        if not document.text or document.text.isspace():
            blank()
            continue
        split, rank = _split_and_rank(document, percent)
        text = document.text.encode()
        key = b"" if document.key is document.text else document.key.encode()
        digest.update(b"%d %d\n" % (len(key), len(text)))
        digest.update(key)
        digest.update(text)
        yield Measured(document.text, split, rank, len(text), digest.digest())


def is_strange(text: str) -> bool:
    """Whether it is hardly a text: it has a zero byte, or a hundredth of it cannot be read."""
    unreadable = len(re.findall("[\0-\x08\x0e-\x1f\x7f\ufffd]", text))
    return "\0" in text or 100 * unreadable > len(text)


class _Copies:
    """Counts held-out documents whose text is in training, too: where ids decide, copies may go both ways.

    Once there are `MOST_HASHES` texts, every second of them, by its hash, is forgotten: the count is an estimate then.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # by hash: the held-out documents twice, and one more if it is in training
        self._every = 1

    def add(self, document: Measured) -> None:
        number = int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest(), "little")
        if number % self._every:
            return
        found = self._counts.get(number, 0)
        self._counts[number] = found | 1 if document.split == "train" else found + 2
        if len(self._counts) > MOST_HASHES:
            self._every *= 2
            self._counts = {number: found for number, found in self._counts.items() if number % self._every == 0}

    def held_out(self) -> int:
        return self._every * sum(found // 2 for found in self._counts.values() if found & 1)


class _Sample:
    """The documents of lowest rank, just enough of them for `budget` bytes: a random sample whatever their order."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._bytes = 0
        self._added = 0
        self._heap: list[tuple[int, int, bytes]] = []  # the highest rank on top

    def add(self, document: Measured) -> None:
        self._added += 1
        if self._bytes >= self._budget and -document.rank < self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-document.rank, -self._added, document.text.encode()))
        self._bytes += document.num_bytes
        while self._bytes - len(self._heap[0][2]) >= self._budget:
            self._bytes -= len(heapq.heappop(self._heap)[2])

    def texts(self) -> list[bytes]:
        return [text for _, _, text in sorted(self._heap, reverse=True)]


def _split_and_rank(document: Document, percent: int) -> tuple[str, int]:
    number = int(hashlib.md5(document.key.encode(), usedforsecurity=False).hexdigest(), 16)
    rank, remainder = divmod(number, 100)
    split = "validation" if remainder < percent else "test" if remainder < 2 * percent else "train"
    return split, rank >> 59  # 62 of its bits
