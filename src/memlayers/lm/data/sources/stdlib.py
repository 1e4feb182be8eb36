"""A corpus that every machine has: the sources of Python's standard library."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlayers.lm.data.sources.base import Document, Read, Skip, nobody, read_records


@dataclass(frozen=True)
class StandardLibrary:
    """The sources of the running Python's standard library.

    One document a file, in the order of the relative paths, which are their ids. Left out are tests, installed
    packages, and files that are generated for the machine (build configuration, site customisation).
    """

    root: Path | None = None  # None: where `sysconfig` says that it lies

    @property
    def name(self) -> str:
        return f"standard library of Python {platform.python_version()}"

    def stamp(self) -> None:
        """None: it is read in a moment."""

    def describe(self, *, read: Read = nobody) -> dict[str, Any]:
        """`files` is their number; `bytes` and `sha256` are of all of them."""
        digest, size, files = hashlib.sha256(), 0, 0
        for name, path in self._files():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            size, files = size + len(content), files + 1
            read(len(content))
        return {"format": "stdlib", "name": self.name, "bytes": size, "sha256": digest.hexdigest(), "files": files}

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        return read_records(self._files(), self._document, skip)

    def _document(self, number: int, found: tuple[str, Path]) -> Document:
        name, path = found
        try:
            return Document(name, path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None

    def _files(self) -> list[tuple[str, Path]]:
        root = self.root or Path(sysconfig.get_path("stdlib"))
        found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
        files = sorted((name.as_posix(), path) for name, path in found if _is_library(name))
        if not files:
            raise ValueError(f"sources: empty, but Python's standard library has no source files in {root}")
        return files


def _is_library(name: Path) -> bool:
    folders = name.parts[:-1]
    if {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}.intersection(folders):
        return False
    generated = name.name.startswith("_sysconfigdata") or name.name in ("sitecustomize.py", "usercustomize.py")
    return not generated and not any(folder.startswith("config-") for folder in folders)
