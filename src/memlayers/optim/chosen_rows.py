"""chosen rows: which rows of its tables a row optimizer may move, or how far each.

Letters: T tokens, K rows a token reads, S slots, R rows.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from memlayers.ops.row_sum import Part
from memlayers.values import ValueTable

CHOSEN = "chosen"  # the name of the mask or the rates [S] among the states of a table, in a state dict


def masks_of(
    rows: Mapping[ValueTable, Tensor | Sequence[int]] | Tensor | Sequence[int], tables: Iterable[ValueTable]
) -> dict[ValueTable, Tensor]:
    """The mask [S] of each table, or the rates [S]; those of frozen tables are left out.

    Raises `ValueError` naming what is no slot or rate, a table that has none, or one that is not among `tables`.
    """
    tables = list(tables)
    if not isinstance(rows, Mapping):
        if len(tables) != 1:
            raise ValueError(
                f"rows must be a mapping from each value table to its slots, as select_slots returns it, where an "
                f"optimizer trains {len(tables)} tables, got a {type(rows).__name__}"
            )
        rows = {tables[0]: rows}
    for table in rows:
        if not isinstance(table, ValueTable):
            raise ValueError(f"rows must be given by value table, got an entry for a {type(table).__name__}")
        if table not in tables and table.is_trained:
            raise ValueError(f"rows must be of tables that this optimizer trains, got some of another: {table}")
    if missing := [table for table in tables if table not in rows]:
        raise ValueError(
            f"rows must name each of the {len(tables)} tables, if with no slot, got none for {len(missing)} of them: "
            f"{missing[0]}"
        )
    return {table: _choice(rows[table], table.weight) for table in tables}


def _choice(given: Tensor | Sequence[int], weight_SV: Tensor) -> Tensor:
    """The mask [S] of slots, or of a mask; or the rates [S]."""
    num_slots, device = len(weight_SV), weight_SV.device
    rates = torch.as_tensor(given, device=device)
    if not (rates.is_floating_point() and rates.shape == (num_slots,)):
        return slot_mask("rows", given, num_slots, device, others=f", or rates [{num_slots}]")
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError("rows must have rates in [0, 1], got some that are not")
    return rates.float().clone()


def slot_mask(
    name: str, given: Tensor | Sequence[int], num_slots: int, device: torch.device, *, others: str = ""
) -> Tensor:
    """The mask [S] of slots, or of a mask. Raises `ValueError` naming the setting for what is neither.

    `others`: what the setting may be beside them, for the error.
    """
    slots = torch.as_tensor(given, device=device)
    if slots.dtype == torch.bool and slots.shape == (num_slots,):
        return slots.clone()
    is_whole = slots.numel() == 0 or not (slots.is_floating_point() or slots.is_complex())
    if slots.ndim != 1 or slots.dtype == torch.bool or not is_whole:
        raise ValueError(
            f"{name} must be a list of slots, whole numbers, or a mask of bool of shape [{num_slots}]{others}, got "
            f"{slots.dtype} of {[*slots.shape]}"
        )
    slots = slots.long()
    if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= num_slots):
        raise ValueError(f"{name} must be in [0, {num_slots}), got {int(slots.min())} to {int(slots.max())}")
    return torch.zeros(num_slots, dtype=torch.bool, device=device).index_fill_(0, slots, True)


def only(parts: Iterable[Part], mask_S: Tensor) -> list[Part]:
    """A gradient by the rates of its rows, or without those that were not chosen.

    Entries of a row that stays become no reads, which no step looks at.
    """

    def weights_of(part: Part) -> Tensor:
        mask_TK, weights_TK = mask_S[part.slots_TK], part.weights_TK
        if mask_TK.dtype != torch.bool:
            weights_TK = weights_TK * mask_TK.to(weights_TK.dtype)
        # Selected, not multiplied alone: NaN of another row must not come through.
        return torch.where(mask_TK != 0, weights_TK, 0)

    return [part._replace(weights_TK=weights_of(part)) for part in parts]
