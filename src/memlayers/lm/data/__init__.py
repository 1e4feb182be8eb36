"""Text for training: `prepare` turns sources into shards of tokens, `open_corpus` reads them as `Windows`.

Read first, for a corpus that is ready:

    corpus.py  windows.py      a corpus on disk, opened; its tokens as windows, in the order of a run

Then, for how one is made:

    config.py                  DataConfig: which text, and how it becomes tokens
    sources/                   where documents come from
    prepare.py  request.py     the steps, and the folder they work in; what is asked for, and whether a corpus is that
    survey.py  tokenize.py     the first pass: checks, counts, the tokenizer's sample; the tokenizer
    encode.py  spans.py        the second: documents to tokens, tokens to shards
"""

import importlib
from typing import TYPE_CHECKING, Any

from memlayers.lm.data.config import DataConfig
from memlayers.lm.data.corpus import DOCUMENT, END_OF_TEXT, MANIFEST, SPLITS, Corpus, Shard, Split, open_corpus
from memlayers.lm.data.prepare import prepare
from memlayers.lm.data.tokenize import SMALLEST_VOCABULARY

if TYPE_CHECKING:
    from memlayers.lm.data.windows import Windows, training_order

__all__ = [
    "DOCUMENT",
    "END_OF_TEXT",
    "MANIFEST",
    "SMALLEST_VOCABULARY",
    "SPLITS",
    "Corpus",
    "DataConfig",
    "Shard",
    "Split",
    "Windows",
    "open_corpus",
    "prepare",
    "training_order",
]


def __getattr__(name: str) -> Any:
    if name not in ("Windows", "training_order"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # On demand: these stand on torch, which takes seconds to import, and a command that is refused needs none.
    return getattr(importlib.import_module("memlayers.lm.data.windows"), name)
