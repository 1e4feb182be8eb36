"""A prepared corpus on disk, opened: tokens and documents as memory maps, everything verified.

    manifest.json                 what was asked for, hashes, counts, versions; sealed, and written last
    tokenizer/                    as `transformers` saves and loads it
    train-00000.tokens            uint16 or uint32, little-endian; each document is <|endoftext|> and its tokens
    train-00000.documents.npy     offset (in tokens), words and bytes of each document
    train-00001.tokens, ...       a shard each; within a shard the documents are ordered by a hash
    validation.*, test.*          the held-out documents, one shard each

Read with numpy alone. A word is whitespace-separated, a byte one of UTF-8.
"""

import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from memlayers.checks import require_int
from memlayers.console import bar
from memlayers.files import file_aside, path_below, read_sealed, verify_files

if TYPE_CHECKING:  # token files that are ready are read without it
    from transformers import PreTrainedTokenizerFast

FORMAT = 2
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
# What `transformers` writes of one: never code, nor what describes a model.
TOKENIZER_FILES = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.jinja"
)
END_OF_TEXT = "<|endoftext|>"
# One entry a document: where its tokens start (its end-of-text token is the first), and its length in words and bytes.
DOCUMENT = np.dtype([("offset", "<i8"), ("words", "<i8"), ("bytes", "<i8")])
SEVERAL_SOURCES = -1
# A map holds a descriptor, of which a process has a thousand or so; a large corpus has more shards than that.
MAPPED_AT_ONCE = 32
# Below this many bytes a corpus is verified before a progress bar would be seen.
SHOWN_BYTES = 1 << 30


class Shard:
    """Documents that lie one after the other in one file.

    `tokens` is an array [num_tokens] of uint16 or uint32; `documents` [num_documents] has the fields `offset` (where in
    `tokens` the document's <|endoftext|> lies), `words` and `bytes`. `source` is the place in `DataConfig.sources` that
    all of them come from, -1 for several.
    """

    def __init__(self, tokens: np.ndarray, documents: np.ndarray, source: int) -> None:
        self._tokens, self._documents, self.source = tokens, documents, source
        self.num_tokens, self.num_documents = len(tokens), len(documents)

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens

    @property
    def documents(self) -> np.ndarray:
        return self._documents

    def first(self, count: int) -> "Shard":
        """Return the first `count` documents."""
        return Shard(self.tokens[: self._end(count)], self.documents[:count], self.source)

    def _end(self, count: int) -> int:
        """Tokens of the first `count` documents."""
        return self.num_tokens if count == self.num_documents else int(self.documents["offset"][count])


class _StoredShard(Shard):
    """The beginning of a shard on disk; its memory maps are opened when they are looked at."""

    def __init__(self, maps: "_Maps", file: Path, dtype: np.dtype, source: int, tokens: int, documents: int) -> None:
        self._maps, self._file, self._dtype, self.source = maps, file, dtype, source
        self.num_tokens, self.num_documents = tokens, documents

    @property
    def tokens(self) -> np.ndarray:
        return self._maps.look(self._file.with_name(f"{self._file.name}.tokens"), self._dtype)[: self.num_tokens]

    @property
    def documents(self) -> np.ndarray:
        file = self._file.with_name(f"{self._file.name}.documents.npy")
        return self._maps.look(file, DOCUMENT)[: self.num_documents]

    def first(self, count: int) -> Shard:
        return _StoredShard(self._maps, self._file, self._dtype, self.source, self._end(count), count)


class _Maps:
    """The memory maps that were looked at last. What a caller still holds stays mapped however many come after it."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"_maps": OrderedDict()}  # a copy, or another process, opens its own

    def look(self, file: Path, dtype: np.dtype) -> np.ndarray:
        """Return the array in a file: one that numpy saved, or the bytes of all its items."""
        found = self._maps.pop(file, None)
        if found is None:
            is_saved = file.suffix == ".npy"
            found = np.load(file, "r", allow_pickle=False) if is_saved else np.memmap(file, dtype, "r")
            if found.dtype != dtype or found.ndim != 1:
                raise ValueError(f"{file} is damaged: it holds {found.dtype}, expected {dtype}")
        self._maps[file] = found
        if len(self._maps) > MAPPED_AT_ONCE:
            self._maps.popitem(last=False)
        return found


class Split:
    """The documents of one split, shard after shard. `Split(tokens, documents)` is one of a single shard in memory."""

    shards: tuple[Shard, ...]

    def __init__(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        self.shards = (Shard(tokens, documents, 0),)

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "Split":
        """A split of these shards, in this order."""
        split = cls.__new__(cls)
        split.shards = tuple(shards)
        return split

    @property
    def tokens(self) -> np.ndarray:
        """All tokens [num_tokens]: a memory map if there is one shard, else a copy."""
        if len(self.shards) == 1:
            return self.shards[0].tokens
        return self._joined("tokens", self.num_tokens)

    @property
    def documents(self) -> np.ndarray:
        """All documents [num_documents], with offsets into `tokens`."""
        if len(self.shards) == 1:
            return self.shards[0].documents
        documents = self._joined("documents", self.num_documents)
        before = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])[:-1]
        documents["offset"] += np.repeat(before, [shard.num_documents for shard in self.shards])
        return documents

    def _joined(self, name: str, count: int) -> np.ndarray:
        """A copy of an array of all shards, of which one is looked at at a time."""
        joined = np.empty(count, getattr(self.shards[0], name).dtype)
        done = 0
        for shard in self.shards:
            part = getattr(shard, name)
            joined[done : done + len(part)] = part
            done += len(part)
        return joined

    @cached_property
    def num_tokens(self) -> int:
        """The <|endoftext|> of each document included."""
        return sum(shard.num_tokens for shard in self.shards)

    @cached_property
    def num_words(self) -> int:
        return sum(int(shard.documents["words"].sum()) for shard in self.shards)

    @cached_property
    def num_bytes(self) -> int:
        return sum(int(shard.documents["bytes"].sum()) for shard in self.shards)

    @cached_property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def words_per_token(self) -> float:
        """What turns a rate of tokens into one of words."""
        return self.num_words / self.num_tokens

    def prefix(self, max_tokens: int) -> "Split":
        """Return the longest run of first documents with at most `max_tokens` tokens; at least one document.

        Held-out documents are ordered by a hash, so this is a random sample of them, the same each time.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        shards: list[Shard] = []
        room = max_tokens
        for shard in self.shards:
            # A document is within the prefix if it ends in it: where the next one begins.
            count = int(np.searchsorted(shard.documents["offset"][1:], room, side="right"))
            count += shard.num_tokens <= room
            if count == 0 and shards:
                break
            shards.append(shard.first(max(1, count)))
            if count < shard.num_documents:
                break
            room -= shard.num_tokens
        return Split.of(shards)


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
        """Tokens that the tokenizer has, and gaps between their numbers."""
        return self.manifest["vocab_size"]

    @property
    def eot_id(self) -> int:
        """The token that stands before each document: <|endoftext|>, or that of another model's tokenizer."""
        return self.manifest["eot_id"]

    @property
    def tokenizer_sha256(self) -> str:
        """The hash of `tokenizer.json`: what the tokens mean."""
        return self.manifest["tokenizer"]["files"]["tokenizer.json"]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the tokenizer for `transformers`; the token before each document begins and ends a text."""
        from tokenizers import Tokenizer  # not needed to train on ready tokens
        from transformers import PreTrainedTokenizerFast  # takes seconds to import

        tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER / "tokenizer.json"))
        mark = tokenizer.id_to_token(self.eot_id)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=mark, eos_token=mark, clean_up_tokenization_spaces=False
        )

    def save_tokenizer(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`, as `save_pretrained` would leave them; needs no library."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.manifest["tokenizer"]["files"]:
            with file_aside(folder / name) as aside:  # a link of that name is replaced, not followed
                shutil.copyfile(path_below(self.folder, f"{TOKENIZER}/{name}"), aside)


def open_corpus(folder: str | Path, *, progress: bool = False) -> Corpus:
    """Open what `prepare` left and verify every file of it. Needs neither `tokenizers` nor `transformers`.

    Raises `ValueError` if the folder is no prepared corpus or is of another format, and names the file if one is
    missing, truncated, exchanged, or differs in a single bit; `OSError` if one cannot be read. `progress` shows a bar
    for a corpus of over a gigabyte.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    try:
        described = described_files(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST} does not describe a corpus: {type(error).__name__}: {error}") from None
    sizes = {name: description.get("bytes", 0) for name, description in described.items()}
    total = sum(sizes.values())
    with progress_bar("verifying", total, progress and total > SHOWN_BYTES) as bar:
        verify_files(folder, described, checked=lambda name: bar.update(sizes[name]))
    shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    maps, dtype = _Maps(), np.dtype(manifest["dtype"])
    for split, shard in _shards(manifest):
        shards[split].append(
            _StoredShard(maps, folder / shard["name"], dtype, shard["source"], shard["tokens"], shard["documents"])
        )
    return Corpus(folder=folder, manifest=manifest, **{name: Split.of(shards[name]) for name in SPLITS})


def described_files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Describe each file beside the manifest for `memlayers.files.verify_files`.

    Raises an error of any kind for a manifest that `prepare` did not write: its seal is no secret.
    """
    if missing := {"asked", "corpus_sha256", "versions"} - set(manifest):
        raise ValueError(f"it has no {min(missing)!r}")
    if "tokenizer.json" not in manifest["tokenizer"]["files"]:
        raise ValueError("it names no tokenizer.json")
    for name in manifest["tokenizer"]["files"]:  # which goes into the folder of a model
        if not re.fullmatch(TOKENIZER_FILES, name):
            raise ValueError(f"{name!r} is no file of a tokenizer")
    for split, shard in _shards(manifest):
        if not re.fullmatch(rf"{split}(-\d+)?", shard["name"]):
            raise ValueError(f"{shard['name']!r} is no shard of the {split} split")
        if {*shard["sha256"]} != {"tokens", "documents.npy"} or min(shard[n] for n in ("tokens", "documents")) < 1:
            raise ValueError(f"{shard['name']} has no tokens or no documents")
        require_int("source", shard["source"], least=SEVERAL_SOURCES)
    if manifest["dtype"] not in ("<u2", "<u4") or not 0 <= manifest["eot_id"] < manifest["vocab_size"]:
        raise ValueError("its tokens are of another kind")
    described: dict[str, dict[str, Any]] = {
        f"{TOKENIZER}/{name}": {"sha256": digest} for name, digest in manifest["tokenizer"]["files"].items()
    }
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for _, shard in _shards(manifest):
        for suffix, digest in shard["sha256"].items():
            described[f"{shard['name']}.{suffix}"] = {"sha256": digest}
        described[f"{shard['name']}.tokens"]["bytes"] = shard["tokens"] * itemsize
    return described


def _shards(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            yield split, shard


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        raw = file.read_bytes()
    except OSError:
        raise ValueError(f"{folder} holds no prepared corpus (no readable {MANIFEST})") from None
    try:
        manifest = read_sealed(file)
    except ValueError:
        _refuse_other_json(folder, raw)
        raise
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} holds a corpus of format {manifest.get('format')!r}, this version reads format {FORMAT}"
        )
    return manifest


def _refuse_other_json(folder: Path, raw: bytes) -> None:
    """Raise for an unsealed manifest of the first format, or of no corpus; any other is a damaged one."""
    try:
        content = json.loads(raw)
    except ValueError:
        return
    if isinstance(content, dict) and content.get("format") == 1:
        raise ValueError(
            f"{folder} holds a corpus of format 1, this version reads format {FORMAT}: prepare it again, in another "
            "folder or after removing this one"
        ) from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{folder} holds no prepared corpus (its {MANIFEST} is not one of a corpus)") from None


def progress_bar(what: str, total: int | None, shown: bool, *, initial: int = 0) -> Any:
    """Return a bar in bytes on stderr, or one that does nothing unless `shown`; `total` None: unknown."""
    if not shown:
        return nullcontext(SimpleNamespace(update=lambda count: None))
    return bar(desc=what, total=total, initial=initial, unit="B")
