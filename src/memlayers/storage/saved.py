"""SavedTable: a value table that is read straight from the file that it was saved to.

Letters: T tokens, S slots, V value width, M rows a token reads, R bytes of codes of a row.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memlayers.ops.low_bits import code_bytes, read_low_bits
from memlayers.ops.read import read
from memlayers.storage.mapped import distinct_slots
from memlayers.storage.rows import Ahead, MappedRows, require_mapping
from memlayers.torch_private import is_exporting
from memlayers.values import Companion, ValueTable, computed_eagerly

BUDGET_BYTES = 2**28  # of pages that count as memory of the process
_REMEDY = 'load it into memory (values="memory")'


class Place(NamedTuple):
    """Where a tensor lies: in which file, and from which byte on."""

    file: Path
    start: int

    def absolute(self) -> "Place":
        """The same, by a path that does not depend on the working folder."""
        return Place(self.file.absolute(), self.start)


@computed_eagerly
class SavedTable(ValueTable):
    """A value table in a file of safetensors, mapped read-only: no copy of it is made, and nobody trains it.

    The system is asked for the rows of a call all at once, and the kernels then read the pages of the file. Processes
    that map one file share the system's cache of it. What counts as memory of this process is given back over a budget.
    `load_memory(..., values="mapped")` makes it.

    Args:
        slots: S.
        dim: V.
        rows: where the rows lie: floats [S, V], or codes [S, R].
        dtype: of the floats; of codes, uint8.
        scales: where the scales of codes lie. They are read into memory.
        bits: of a number of codes; None: floats.

    Raises:
        ValueError: a system without tables in files.
        OSError: a file that cannot be read, or is too short.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        rows: Place,
        dtype: torch.dtype,
        *,
        scales: Place | None = None,
        bits: int | None = None,
    ):
        require_mapping()
        nn.Module.__init__(self)
        self.bits, self._shape, self._dtype = bits, torch.Size((slots, dim)), dtype
        self._places = rows.absolute(), None if scales is None else scales.absolute()
        self.companion = Companion(torch.device("cpu"), torch.float32, requires_grad=False)
        self.row_gradient = None
        self._written: tuple[int, int] | None = None  # size and time of the file
        self._open()

    def _open(self) -> None:
        rows, scales = self._places
        slots, dim = self.shape
        width = dim if self.bits is None else code_bytes(dim, self.bits)
        self._rows = MappedRows(rows.file, (slots, width), self._dtype, start=rows.start)
        found = os.fstat(self._rows.descriptor)
        before, self._written = self._written, (found.st_size, found.st_mtime_ns)
        if before not in (None, self._written):  # of whom this is a copy
            raise ValueError(f"{rows.file} is another file than the one that was mapped: load its folder anew")
        self._ahead = Ahead(slots, BUDGET_BYTES)
        self._scales_S: Tensor | None = None
        if scales is not None:
            self._scales_S = MappedRows(scales.file, (slots,), torch.float32, start=scales.start).tensor.clone()

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return () if self._scales_S is None else (self._scales_S,)

    @property
    def untrainable(self) -> str:
        return f"tables must be in memory to be trained, got one that is mapped from {self._rows.file}: {_REMEDY}"

    def operands(self) -> None:
        return None  # the slots must be known before rows are read

    def figures(self) -> dict[str, int]:
        """The rows asked for, those of them read from the file, and the pages read."""
        return {"rows_asked": self._ahead.asked, "rows_read": self._ahead.cold, "pages_read": self._ahead.pages}

    def give_back(self) -> None:
        """Has no row count as memory of this process; the system may still have them in its cache."""
        self._ahead.forget()
        self._rows.give_back()

    def _compute(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        if is_exporting():
            raise ValueError(f"a value table that is mapped cannot be exported: {_REMEDY}")
        self._ahead.keep_to_budget()
        self._ahead.fetch([self._rows], distinct_slots(slots_TM, self.shape[0]))
        if self._scales_S is None or self.bits is None:
            return read(self._rows.tensor, slots_TM, given)
        return read_low_bits(self._rows.tensor, self._scales_S, slots_TM, given, self.shape[1], self.bits)

    # It is what the file says, and stays it.

    def reset_parameters(self) -> None:
        """Does nothing."""

    def require_whole(self) -> None:
        raise ValueError(
            f"model must have its tables in memory to be saved, got one of {self.extra_repr()}: copy that folder, or "
            f"{_REMEDY}"
        )

    def settle_mark(self) -> None:
        """Does nothing: the companion stays where the table is."""

    def _apply(self, fn: Any, recurse: bool = True) -> "SavedTable":
        of = torch.float32 if self.bits is not None else self._dtype
        like = fn(torch.empty(0, dtype=of))
        if like.device.type != "cpu" or (self.bits is None and like.dtype != of):
            raise ValueError(
                f"a value table that is mapped stays on the CPU, and floats in {of}, got {like.device} and "
                f"{like.dtype}: cast or move the base before load_memory, or {_REMEDY}"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_left_out:
            raise ValueError(
                f"a value table that is mapped is in no state_dict: copy the folder of {self._rows.file}, or {_REMEDY}"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name in ("weight", "codes", "scales")):  # not one of adapters alone
            raise ValueError(f"a value table that is mapped cannot be written to: {_REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        return {name: value for name, value in kept.items() if name not in ("_rows", "_ahead", "_scales_S")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open()

    def extra_repr(self) -> str:
        slots, dim = self.shape
        bits = "" if self.bits is None else f", bits={self.bits}"
        return f"slots={slots}, dim={dim}{bits}, mapped from {str(self._rows.file)!r}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(f"a value table that is mapped has no weight that could be written to: {_REMEDY}")
        return super().__getattr__(name)
