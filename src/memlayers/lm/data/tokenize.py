"""The tokenizer of a corpus: a byte-level BPE, trained, saved, loaded and applied."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memlayers.lm.data.corpus import END_OF_TEXT

if TYPE_CHECKING:  # what is tokenised already is read without it
    from tokenizers import Tokenizer

# Every byte is a token, and so is the mark between documents.
SMALLEST_VOCABULARY = 257


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE with at most `vocab_size` tokens (fewer if the texts have no more pairs that occur twice).

    Every text comes back from its tokens unchanged. `<|endoftext|>` is token 0.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # not needed to train on ready tokens

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write the files that `transformers` loads a tokenizer from; <|endoftext|> begins and ends a text."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    try:
        saved.save_pretrained(folder)
    except Exception as error:  # `tokenizers` raises no other kind, and tells the operating system's only in words
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load the tokenizer that `save_tokenizer` left in `folder`, for `encode_texts`."""
    from tokenizers import Tokenizer  # not needed to train on ready tokens

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest of uint16 and uint32 that holds every token."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_texts(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[Any]:
    """Return the encoding of each text, whose `ids` are its tokens. `tokenizers` spreads the texts over the cores."""
    tokenizer.encode_special_tokens = True  # a text that mentions <|endoftext|> does not end there
    return tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
