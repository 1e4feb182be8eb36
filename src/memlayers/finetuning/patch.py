"""memory_diff: the rows in which two models differ, as a patch that is applied, taken back, merged and shipped.

Letters: S slots, V value width, R rows of a patch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from memlayers.files import file_aside
from memlayers.finetuning.names import plain_name, tables_by_name
from memlayers.storage import MappedTable
from memlayers.values import ValueTable

_FORMAT = "memlayers patch 1"
_CHUNK = 2**24  # bytes of rows that are looked at at a time


@dataclass(frozen=True)
class TablePatch:
    """The rows of one table that were changed."""

    base: str  # SHA-256 of the table before the change, of its dtype and its shape
    shape: tuple[int, int]  # [S, V]
    slots_R: Tensor  # ascending
    rows_RV: Tensor  # after the change
    before_RV: Tensor  # before it

    def digest(self) -> str:
        """SHA-256 of all that it holds."""
        return _sha256(f"{self.base} {[*self.shape]}", (self.slots_R, self.rows_RV, self.before_RV))


class MemoryPatch:
    """What `memory_diff` returns: by table, the rows that were changed, as they are now and as they were.

        patch = memory_diff(model, base)
        patch.save("news.safetensors")
        MemoryPatch.load("news.safetensors").apply(other_copy_of_base)

    It fits the tables that it was made for and no others: their SHA-256 is in it. What it changes it takes back bit for
    bit. `nbytes` is its size, of the rows and what was there before them, and `rows` the number of rows.
    """

    def __init__(self, tables: dict[str, TablePatch]):
        self.tables = tables

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(len(one.slots_R) for one in self.tables.values())

    @property
    def nbytes(self) -> int:
        """Bytes of slots and rows."""
        parts = [part for one in self.tables.values() for part in (one.slots_R, one.rows_RV, one.before_RV)]
        return sum(part.nbytes for part in parts)

    def __repr__(self) -> str:
        said = ", ".join(
            f"{len(one.slots_R):,} of {one.shape[0]:,} rows of {name}" for name, one in self.tables.items()
        )
        return f"MemoryPatch({said or 'nothing'}; {self.nbytes:,} bytes)"

    def apply(self, model: nn.Module) -> None:
        """Puts the changed rows into a model that has the base's tables.

        Raises `ValueError` naming the table for another base; nothing is changed then.
        """
        self._exchange(model, to="rows_RV", what="the base of this patch")

    def revert(self, model: nn.Module) -> None:
        """Takes the patch back: the tables are the base's again, bit for bit.

        Raises `ValueError` naming the table where the model is not the base with this patch, and no other change.
        """
        self._exchange(model, to="before_RV", what="the base with this patch applied")

    @torch.no_grad()
    def _exchange(self, model: nn.Module, *, to: Literal["rows_RV", "before_RV"], what: str) -> None:
        tables = tables_by_name(model)
        for name, one in self.tables.items():
            if name not in tables:
                raise ValueError(f"model must have the table {name} of this patch, got one with {', '.join(tables)}")
            weight_SV, there = _plain_weight(name, tables[name]), one.rows_RV.dtype
            if (*weight_SV.shape,) != one.shape or weight_SV.dtype != there:
                raise ValueError(
                    f"the table {name} must be that of {what}, {[*one.shape]} in {there}, got {[*weight_SV.shape]} in "
                    f"{weight_SV.dtype}"
                )
            if (
                to == "before_RV"
                and not _same_bits(weight_SV[one.slots_R.to(weight_SV.device)].cpu(), one.rows_RV).all()
            ):
                raise ValueError(f"the table {name} must be that of {what}: rows of the patch are not in it")
            if _table_digest(weight_SV, one.slots_R, one.before_RV if to == "before_RV" else None) != one.base:
                raise ValueError(f"the table {name} must be that of {what}, got one with other rows (SHA-256)")
        for name, one in self.tables.items():
            weight_SV = tables[name].weight
            weight_SV[one.slots_R.to(weight_SV.device)] = getattr(one, to).to(weight_SV.device)

    def conflicts(self, other: "MemoryPatch") -> dict[str, Tensor]:
        """By table, the slots that both change to rows that are not the same; no entry where there are none.

        Raises `ValueError` naming a table that the patches have of different bases.
        """
        found = {}
        for name in self.tables.keys() & other.tables.keys():
            mine, others = self.tables[name], other.tables[name]
            if mine.base != others.base:
                raise ValueError(f"patches must be of one base, got two whose tables {name} differ (SHA-256)")
            common = mine.slots_R[torch.isin(mine.slots_R, others.slots_R)]
            rows = [one.rows_RV[torch.isin(one.slots_R, common)] for one in (mine, others)]
            if len(differing := common[~_same_bits(*rows).all(1)]):
                found[name] = differing
        return found

    def merge(self, other: "MemoryPatch", *, prefer: Literal["self", "other"] | None = None) -> "MemoryPatch":
        """The patch that makes the changes of both; `prefer` says whose row counts where they conflict.

        Raises `ValueError` for patches of different bases, and for conflicts where nobody is preferred: it lists them.
        """
        if prefer not in (None, "self", "other"):
            raise ValueError(f"prefer must be 'self', 'other' or None, got {prefer!r}")
        if (found := self.conflicts(other)) and prefer is None:
            listed = "; ".join(
                f"{len(slots):,} of {name} ({', '.join(map(str, slots[:8].tolist()))}{', ...' * (len(slots) > 8)})"
                for name, slots in found.items()
            )
            raise ValueError(f"the patches change the same rows to others: {listed}. prefer='self' or 'other' decides")
        first, second = (other, self) if prefer == "other" else (self, other)
        merged = {**second.tables, **first.tables}
        for name in first.tables.keys() & second.tables.keys():
            mine, more = first.tables[name], second.tables[name]
            new = ~torch.isin(more.slots_R, mine.slots_R)
            slots_R, order = torch.cat([mine.slots_R, more.slots_R[new]]).sort()
            rows_RV, before_RV = (
                torch.cat([part, others[new]])[order]
                for part, others in ((mine.rows_RV, more.rows_RV), (mine.before_RV, more.before_RV))
            )
            merged[name] = TablePatch(mine.base, mine.shape, slots_R, rows_RV, before_RV)
        return MemoryPatch(merged)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes a file in safetensors; what is there is replaced once all is on the disk.

        Its folder is made if it is not there.
        """
        from safetensors.torch import save_file  # optional

        tensors: dict[str, Tensor] = {}
        for name, one in self.tables.items():
            tensors |= {f"slots {name}": one.slots_R, f"rows {name}": one.rows_RV, f"before {name}": one.before_RV}
        described = {
            name: {"base": one.base, "shape": one.shape, "sha256": one.digest()} for name, one in self.tables.items()
        }
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with file_aside(Path(file)) as aside:
            save_file(tensors, aside, {"format": _FORMAT, "tables": json.dumps(described)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """The patch that `save` wrote. Raises `ValueError` naming the file for another one, or one that is damaged."""
        from safetensors import SafetensorError, safe_open  # optional

        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("its format is another")
                tables = {}
                for name, known in json.loads(metadata["tables"]).items():
                    parts = [opened.get_tensor(f"{kind} {name}") for kind in ("slots", "rows", "before")]
                    tables[name] = TablePatch(known["base"], tuple(known["shape"]), *parts)
                    if tables[name].digest() != known["sha256"]:
                        raise ValueError(f"it is damaged: what it holds of {name} is not what was written")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"file must be one of MemoryPatch.save, {str(file)!r} is not: {error}") from None
        return cls(tables)


@torch.no_grad()
def memory_diff(model: nn.Module, base: nn.Module) -> MemoryPatch:
    """The rows in which the value tables of `model` differ from those of `base`, as a patch of the base.

    Args:
        model: what was trained.
        base: what it was before, with the same memories in the same dtype.

    Raises:
        ValueError: other tables; tables in columns or in files; a parameter or buffer that both have (a query, a key, a
            gate, running statistics, a weight of the base model) and that differs, naming it: rows alone would not make
            the one model of the other. What only one of the two has, such as adapters, is not compared.
    """
    tables, before = tables_by_name(model), tables_by_name(base)
    if tables.keys() != before.keys():
        raise ValueError(f"model must have the tables of base, {', '.join(before)}, got {', '.join(tables)}")
    _require_same_rest(model, base)
    found = {}
    for name, table in tables.items():
        new_SV, old_SV = (_plain_weight(name, one) for one in (table, before[name]))
        if new_SV.shape != old_SV.shape or new_SV.dtype != old_SV.dtype:
            raise ValueError(
                f"the table {name} must be {[*old_SV.shape]} in {old_SV.dtype}, as in base, got {[*new_SV.shape]} in "
                f"{new_SV.dtype}"
            )
        size = _rows_of_chunk(old_SV)
        pairs = zip(new_SV.split(size), old_SV.split(size), strict=True)
        slots_R = torch.cat([~_same_bits(new.cpu(), old.cpu()).all(1) for new, old in pairs]).nonzero().squeeze(1)
        if len(slots_R):
            rows = [one[slots_R.to(one.device)].cpu() for one in (new_SV, old_SV)]
            found[name] = TablePatch(_table_digest(old_SV), (*old_SV.shape,), slots_R, *rows)
    return MemoryPatch(found)


def _require_same_rest(model: nn.Module, base: nn.Module) -> None:
    rest = []
    for one in (model, base):
        tables = {part for table in tables_by_name(one).values() for part in (*table.stored, table.row_mark)}
        named = [*one.named_parameters(), *one.named_buffers()]
        rest.append({plain_name(name): tensor for name, tensor in named if tensor not in tables})
    new, old = rest
    for name in new.keys() & old.keys():
        if new[name].dtype != old[name].dtype or not torch.equal(new[name].cpu(), old[name].cpu()):
            raise ValueError(
                f"model must differ from base in rows of tables alone, which are what a patch holds, but {name} is "
                "another: train the tables alone (a row optimizer, or all else frozen, queries' BatchNorm in eval mode)"
            )


def _plain_weight(name: str, table: ValueTable) -> Tensor:
    if table.untrainable:
        raise ValueError(f"the table {name} must be of floats: {table.untrainable}")
    if isinstance(table, MappedTable) or hasattr(table.weight, "placements"):  # a DTensor
        where = "files" if isinstance(table, MappedTable) else "columns"
        raise ValueError(f"the table {name} must be whole and in memory, got one in {where}")
    return table.weight.detach()


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of each row: NaN is NaN, and -0 is not 0."""
    return tensor.contiguous().view(torch.uint8)


def _same_bits(one: Tensor, other: Tensor) -> Tensor:
    return _bits(one) == _bits(other)


def _rows_of_chunk(weight_SV: Tensor) -> int:
    return max(1, _CHUNK // (weight_SV.shape[1] * weight_SV.itemsize))


def _table_digest(weight_SV: Tensor, slots_R: Tensor | None = None, rows_RV: Tensor | None = None) -> str:
    """The SHA-256 of a table, as it would be with other rows at some slots."""
    size = _rows_of_chunk(weight_SV)

    def pieces() -> Iterator[Tensor]:
        for first in range(0, len(weight_SV), size):
            piece = weight_SV[first : first + size].cpu()
            if slots_R is not None and rows_RV is not None:
                here = (slots_R >= first) & (slots_R < first + size)
                piece = piece.clone()
                piece[slots_R[here] - first] = rows_RV[here]
            yield piece

    return _sha256(f"{weight_SV.dtype} {[*weight_SV.shape]}", pieces())


def _sha256(text: str, tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(_bits(tensor).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
