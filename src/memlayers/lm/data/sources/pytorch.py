"""A corpus that every installation has: the Python sources of PyTorch."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from typing import Any

from memlayers.lm.data.sources.base import Document, Read, Skip, nobody
from memlayers.lm.data.sources.near_copies import different_lines, first_copies

MOST_BYTES = 200_000  # of a file: longer ones are tables for the most part, and a few would be much of a split
FEWEST_LINES = 20  # of a file, different ones: shorter ones are package markers and lists of imports
# The only file that differs between the wheels of a version, and what programs have written.
_BUILT = re.compile(r"torch/version\.py|(.*/)?generated/.*")
_UNLISTED = "is not installed as a package that lists its files (one that is built in place is not); name other sources"
_GENERATED = re.compile(r"^# *(This|These)\b.*generated", re.MULTILINE)


def _installed() -> Distribution:
    try:
        return distribution("torch")
    except PackageNotFoundError:
        raise ValueError(f"sources: empty, but PyTorch {_UNLISTED}") from None


@dataclass(frozen=True)
class PyTorchSources:
    """The Python sources of the installed PyTorch, the same text for every platform, device and Python of a version.

    One document a file, in the order of the paths, with `\\n` at the ends of lines. Read are the `.py` files that the
    installed package lists as its own; left out are generated ones, those of over `MOST_BYTES`, and those of fewer than
    `FEWEST_LINES`.

    A document's key is its path, that of a near-copy the path of the first of its copies (see `first_copies`), so that
    all of them land in one split.
    """

    package: Distribution = field(default_factory=_installed)

    @property
    def name(self) -> str:
        return f"Python sources of PyTorch {self.package.version.partition('+')[0]}"

    def stamp(self) -> None:
        """None: it is read in a moment."""

    def describe(self, *, read: Read = nobody) -> dict[str, Any]:
        """`files` is the number of documents; `bytes` and `sha256` are of all of them, with their keys."""
        digest, size, files = hashlib.sha256(), 0, 0
        for key, text in self.documents():
            content = text.encode()
            digest.update(f"{key}\0{len(content)}\0".encode() + content)
            size, files = size + len(content), files + 1
            read(len(content))
        return {"format": "pytorch", "name": self.name, "bytes": size, "sha256": digest.hexdigest(), "files": files}

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        """None is skipped: a file that is not UTF-8 raises."""
        for file, key in self._keys.items():
            yield Document(key, _read(file))

    @cached_property
    def _keys(self) -> dict[PackagePath, str]:
        """The keys of the files that are taken."""
        listed = [file for file in self.package.files or () if file.suffix == ".py" and ".." not in file.parts]
        if not listed:
            raise ValueError(f"sources: empty, but PyTorch {_UNLISTED}")
        files = sorted((file for file in listed if not _BUILT.fullmatch(file.as_posix())), key=PackagePath.as_posix)
        texts = {file: text for file in files if _is_taken(text := _read(file))}
        taken = list(texts)
        firsts = first_copies(list(texts.values()))
        return {file: taken[first].as_posix() for file, first in zip(taken, firsts, strict=True)}


def _read(file: PackagePath) -> str:
    try:
        return file.read_binary().replace(b"\r\n", b"\n").decode()  # wheels for Windows have the other ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.locate()}: not UTF-8 at byte {error.start}") from None


def _is_taken(text: str) -> bool:
    return (
        len(text.encode()) <= MOST_BYTES
        and not _GENERATED.search(text[:500])
        and len(different_lines(text)) >= FEWEST_LINES
    )
