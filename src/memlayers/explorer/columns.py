"""Columns: a table as NumPy arrays, on its way to pandas or to a Parquet file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memlayers.extras import require_extra
from memlayers.files import file_aside

if TYPE_CHECKING:
    import pandas


class Columns(dict[str, np.ndarray]):
    """NumPy arrays of one length by their names."""

    def __init__(self, **columns: np.ndarray):
        super().__init__(columns)

    @classmethod
    def stacked(cls, parts: Mapping[str, "Columns"]) -> "Columns":
        """The parts, one below the other, with their names in the column memory."""
        lengths = [len(next(iter(part.values()))) for part in parts.values()]
        names = next(iter(parts.values()))
        memory = np.repeat(np.array([*parts], dtype=object), lengths)
        return cls(memory=memory, **{name: np.concatenate([part[name] for part in parts.values()]) for name in names})

    def top(self, of: Sequence[str], what: str, most: int) -> "Columns":
        """For each value of the columns `of`, the `most` values of column `what` that hold most of the column weight.

        Columns: `of`, `what`, reads (how many rows there were), weight (their sum).
        """
        keys = [*of, what]
        order = np.lexsort([self[name] for name in reversed(keys)])
        begins, sums = _starts([self[name][order] for name in keys]), np.zeros(0)
        if len(begins):
            sums = np.add.reduceat(self["weight"][order].astype(np.float64), begins)
        grouped = [self[name][order][begins] for name in keys]
        reads = np.diff(np.append(begins, len(order)))
        by_weight = np.lexsort([grouped[-1], -sums, *reversed(grouped[:-1])])
        firsts = _starts([one[by_weight] for one in grouped[:-1]])
        rank = np.arange(len(by_weight)) - np.repeat(firsts, np.diff(np.append(firsts, len(by_weight))))
        kept = by_weight[rank < most]
        found = dict(zip(keys, (one[kept] for one in grouped), strict=True))
        return Columns(**found, reads=reads[kept], weight=sums[kept])

    def to_pandas(self) -> "pandas.DataFrame":
        """A DataFrame; memories are categories. Raises `ModuleNotFoundError` without pandas."""
        require_extra("data", "Columns.to_pandas", "pandas")
        import pandas  # optional

        frame = pandas.DataFrame(dict(self))
        return frame.astype({"memory": "category"}) if "memory" in frame else frame

    def to_parquet(self, file: str | os.PathLike[str]) -> None:
        """Writes a Parquet file, or leaves what was there; its folder is made if it is not there.

        Raises `ModuleNotFoundError` without pyarrow.
        """
        require_extra("data", "Columns.to_parquet", "pyarrow")
        import pyarrow  # optional
        import pyarrow.parquet  # optional

        table: Any = pyarrow.table({name: pyarrow.array(column) for name, column in self.items()})
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with file_aside(Path(file)) as aside:
            pyarrow.parquet.write_table(table, aside)


def _starts(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Where a row differs from the one before it."""
    size = len(columns[0])
    if not size:
        return np.zeros(0, np.int64)
    differs = np.zeros(size, bool)
    differs[0] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return differs.nonzero()[0]
