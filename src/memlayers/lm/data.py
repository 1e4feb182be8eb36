"""From local files to token files on disk, and back as windows for training.

`prepare` reads the sources twice, as streams: once to check every line, count the splits and take a sample for the
tokenizer, once to encode. What it leaves is a folder that `open_corpus` reads with numpy alone:

    manifest.json            configuration, hashes, counts, versions; written last
    tokenizer.json           as `tokenizers` and `transformers` load it
    train.tokens             uint16 or uint32, little-endian; each document is <|endoftext|> and its tokens
    train.documents.npy      offset (in tokens), words and bytes of each document
    validation.*, test.*     the same for the held-out documents

A word is whitespace-separated, a byte one of UTF-8. In each split the documents are ordered by a hash.
"""

import hashlib
import heapq
import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from memlayers import __version__
from memlayers.files import new_folder
from memlayers.lm.corpora import Document, Source, StandardLibrary, open_source
from memlayers.lm.tokenize import (
    DOCUMENT,
    END_OF_TEXT,
    SMALLEST_VOCABULARY,
    SplitWriter,
    encode_documents,
    token_dtype,
    train_tokenizer,
)

if TYPE_CHECKING:  # token files that are ready are read without it
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents, and how they become tokens.

    The md5 hash of a document's id, or of its text if it has no id, decides its split: with h its remainder by 100 and
    p the `holdout_percent`, h < p is validation, p <= h < 2p test, the rest training.
    """

    sources: tuple[str, ...] = ()  # text or .jsonl files, plain or .xz; none: Python's own standard library
    text_field: str = "text"  # of a JSON line: the document
    id_field: str = "id"  # of a JSON line: what its split is decided by; a line may lack it
    holdout_percent: int | None = (
        None  # of the documents, for validation and again for test; None: 1, but 5 of the library
    )
    vocab_size: int = 8192  # tokens, the 256 bytes and <|endoftext|> included
    tokenizer_megabytes: float = 16.0  # of training text, a random sample, that the tokenizer is trained on

    def __post_init__(self) -> None:
        if not isinstance(self.sources, list | tuple) or not all(isinstance(path, str) for path in self.sources):
            raise ValueError(f"sources must be a list of paths as strings, got {self.sources!r}")
        object.__setattr__(self, "sources", tuple(self.sources))
        for name in ("text_field", "id_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be the name of a field, got {getattr(self, name)!r}")
        percent = self.holdout_percent
        if percent is not None and not (_is_integer(percent) and 1 <= percent <= 49):
            raise ValueError(f"holdout_percent must be an integer from 1 to 49, or None, got {percent!r}")
        if not _is_integer(self.vocab_size) or not SMALLEST_VOCABULARY <= self.vocab_size <= 1 << 31:
            raise ValueError(
                f"vocab_size must be an integer from {SMALLEST_VOCABULARY} (every byte and {END_OF_TEXT}) to 2**31, "
                f"got {self.vocab_size!r}"
            )
        megabytes = self.tokenizer_megabytes
        if isinstance(megabytes, bool) or not isinstance(megabytes, int | float) or not 0 < megabytes < math.inf:
            raise ValueError(f"tokenizer_megabytes must be a finite number above 0, got {megabytes!r}")

    def resolved_holdout_percent(self) -> int:
        """The share in use. A library of some 700 files needs a larger one than a collection of many thousands."""
        if self.holdout_percent is not None:
            return self.holdout_percent
        return 1 if self.sources else 5


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, eq=False)
class Split:
    """The documents of one split, one after the other.

    `tokens` is a memory map [num_tokens] of uint16 or uint32; `documents` [num_documents] has the fields `offset`
    (where in `tokens` the document's <|endoftext|> lies), `words` and `bytes`.
    """

    tokens: np.ndarray
    documents: np.ndarray

    @property
    def num_tokens(self) -> int:
        """The <|endoftext|> of each document included."""
        return len(self.tokens)

    @property
    def num_words(self) -> int:
        return int(self.documents["words"].sum())

    @property
    def num_bytes(self) -> int:
        return int(self.documents["bytes"].sum())

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    def prefix(self, max_tokens: int) -> "Split":
        """The longest run of first documents with at most `max_tokens` tokens; at least one document.

        Documents are ordered by a hash, so this is a random sample of them, the same each time.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        ends = np.append(self.documents["offset"][1:], self.num_tokens)
        count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
        return Split(self.tokens[: ends[count - 1]], self.documents[:count])


@dataclass(frozen=True, eq=False)
class Corpus:
    """A prepared corpus, opened. `manifest` says what it was made from and by what."""

    folder: Path
    manifest: dict[str, Any]
    train: Split
    validation: Split
    test: Split

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer has; fewer than asked for if the text had too few pairs to merge."""
        return self.manifest["vocab_size"]

    @property
    def eot_id(self) -> int:
        """The token <|endoftext|>, which stands before each document."""
        return self.manifest["eot_id"]

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer for `transformers`; <|endoftext|> begins and ends a text, and is not added by itself."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_file=str(self.tokenizer_path),
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        )


class Windows(Dataset[dict[str, torch.Tensor]]):
    """A split as windows of `length` tokens that do not overlap, across documents; what is left at the end is dropped.

    An item is `{"input_ids": int64 [length], "labels": the same}`, as `transformers.Trainer` takes it.
    """

    def __init__(self, split: Split, length: int) -> None:
        if not _is_integer(length) or not 2 <= length <= split.num_tokens:
            raise ValueError(
                f"length must be an integer from 2 to the split's {split.num_tokens} tokens, got {length!r}"
            )
        self.split = split
        self.length = length

    def __len__(self) -> int:
        return self.split.num_tokens // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = range(len(self))[index] * self.length
        tokens = torch.from_numpy(self.split.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


def prepare(config: DataConfig, folder: str | Path, *, progress: bool = True) -> Corpus:
    """Tokenise the sources into `folder`, or open it if that is what it already holds.

    Works in a folder beside it that is renamed at the end, so `folder` is complete or not there. (A run that is killed
    leaves `.<folder>.<random>.partial` behind, which nothing reads.) Memory: the tokenizer's sample and one batch.

    Raises `ValueError`, before anything is written, for sources that are missing, empty or malformed, for a split that
    is left without documents, and for a folder that holds anything else, which is left as it is.
    """
    folder = Path(os.path.abspath(folder))
    sources: list[Source] = [
        open_source(path, text_field=config.text_field, id_field=config.id_field) for path in config.sources
    ] or [StandardLibrary()]
    asked = _identity(config, sources)
    if _is_occupied(folder):
        return _reuse(folder, asked)

    survey = _survey(sources, config, progress)
    try:
        with new_folder(folder) as aside:
            manifest = _write(aside, sources, config, survey, progress) | {"asked": asked}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError:
        if not _is_occupied(folder):  # else another run was first: what it left is compared with what was asked for
            raise
    return _reuse(folder, asked)


def open_corpus(folder: str | Path) -> Corpus:
    """Open what `prepare` left. Needs neither `tokenizers` nor `transformers`.

    Raises `ValueError` if the folder is no prepared corpus, is of another format, or lacks part of its files.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        format = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: some other JSON, a list
        raise ValueError(f"{folder} holds no prepared corpus (no readable {MANIFEST})") from None
    if format != FORMAT:
        raise ValueError(f"{folder} holds a corpus of format {format!r}, this version reads format {FORMAT}")
    try:
        tokenizer_hash = hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest()
        splits = {name: _open_split(folder, name, manifest) for name in SPLITS}
    except OSError as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    if tokenizer_hash != manifest["tokenizer"]["sha256"]:
        raise ValueError(f"{folder} is damaged: {TOKENIZER} is not the one that its tokens were made with")
    return Corpus(folder=folder, manifest=manifest, **splits)


def _open_split(folder: Path, name: str, manifest: dict[str, Any]) -> Split:
    path, dtype, counts = folder / f"{name}.tokens", np.dtype(manifest["dtype"]), manifest["splits"][name]
    if path.stat().st_size != counts["tokens"] * dtype.itemsize:
        raise ValueError(f"{folder} is damaged: {path.name} should have {counts['tokens']} tokens of {dtype.name}")
    documents = np.load(folder / f"{name}.documents.npy", allow_pickle=False)
    if documents.dtype != DOCUMENT or len(documents) != counts["documents"]:
        raise ValueError(f"{folder} is damaged: {name}.documents.npy should have {counts['documents']} documents")
    return Split(np.memmap(path, dtype, mode="r"), documents)


def _identity(config: DataConfig, sources: list[Source]) -> dict[str, Any]:
    """What makes two prepared corpora the same: the settings, and what the sources contain, not where they lie."""
    settings = asdict(config) | {"holdout_percent": config.resolved_holdout_percent()}
    settings["tokenizer_megabytes"] = float(config.tokenizer_megabytes)
    settings["sources"] = [source.describe() for source in sources]
    return settings


def _is_occupied(folder: Path) -> bool:
    if folder.is_dir():
        return any(folder.iterdir())
    return folder.exists() or folder.is_symlink()


def _reuse(folder: Path, asked: dict[str, Any]) -> Corpus:
    corpus = open_corpus(folder)
    held = corpus.manifest["asked"]
    names = [name for name in asked if name != "sources" and asked[name] != held.get(name)]
    differences = [f"{name} {held.get(name)!r}, asked for {asked[name]!r}" for name in names]
    if _contents(asked) != _contents(held):
        differences.append("sources with other contents")
    if differences:
        raise ValueError(
            f"{folder} holds a corpus that was prepared otherwise: {'; '.join(differences)}. "
            "Name another folder, or remove this one"
        )
    return corpus


def _contents(asked: dict[str, Any]) -> list[tuple[str, str]]:
    return [(source["format"], source["sha256"]) for source in asked["sources"]]


@dataclass(frozen=True)
class _Survey:
    """What the first pass over the documents found."""

    corpus_sha256: str
    num_bytes: int
    num_documents: int
    blank_documents: int
    sample: list[bytes]


def _survey(sources: list[Source], config: DataConfig, progress: bool) -> _Survey:
    percent = config.resolved_holdout_percent()
    budget = config.tokenizer_megabytes * 1e6
    counts, blank, num_bytes, digest = dict.fromkeys(SPLITS, 0), 0, 0, hashlib.sha256()
    # A heap of the training documents of lowest rank, the highest on top: a random sample in one pass over any order.
    sample: list[tuple[int, int, bytes]] = []
    sample_bytes = 0
    with _bar("reading", None, progress) as bar:
        for source in sources:
            for document in source.documents():
                if not document.text or document.text.isspace():
                    blank += 1
                    continue
                split, rank = _split_and_rank(document, percent)
                text = _hash(digest, document)
                num_bytes += len(text)
                counts[split] += 1
                bar.update(len(text))
                if split == "train":
                    heapq.heappush(sample, (-rank, -counts["train"], text))
                    sample_bytes += len(text)
                    while sample_bytes - len(sample[0][2]) >= budget:
                        sample_bytes -= len(heapq.heappop(sample)[2])
    for split, count in counts.items():
        if count == 0:
            raise ValueError(
                f"sources: none of the {sum(counts.values())} documents falls into the {split} split with "
                f"holdout_percent {percent}; give more documents or another holdout_percent"
            )
    texts = [text for _, _, text in sorted(sample, reverse=True)]
    return _Survey(digest.hexdigest(), num_bytes, sum(counts.values()), blank, texts)


def _split_and_rank(document: Document, percent: int) -> tuple[str, int]:
    number = int(hashlib.md5(document.key.encode(), usedforsecurity=False).hexdigest(), 16)
    rank, remainder = divmod(number, 100)
    split = "validation" if remainder < percent else "test" if remainder < 2 * percent else "train"
    return split, rank >> 59  # 62 of its bits


def _hash(digest: Any, document: Document) -> bytes:
    """Add a document to the corpus's hash; its text as UTF-8."""
    text = document.text.encode()
    key = b"" if document.key is document.text else document.key.encode()
    digest.update(b"%d %d\n" % (len(key), len(text)))
    digest.update(key)
    digest.update(text)
    return text


def _write(folder: Path, sources: list[Source], config: DataConfig, survey: _Survey, progress: bool) -> dict[str, Any]:
    """The second pass: everything but the manifest, which is returned."""
    sample_bytes = sum(map(len, survey.sample))
    with _bar("training the tokenizer", sample_bytes, progress) as bar:
        tokenizer = train_tokenizer(_counted(survey.sample, bar), config.vocab_size)
    vocab_size = tokenizer.get_vocab_size()
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    percent = config.resolved_holdout_percent()
    dtype, digest = token_dtype(vocab_size), hashlib.sha256()
    writers = {name: SplitWriter(folder, name, dtype) for name in SPLITS}
    try:
        documents = (document for source in sources for document in source.documents() if document.text.strip())
        with _bar("encoding", survey.num_bytes, progress) as bar:
            for document, tokens in encode_documents(tokenizer, documents):
                split, rank = _split_and_rank(document, percent)
                num_bytes = len(_hash(digest, document))
                writers[split].add(tokens, rank=rank, words=len(document.text.split()), bytes=num_bytes)
                bar.update(num_bytes)
    finally:
        for writer in writers.values():
            writer.close()
    if digest.hexdigest() != survey.corpus_sha256:
        raise ValueError("sources: a file changed while it was read")
    return {
        "format": FORMAT,
        "corpus_sha256": survey.corpus_sha256,
        "splits": {name: writer.finish() for name, writer in writers.items()},
        "blank_documents": survey.blank_documents,  # left out
        "vocab_size": vocab_size,
        "eot_id": tokenizer.token_to_id(END_OF_TEXT),
        "dtype": dtype.str,
        "tokenizer": {
            "sha256": hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest(),
            "trained_on_bytes": sample_bytes,
        },
        "versions": {
            "memlayers": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tokenizers": version("tokenizers"),
        },
    }


def _counted(texts: list[bytes], bar: Any) -> Iterator[str]:
    for text in texts:
        yield text.decode()
        bar.update(len(text))


def _bar(what: str, total: int | None, progress: bool) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not progress, mininterval=0.5)
