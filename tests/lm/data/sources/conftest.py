import gzip
import lzma
from pathlib import Path

import pytest

from memlayers.lm.data.sources import open_sources

PACKERS = {"gz": gzip.compress, "xz": lzma.compress}


def pack(content: bytes, suffix: str) -> bytes:
    if suffix == "zst":
        return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)
    return PACKERS.get(suffix, lambda content: content)(content)


@pytest.fixture
def packed():
    """`packed(content, "gz")`: the bytes compressed as the suffix says, or as they are."""
    return pack


@pytest.fixture
def written(tmp_path):
    """`written(name, content)`: a file in `tmp_path` with that content, compressed as its suffix says."""

    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(content, path.suffix[1:]))
        return path

    return write


@pytest.fixture
def opened():
    """`opened(entry, ...)`: the sources of all entries, in one list."""

    def open_all(*entries):
        groups = open_sources([str(entry) for entry in entries], text_field="text", id_field="id")
        return [source for group in groups for source in group]

    return open_all


@pytest.fixture
def read(opened):
    """`read(entry, ..., skip=None)`: the documents of all entries."""

    def read_all(*entries, skip=None):
        return [document for source in opened(*entries) for document in source.documents(skip=skip)]

    return read_all
