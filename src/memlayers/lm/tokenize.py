"""From documents to token files: a byte-level BPE, and the writing of encoded documents in bounded memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memlayers.lm.corpora import Document

if TYPE_CHECKING:  # what is tokenised already is read without it
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# Every byte is a token, and so is the mark between documents.
SMALLEST_VOCABULARY = 257
# Encoded at once: enough to keep every core busy, little enough to be forgotten.
BATCH_CHARACTERS = 4 << 20
COPY_BYTES = 4 << 20
# One entry a document: where its tokens start (its end-of-text token is the first), and its length in words and bytes.
DOCUMENT = np.dtype([("offset", "<i8"), ("words", "<i8"), ("bytes", "<i8")])


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE with at most `vocab_size` tokens (fewer if the texts have no more pairs that occur twice).

    Every text comes back from its tokens unchanged. `<|endoftext|>` is token 0.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_documents(tokenizer: "Tokenizer", documents: Iterable[Document]) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its tokens, `<|endoftext|>` before them: every token of a text is predicted by something.

    Works in batches of `BATCH_CHARACTERS`; `tokenizers` spreads a batch over the cores.
    """
    tokenizer.encode_special_tokens = True  # a text that mentions <|endoftext|> does not end there
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None
    for batch in _batches(documents):
        encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            yield document, [end_of_text, *encoding.ids]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


class SplitWriter:
    """Writes the documents of one split: `name.tokens` (raw integers) and `name.documents.npy` (`DOCUMENT` entries).

    Documents are added as they come and end up ordered by their `rank`, a hash, so that a prefix of the split is a
    random sample of it rather than its oldest or alphabetically first documents. Only four numbers of each document are
    kept in memory; the tokens wait in a file beside.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self._waiting = folder / f"{name}.unordered"
        self._stream = self._waiting.open("wb")
        self._entries = array("q")  # rank, tokens, words, bytes of each document in turn

    def add(self, tokens: Sequence[int], *, rank: int, words: int, bytes: int) -> None:
        """Append one document; `rank` is below 2**63."""
        self._stream.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self._entries.extend((rank, len(tokens), words, bytes))

    def close(self) -> None:
        self._stream.close()

    def finish(self) -> dict[str, int]:
        """Order the files; returns how many `documents`, `tokens`, `words` and `bytes` they have."""
        self.close()
        rank_D, length_D, words_D, bytes_D = np.array(self._entries, dtype=np.int64).reshape(-1, 4).T
        order = np.argsort(rank_D, kind="stable")
        documents = np.empty(len(order), DOCUMENT)
        documents["offset"] = np.cumsum(length_D[order]) - length_D[order]
        documents["words"], documents["bytes"] = words_D[order], bytes_D[order]

        waiting = np.memmap(self._waiting, self.dtype, mode="r")
        start_D = np.cumsum(length_D) - length_D
        with (self.folder / f"{self.name}.tokens").open("wb", buffering=COPY_BYTES) as stream:
            for start, length in zip(start_D[order].tolist(), length_D[order].tolist(), strict=True):
                stream.write(waiting[start : start + length].data)
        with (self.folder / f"{self.name}.documents.npy").open("wb") as stream:
            np.save(stream, documents)
        self._waiting.unlink()
        return {
            "documents": len(documents),
            "tokens": int(length_D.sum()),
            "words": int(words_D.sum()),
            "bytes": int(bytes_D.sum()),
        }
