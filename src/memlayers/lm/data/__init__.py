"""Text for training: `prepare` turns sources into shards of tokens, `open_corpus` reads them as `Windows`.

config.py                               DataConfig: which text, and how it becomes tokens
sources/                                where documents come from
prepare.py  request.py  workspace.py    what is asked for, what is there already, the folder that is worked in
survey.py  tokenize.py                  the first pass: checks, counts, the tokenizer's sample; the tokenizer
encode.py  readahead.py  spans.py       the second: documents to shards
corpus.py  maps.py  windows.py          what is read in training
progress.py                             a bar for work that is counted in bytes
"""

from memlayers.lm.data.config import DataConfig
from memlayers.lm.data.corpus import MANIFEST, SPLITS, Corpus, Shard, Split, open_corpus
from memlayers.lm.data.prepare import prepare
from memlayers.lm.data.tokenize import DOCUMENT, END_OF_TEXT, SMALLEST_VOCABULARY
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
