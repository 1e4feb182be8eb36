"""The tokenizer of a corpus: a byte-level BPE, trained, saved, loaded and applied."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memlayers.lm.data.corpus import END_OF_TEXT, TOKENIZER, TOKENIZER_FILES

if TYPE_CHECKING:  # what is tokenised already is read without it
    from tokenizers import Tokenizer

# Every byte is a token, and so is the mark between documents.
SMALLEST_VOCABULARY = 257
# Characters of a word, at the most, in the sample that a tokenizer is trained on, and in a text that is encoded.
LONGEST_IN_SAMPLE = 1 << 10
LONGEST_RUN = 1 << 16
PIECE_CHARACTERS = 1 << 20  # of a long text, encoded as one
PIECES_CHARACTERS = 4 << 20  # encoded in one call, from which no interruption comes
_BETWEEN_WORDS = re.compile(r"\w(?= \w)")


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
    tokenizer.train_from_iterator((piece for text in texts for piece in cut_runs(text, LONGEST_IN_SAMPLE)), trainer)
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


def tokenizer_file(folder: str) -> Path:
    """Return the `tokenizer.json` of a corpus, a run or a model. Raises `ValueError` if there is none."""
    for place in (Path(folder), Path(folder, TOKENIZER), Path(folder, "model")):
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
    raise ValueError(f"data.tokenizer must be the folder of a corpus, run or model with a tokenizer, got {folder!r}")


def copy_tokenizer(folder: str, into: Path) -> "Tokenizer":
    """Copy the tokenizer of `folder`, and return it. Raises `ValueError` if it cannot mark the ends of documents."""
    file = tokenizer_file(folder)
    for path in file.parent.iterdir():
        if re.fullmatch(TOKENIZER_FILES, path.name):
            shutil.copyfile(path, into / path.name)
    tokenizer = load_tokenizer(into)
    if document_mark(tokenizer, into) is None:
        raise ValueError(
            f"data.tokenizer must have the token {END_OF_TEXT}, or say in tokenizer_config.json which one begins or "
            f"ends a text, got {str(file)!r} without"
        )
    return tokenizer


def document_mark(tokenizer: "Tokenizer", folder: Path) -> int | None:
    """The token before each document: <|endoftext|>, or else the one that begins, or ends, a text; None: none of them.

    `folder` is where the tokenizer was loaded from.
    """
    try:
        said = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        said = None
    said = said if isinstance(said, dict) else {}
    for name in (END_OF_TEXT, said.get("bos_token"), said.get("eos_token")):
        text = name.get("content") if isinstance(name, dict) else name
        if isinstance(text, str) and (found := tokenizer.token_to_id(text)) is not None:
            return found
    return None


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load the tokenizer that `save_tokenizer` left in `folder`, for `encode_texts`."""
    from tokenizers import Tokenizer  # not needed to train on ready tokens

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # One that was used before it was saved has it in its file at how many tokens to cut a text, and how to fill it up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest of uint16 and uint32 that holds every token."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_texts(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text. `tokenizers` spreads the texts over the cores.

    A long text is encoded in pieces, between which an interruption is heard. They have the tokens of the whole, but
    where a run of `LONGEST_RUN` characters without white space, or of it, has to be cut.
    """
    tokenizer.encode_special_tokens = True  # a text that mentions <|endoftext|> does not end there
    pieces = [list(_pieces(text)) for text in texts]
    flat = [piece for parts in pieces for piece in parts]
    encoded: list[list[int]] = []
    while len(encoded) < len(flat):
        room, end = PIECES_CHARACTERS, len(encoded)
        while end < len(flat) and (room > 0 or end == len(encoded)):
            room -= len(flat[end])
            end += 1
        batch = tokenizer.encode_batch_fast(flat[len(encoded) : end], add_special_tokens=False)
        encoded += [encoding.ids for encoding in batch]
    following = iter(encoded)
    return [[token for _ in parts for token in next(following)] for parts in pieces]


def cut_runs(text: str, longest: int) -> list[str]:
    """Cut a text where characters without white space, or white space alone, run on for more than `longest`.

    A byte-level BPE sees such a run as a word, and its time grows with the square of a word's length: one record of DNA
    or base64 would keep it busy for hours. Text of words stays whole.
    """
    ends = [run.end() for run in re.finditer(rf"\S{{{longest}}}|\s{{{longest}}}", text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]) if start < end] or [text]


def _pieces(text: str) -> Iterator[str]:
    for part in cut_runs(text, LONGEST_RUN) if len(text) > LONGEST_RUN else [text]:
        start = 0
        while len(part) - start > PIECE_CHARACTERS:
            # No token goes over the place before a single space within a line: the space belongs to what follows.
            found = _BETWEEN_WORDS.search(part, start + PIECE_CHARACTERS // 2)
            if found is None:
                break
            yield part[start : found.end()]
            start = found.end()
        yield part[start:]
