"""Plain text, cut into documents."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from memlayers.lm.data.sources.base import Document, FileSource, Skip
from memlayers.lm.data.sources.streams import read_pieces, without_mark

# A plain text is cut into documents of at most this many characters. Small enough that a megabyte has some 250 of them,
# so that a hold-out by hash finds some; large enough that most of a document is predicted with a context.
TEXT_DOCUMENT_CHARACTERS = 4096


@dataclass(frozen=True)
class TextFile(FileSource):
    """A plain UTF-8 text, cut into documents of whole paragraphs, each at most `TEXT_DOCUMENT_CHARACTERS` long.

    A paragraph that is longer is cut at white space where it has some. Joined, the documents are the file again.
    They have no id, so the hash of their text decides about the split.
    """

    format: ClassVar[str] = "text"

    def documents(self, *, skip: Skip | None = None) -> Iterator[Document]:
        """A text has no records, so nothing of it is skipped: a file that is not text to its end raises."""
        for text in cut_text(self._decoded(), TEXT_DOCUMENT_CHARACTERS):
            yield Document(text, text)

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0  # of the bytes that were read, in the decompressed file
        for piece in read_pieces(self.file):
            text = without_mark(piece, self.name) if offset == 0 else piece
            offset += len(piece)
            zero = text.find(b"\0")
            if zero >= 0:
                at = offset - len(text) + zero
                self._decode(decoder, text[:zero], at)
                raise ValueError(f"{self.file}: not a text: a zero byte at byte {at}")
            yield self._decode(decoder, text, offset)
        yield self._decode(decoder, b"", offset, final=True)

    def _decode(self, decoder: Any, piece: bytes, end: int, final: bool = False) -> str:
        """Decode `piece`, which ends `end` bytes into the file."""
        try:
            return decoder.decode(piece, final)
        except UnicodeDecodeError as error:  # its object is the piece and what the decoder had kept of the one before
            at = end - len(error.object) + error.start
            raise ValueError(f"{self.file}: not UTF-8 at byte {at}") from None


def cut_text(pieces: Iterator[str], limit: int) -> Iterator[str]:
    """Cut a stream of text into documents of at most `limit` characters, joined the same text again.

    A cut is after the last blank line that fits, else after the last white space, else at the limit.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        while len(rest) - start > limit:
            end = start + _cut_at(rest[start : start + limit])
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _cut_at(text: str) -> int:
    for boundary in (r"\n[^\S\n]*\n", r"\s"):
        if match := re.match(f".*{boundary}", text, re.DOTALL):  # greedy, so the last one
            return match.end()
    return len(text)
