"""Arrays on disk as memory maps that are opened when they are looked at, a few of them at a time.

A map holds a descriptor, of which a process has a thousand or so, and a large corpus has more shards than that.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

MAPPED_AT_ONCE = 32


class Maps:
    """The maps that were looked at last. What a caller still holds stays mapped however many come after it."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"_maps": OrderedDict()}  # a copy, or another process, opens its own

    def look(self, file: Path, dtype: np.dtype) -> np.ndarray:
        """The array in a file: one that numpy saved, or the bytes of all its items."""
        found = self._maps.pop(file, None)
        if found is None:
            is_saved = file.suffix == ".npy"
            found = np.load(file, "r", allow_pickle=False) if is_saved else np.memmap(file, dtype, "r")
            assert found.dtype == dtype
        self._maps[file] = found
        if len(self._maps) > MAPPED_AT_ONCE:
            self._maps.popitem(last=False)
        return found


@dataclass(frozen=True)
class OnDisk:
    """The first `count` items of an array in a file."""

    maps: Maps
    file: Path
    dtype: np.dtype
    count: int

    def __len__(self) -> int:
        return self.count

    def first(self, count: int) -> "OnDisk":
        return replace(self, count=count)

    def look(self) -> np.ndarray:
        """They, as a memory map; the map of the whole file itself if it has no more."""
        whole = self.maps.look(self.file, self.dtype)
        assert len(whole) >= self.count
        return whole if len(whole) == self.count else whole[: self.count]
