"""Where documents come from: files, folders and globs of them, Hugging Face datasets, Python's own standard library.

    base.py          what a source is, and what several kinds share, such as a record -> a document
    opening.py       what a user names -> sources, in a fixed order
    text.py  jsonlines.py  parquet.py  huggingface.py  stdlib.py      a kind of source each
    streams.py       the bytes of a file, plain, .gz, .xz or .zst

Documents are read as a stream, in an order that is always the same, and what cannot be read is a `ValueError` that
names the file and the place.
"""

from memlayers.lm.data.sources.base import Document, Source
from memlayers.lm.data.sources.huggingface import HuggingFace
from memlayers.lm.data.sources.jsonlines import JsonLines
from memlayers.lm.data.sources.opening import open_sources
from memlayers.lm.data.sources.parquet import Parquet
from memlayers.lm.data.sources.stdlib import StandardLibrary
from memlayers.lm.data.sources.text import TextFile

__all__ = ["Document", "HuggingFace", "JsonLines", "Parquet", "Source", "StandardLibrary", "TextFile", "open_sources"]
