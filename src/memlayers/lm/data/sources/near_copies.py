"""Which texts are copies of one another, or nearly."""

from collections.abc import Sequence

import numpy as np

SHARED_PERCENT = 40  # half of the lines, with a margin for whoever counts them in another way


def different_lines(text: str) -> dict[str, None]:
    """Return the lines of a text in their order, each once, without the spaces around them and without blank ones."""
    lines = dict.fromkeys(line.strip(" \t") for line in text.split("\n"))
    lines.pop("", None)
    return lines


def first_copies(texts: Sequence[str]) -> list[int]:
    """Return for each text the place of the first of its near-copies: its own where it is the first, or has none.

    Two texts are near-copies where `SHARED_PERCENT` or more of the different lines of the one that has fewer stand in
    the other, too; near-copies of near-copies belong together. Takes the time of all pairs of texts, once for each line
    that they share: a second or two for 2,000 files, too long for 100,000.
    """
    numbers: dict[str, int] = {}
    lines = [[numbers.setdefault(line, len(numbers)) for line in different_lines(text)] for text in texts]
    sizes = np.array([len(own) for own in lines], np.int64)
    # Which texts have a line: a run of `texts_of`, from one of `bounds` to the next.
    flat = np.fromiter((number for own in lines for number in own), np.int64, sizes.sum())
    texts_of = np.repeat(np.arange(len(texts)), sizes)[np.argsort(flat, kind="stable")]
    bounds = np.cumsum([0, *np.bincount(flat, minlength=len(numbers))])
    first = np.arange(len(texts))
    for place in np.flatnonzero(sizes):
        having = [texts_of[bounds[number] : bounds[number + 1]] for number in lines[place]]
        shared = np.bincount(np.concatenate(having), minlength=len(texts))
        copies = np.flatnonzero((shared > 0) & (100 * shared >= SHARED_PERCENT * np.minimum(sizes, sizes[place])))
        groups = np.unique(first[copies])  # its own among them
        first[np.isin(first, groups)] = groups[0]
    return first.tolist()
