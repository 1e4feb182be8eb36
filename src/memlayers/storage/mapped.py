"""MappedTable: a value table in files, with its optimizer's states; MappedFile: where one is.

Letters: T tokens, S slots, V value width, M rows a token reads, U different slots.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from memlayers.available import available_memory
from memlayers.checks import require_int
from memlayers.ops.row_sum import Part
from memlayers.storage.folder import TableFolder
from memlayers.storage.rows import require_mapping
from memlayers.torch_private import is_exporting
from memlayers.values import TablePlace, ValueTable, computed_eagerly

_DTYPES = (torch.float32, torch.bfloat16)
_GATHERED = 2**22  # elements of rows that are copied at a time, where some of them have not been written


class MappedFile(TablePlace):
    """A folder of files as the place of a value table, which may be larger than memory.

        layer = MemoryLayer(config, values=MappedFile("table"))
        model = add_memory(model, config, values=MappedFile("tables"))  # each memory in a folder below

    The table that is in the folder goes on, from its last checkpoint (`MappedTable.checkpoint`); an empty folder, or
    none, gets a new one. One process at a time opens it.

    Args:
        folder: on a local disk of Linux or macOS; an SSD, since rows are read at random places.
        budget_bytes: of the table's pages that may count as memory of the process, about. The system can take them at
            any time; where it does not count them as used the number matters little. None: a quarter of the memory
            that is available.

    Raises:
        ValueError: another system; a budget below 0.
    """

    def __init__(self, folder: str | os.PathLike[str], *, budget_bytes: int | None = None):
        require_mapping()
        if budget_bytes is not None:
            require_int("budget_bytes", budget_bytes, least=0)
        self.folder = Path(folder)
        self.budget_bytes = budget_bytes

    def make_table(self, slots: int, dim: int, **options: Any) -> "MappedTable":
        budget = available_memory("cpu") // 4 if self.budget_bytes is None else self.budget_bytes
        return MappedTable(self.folder, slots, dim, **options, budget_bytes=budget)

    def below(self, name: str) -> "MappedFile":
        return MappedFile(self.folder / name, budget_bytes=self.budget_bytes)

    def __repr__(self) -> str:
        return f"MappedFile({str(self.folder)!r})"


@computed_eagerly
class MappedTable(ValueTable):
    """A `ValueTable` whose rows and optimizer's states are in files, read and trained in place by the same kernels.

    Only rows that were written take room on the disk. Fresh rows are drawn by slot, from a seed of the table's own:
    the first pass that trains a row writes it, any other draws it again. A row optimizer (`RowAdam`, `MemoryAdamW`)
    keeps its states of the table in the folder; the next one that is built goes on with them.

    Rows change in place. `checkpoint` makes what they are permanent, without a copy; a process that ends without one
    leaves what the last one was, whenever and however it ends, to whoever opens the folder next.

    Args:
        folder: as of `MappedFile`, and so is ``budget_bytes``.
        slots: S.
        dim: V.
        device: the CPU.
        dtype: float32 or bfloat16.
        std: as of `ValueTable`.

    Raises:
        ValueError: another device or dtype; a folder with another table, or one that is open already.
        OSError: files that cannot be read or written. From a step or a pass that trains, on a full disk: no row and no
            state has changed then.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        slots: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        std: float | None = None,
        budget_bytes: int = 2**31,
    ):
        require_mapping()
        device = torch.empty(0, device=device).device
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if device.type != "cpu":
            raise ValueError(f"device must be the CPU for a table in files, got {device}: put the model on the CPU")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16 for a table in files, got {dtype}")
        super().__init__(slots, dim, device="meta", dtype=dtype, std=std)
        self._opened = TableFolder(
            Path(folder), slots, dim, dtype=dtype, std=self.std, new_seed=_new_seed, budget_bytes=budget_bytes
        )
        self.weight = nn.Parameter(self._files.weight.tensor)
        self._own = (self.weight,)  # of a tuple, so that it is registered once
        self.settle_mark()

    @property
    def _files(self) -> TableFolder:
        if self._opened.is_closed:
            raise ValueError(f"the table in {str(self.folder)!r} was closed: open it anew (MappedFile)")
        return self._opened

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self._opened.folder

    def reset_parameters(self) -> None:
        """Does nothing to a new table, whose rows are fresh. Raises `ValueError` where rows have been written."""
        if not self.weight.is_meta and self._files.written.any():
            raise ValueError(
                f"the rows of a table in files are not drawn again: remove the folder {str(self.folder)!r} for new ones"
            )

    # What it is read by.

    def _compute(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        files = self._files
        if is_exporting():
            raise ValueError("a value table in files cannot be exported: load the model with its table in memory")
        if self.weight is not self._own[0]:  # another one, by `functional_call`
            return super()._compute(slots_TM, given)
        slots_U = distinct_slots(slots_TM, files.slots)
        files.ahead.keep_to_budget()
        is_written_U = files.written[slots_U]
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        is_stepped = is_trained and self.row_gradient is not None
        states = files.large_states() if is_stepped else ()
        files.ahead.fetch([files.weight], slots_U[is_written_U], states, slots_U[~is_written_U])
        if is_stepped:
            if files.std:
                files.write_fresh(slots_U[~is_written_U])
            return super()._compute(slots_TM, given)
        if files.std == 0 or is_written_U.all():
            y_TV = self._operations[1](self.weight.detach(), slots_TM, given)
        else:
            y_TV = self._read_copies(slots_TM, given)
        return _Unowned.apply(y_TV, self.weight) if is_trained else y_TV

    def _read_copies(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        """The same where some rows have not been written, which stay so: from copies, a few tokens at a time."""
        y = []
        tokens = max(1, _GATHERED // max(1, slots_TM.shape[1] * self._files.width))
        for some_TM, its in zip(slots_TM.split(tokens), given.split(tokens), strict=True):
            slots_U = distinct_slots(some_TM, self._files.slots)
            places_TM = torch.from_numpy(np.searchsorted(slots_U, some_TM.numpy()))
            y.append(self._operations[1](self._files.rows(slots_U), places_TM, its))
        return torch.cat(y)

    # What a row optimizer asks.

    def make_states(self, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        return self._files.make_states(make(self.weight.detach().to("meta")))

    def held_states(self) -> dict[str, Tensor]:
        """The states that are in the folder."""
        return self._files.state_tensors()

    def before_step(self, parts: list[Part]) -> None:
        """Keeps the rows that were recorded, and their states, on the disk: a step may change them now."""
        slots = torch.cat([part.slots_TK[part.weights_TK != 0] for part in parts])
        self._files.before_change(distinct_slots(slots, self._files.slots))

    @property
    def unchanged_since(self) -> int:
        """The number of the last checkpoint where nothing has changed since; else -1."""
        return -1 if self._files.is_changed else self.checkpoints[-1]

    def changed_slots(self) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self._files.logged))

    # What its owner does.

    @property
    def checkpoints(self) -> list[int]:
        """The numbers of the checkpoints that are kept, in their order; 0 is the table before anything was written."""
        return [one.number for one in self._files.checkpoints]

    def checkpoint(self, *, keep: int = 1) -> int:
        """Makes what the rows and states are a checkpoint, on the disk when this returns.

        Costs a flush of what has changed, and a bit a row. Between two checkpoints each row that changes is written
        once more before its first change, with its states.

        Args:
            keep: this many of the last checkpoints can be restored; each of the older ones keeps its log.

        Returns:
            Its number, for `restore`.

        Raises:
            OSError: it could not be written; the last checkpoint is what it was.
        """
        require_int("keep", keep, least=1)
        return self._files.checkpoint(keep=keep)

    def restore(self, number: int | None = None) -> None:
        """Puts rows and states back to a checkpoint, the last one where none is named; later ones are gone.

        Raises `ValueError` for one that is not kept.
        """
        if number is not None:
            require_int("number", number, least=0)
        self._files.restore(number)

    def drop_states(self) -> None:
        """Removes the states of the optimizer, for another one; makes a checkpoint, the only one kept.

        Raises `ValueError` while the optimizer that has them lives.
        """
        owner = None if self.row_gradient is None else self.row_gradient.owner()
        if isinstance(owner, torch.optim.Optimizer) and owner.state.get(self.weight):
            raise ValueError("states of an optimizer that trains the table cannot be dropped: call its release() first")
        self._files.drop_states()

    @torch.no_grad()
    def fill(self) -> None:
        """Writes all rows that have not been: from then on `state_dict` has the whole table.

        Where fresh rows are zeros, as holes of the file are, there is nothing to write.
        """
        if self._files.std:
            self._files.write_fresh(np.flatnonzero(~self._files.written))

    def close(self) -> None:
        """Closes the files, so that others may open them. What has changed since the last checkpoint is put back then.

        The table must not be used afterwards.
        """
        self._opened.close()

    def figures(self) -> dict[str, int]:
        """Bytes on the disk and of the logs, the rows asked for and those of them read from files, pages read."""
        ahead = self._files.ahead
        return {
            "disk_bytes": self._files.disk_bytes,
            "logged_bytes": self._files.logged_bytes,
            "rows_asked": ahead.asked,
            "rows_read": ahead.cold,
            "pages_read": ahead.pages,
        }

    # What moves or copies modules.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MappedTable":
        like = fn(torch.empty(0, dtype=self.weight.dtype))
        if (like.dtype, like.device.type) != (self.weight.dtype, "cpu"):
            raise ValueError(
                f"a table in files stays on the CPU and in {self.weight.dtype}, got {like.device} and {like.dtype}: "
                f"cast or move the model before add_memory(..., values=MappedFile(...))"
            )
        if recurse:
            self.companion._apply(fn)
        self.settle_mark()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_left_out:
            self.require_whole()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def require_whole(self) -> None:
        if self._files.std and not self._files.written.all():
            raise ValueError(
                f"the table in {str(self.folder)!r} has rows that were never written, so its weight is not whole: call "
                f"fill() on it, which writes all of them, or checkpoint(), which copies nothing"
            )

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        rows_SV = state_dict.get(f"{prefix}weight")
        if rows_SV is None or rows_SV.shape != self.weight.shape:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
            return
        if local_metadata.get("assign_to_params_buffers", False):
            raise ValueError("assign must be False for a table in files, whose rows stay there")
        step = max(1, _GATHERED // self._files.width)
        for start in range(0, self._files.slots, step):
            part = rows_SV[start : start + step]
            slots = np.arange(start, start + len(part))
            self._files.before_change(slots, drawn=False)
            self._files.weight.write(slots, self._files.as_bytes(part.detach().cpu()))

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"a table in files cannot be copied or pickled: two would write to {str(self.folder)!r}. Copy the folder "
            f"after checkpoint() and close(), and open the copy by MappedFile"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in {str(self.folder)!r}"


class _Unowned(torch.autograd.Function):
    """What was read of a table that nobody trains, though its weight requires a gradient."""

    @staticmethod
    def forward(ctx: Any, y_TV: Tensor, weight_SV: Tensor) -> Tensor:
        return y_TV.view_as(y_TV)

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> NoReturn:
        raise RuntimeError(
            "a value table in files has no dense gradient, which would be as large as the table: build its row "
            "optimizer (MemoryAdamW, RowAdam, RowAdagrad, RowSGD), or freeze it by table.requires_grad_(False)"
        )


def _new_seed() -> int:
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def distinct_slots(slots: Tensor, num_slots: int) -> np.ndarray:
    """The slots that occur, ascending. Raises `IndexError` for what is none, `ValueError` where nobody may see them."""
    try:
        ascending = np.sort(slots.detach().numpy(), axis=None)  # np.unique takes 20 times as long
    except RuntimeError:  # the slots have no storage there
        raise ValueError(
            "a value table in files cannot be read in a transform of torch.func (grad, vmap, jvp), where the slots "
            "that are read are not known: load the model with its table in memory"
        ) from None
    is_first = np.ones(len(ascending), bool)
    is_first[1:] = ascending[1:] != ascending[:-1]
    distinct = ascending[is_first]
    if len(distinct) and not 0 <= distinct[0] <= distinct[-1] < num_slots:
        raise IndexError(f"slots must be in [0, {num_slots}), got {distinct[0]} to {distinct[-1]}")
    return distinct.astype(np.int64, copy=False)
