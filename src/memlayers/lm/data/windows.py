"""A split as windows of tokens for training, and the order in which a run sees them."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from memlayers.lm.data.corpus import Split

DRAWN_AT_ONCE = 1 << 20


class Windows(Dataset[dict[str, torch.Tensor]]):
    """A split as windows of `length` tokens that do not overlap, across documents.

    What is left at the end of a shard is dropped. An item is `{"input_ids": int64 [length], "labels": the same}`, as
    `transformers.Trainer` takes it. `by_source` says which windows belong to which source (`Shard.source`).
    """

    by_source: dict[int, range]

    def __init__(self, split: Split, length: int) -> None:
        longest = max((shard.num_tokens for shard in split.shards), default=0)
        if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= longest:
            whole = "split" if len(split.shards) == 1 else "split's longest shard"
            raise ValueError(f"length must be an integer from 2 to the {whole}'s {longest} tokens, got {length!r}")
        self.split = split
        self.length = length
        self.by_source = {}
        self._starts: list[int] = []  # the number of each shard's first window
        self._count = 0
        for shard in split.shards:
            self._starts.append(self._count)
            first = self.by_source.get(shard.source, range(self._count, self._count))
            assert first.stop == self._count, "the shards of a source follow each other"
            self._count += shard.num_tokens // length
            self.by_source[shard.source] = range(first.start, self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = range(self._count)[index]
        place = bisect_right(self._starts, number) - 1
        start = (number - self._starts[place]) * self.length
        window = self.split.shards[place].tokens[start : start + self.length]
        tokens = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


def training_order(windows: Windows, count: int, seed: int, weights: Sequence[float] = ()) -> np.ndarray:
    """Return which windows a run sees, in order: integers [count], uint32 where they fit.

    Without `weights` one shuffled pass over all windows after the other. With one weight for each source, each place
    is drawn among the sources in proportion to them, and takes the next window of that source's own shuffled passes.
    A shorter order is always the beginning of a longer one.

    Raises `ValueError` for weights that do not fit the sources, or if a source that has a weight has no window.
    """
    dtype = np.uint32 if len(windows) <= 1 << 32 else np.int64
    order = np.empty(count, dtype)
    if not len(weights):
        _fill_with_passes(order, range(len(windows)), seed)
        return order
    if max(windows.by_source) >= len(weights) or min(windows.by_source) < 0:
        raise ValueError(
            f"data.weights must have one number for each of the {max(windows.by_source) + 1} sources of the corpus, "
            f"got {list(weights)}"
        )
    for source, weight in enumerate(weights):
        if weight > 0 and not windows.by_source.get(source):
            raise ValueError(
                f"data.weights gives source {source} the weight {weight}, but its training text has no window of "
                f"{windows.length} tokens"
            )
    drawn = _draw(np.asarray(weights, np.float64), count, seed)
    for source, numbers in windows.by_source.items():
        places = drawn == source
        own = np.empty(int(places.sum()), dtype)
        _fill_with_passes(own, numbers, seed, source + 1)
        order[places] = own
    return order


def _fill_with_passes(order: np.ndarray, numbers: range, *entropy: int) -> None:
    """Fill `order` with one shuffled pass over `numbers` after the other, the last one cut."""
    for index, start in enumerate(range(0, len(order), max(1, len(numbers)))):
        shuffled = np.arange(numbers.start, numbers.stop, dtype=order.dtype)
        np.random.default_rng([*entropy, index]).shuffle(shuffled)
        order[start : start + len(numbers)] = shuffled[: len(order) - start]


def _draw(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the source of each place: integers [count]."""
    weights = np.ldexp(weights, -np.frexp(weights.max())[1])  # by a power of two, so exact; else the sum may overflow
    bounds = np.cumsum(weights) / weights.sum()
    generator = np.random.default_rng([seed, 0])
    drawn = np.empty(count, np.uint8 if len(weights) <= 1 << 8 else np.uint32)
    for start in range(0, count, DRAWN_AT_ONCE):
        part = drawn[start : start + DRAWN_AT_ONCE]
        part[:] = np.searchsorted(bounds[:-1], generator.random(len(part)), side="right")
    return drawn
