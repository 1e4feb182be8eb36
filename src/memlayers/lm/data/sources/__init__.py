"""Where documents come from: files, folders and globs of them, Hugging Face datasets, the sources of PyTorch.

    base.py          what a source is, and what several kinds share, such as a record -> a document
    opening.py       what a user names -> sources, in a fixed order
    text.py  jsonlines.py  parquet.py  huggingface.py  pytorch.py      a kind of source each
    streams.py       the bytes of a file, plain, .gz, .xz or .zst
    near_copies.py   which texts are copies of one another, or nearly

Documents are read as a stream, in an order that is always the same, and what cannot be read is a `ValueError` that
names the file and the place.
"""

from memlayers.lm.data.sources.base import Document, Source
from memlayers.lm.data.sources.huggingface import HuggingFace
from memlayers.lm.data.sources.jsonlines import JsonLines
from memlayers.lm.data.sources.opening import open_sources
from memlayers.lm.data.sources.parquet import Parquet
from memlayers.lm.data.sources.pytorch import PyTorchSources
from memlayers.lm.data.sources.text import TextFile

__all__ = ["Document", "HuggingFace", "JsonLines", "Parquet", "PyTorchSources", "Source", "TextFile", "open_sources"]
