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
        if table not in tables and not table.untrainable and table.weight.requires_grad:
            raise ValueError(f"rows must be of tables that this optimizer trains, got some of another: {table}")
    if missing := [table for table in tables if table not in rows]:
        raise ValueError(
            f"rows must name each of the {len(tables)} tables, if with no slot, got none for {len(missing)} of them: "
            f"{missing[0]}"
        )
    return {table: _mask(rows[table], table.weight) for table in tables}


def _mask(rows: Tensor | Sequence[int], weight_SV: Tensor) -> Tensor:
    num_slots, device = len(weight_SV), weight_SV.device
    given = torch.as_tensor(rows, device=device)
    if given.dtype == torch.bool:
        if given.shape != (num_slots,):
            raise ValueError(f"rows must be slots, or a mask of shape [{num_slots}], got one of {[*given.shape]}")
        return given.clone()
    if given.is_floating_point() and given.shape == (num_slots,):
        if not bool(((given >= 0) & (given <= 1)).all()):
            raise ValueError("rows must have rates in [0, 1], got some that are not")
        return given.float().clone()
    if given.ndim != 1 or (given.numel() and (given.is_floating_point() or given.is_complex())):
        raise ValueError(
            f"rows must be a list of slots [R], whole numbers, or rates [{num_slots}], got {given.dtype} of "
            f"{[*given.shape]}"
        )
    given = given.long()
    if given.numel() and (int(given.min()) < 0 or int(given.max()) >= num_slots):
        raise ValueError(f"rows must be in [0, {num_slots}), got {int(given.min())} to {int(given.max())}")
    return torch.zeros(num_slots, dtype=torch.bool, device=device).index_fill_(0, given, True)


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
