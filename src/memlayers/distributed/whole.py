"""whole: what is divided among ranks as whole tensors, for a save that one rank writes.

A whole table lies in a file that is mapped to memory, filled some rows at a time: no rank ever holds one in RAM.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.distributed.agreement import Ranks, is_divided, own_part
from memlayers.distributed.columns import CHUNK_ELEMENTS, ColumnTable, meet
from memlayers.values import ValueTable, value_tables


@contextmanager
def whole_tables(
    tables: Iterable[ValueTable], folder: str | os.PathLike[str], others: Iterable[Tensor] = ()
) -> Iterator[dict[Tensor, Tensor] | None]:
    """The whole tables, by their weights in columns, on the rank that writes; None on the others.

    All ranks call it together, and leave it together. Where nothing is divided it gives an empty dictionary, to each
    rank that calls it.

    Args:
        tables: the same on all ranks.
        folder: made if it is not there; its file system has room for the tables, which are gone afterwards.
        others: of the same model, of which what FSDP has sharded is given, too; each rank holds it whole meanwhile.

    Raises:
        RuntimeError: on the other ranks, where the one that writes fails; that one raises its own error. On all, where
            one is in a pass through a table instead.
    """
    columns = [table for table in tables if isinstance(table, ColumnTable)]
    weights = {table.weight for table in columns}
    sharded = [tensor for tensor in others if is_divided(tensor) and tensor not in weights]
    if not columns and not sharded:
        yield {}
        return
    parts = (columns[0].ranks, columns[0].replicas) if columns else (Ranks(),)
    groups = [ranks for ranks in parts if ranks is not None]
    is_first_replica = len(groups) == 1 or groups[1].rank == 0
    is_writer = is_first_replica and groups[0].rank == 0
    meet(groups[0], "a save")
    error: BaseException | None = None
    with ExitStack() as stack:
        whole: dict[Tensor, Tensor] = {}
        if is_writer:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                aside = Path(stack.enter_context(TemporaryDirectory(prefix=".whole-", dir=folder)))
                whole = {table.weight: _mapped(table, aside / str(number)) for number, table in enumerate(columns)}
            except OSError as found:
                error = found
        _tell(groups, error)
        gathered = {tensor: _gathered(tensor) for tensor in sharded}
        if is_first_replica:
            for table in columns:
                _fill(table, whole.get(table.weight))
        try:
            yield {**gathered, **whole} if is_writer else None
        except BaseException as found:  # also an interrupt: the others wait
            error = found
        _tell(groups, error)


def has_columns(model: nn.Module) -> bool:
    """Whether a model has tables in columns."""
    return any(isinstance(table, ColumnTable) for table in value_tables(model))


def with_whole_tables(model: nn.Module, whole: Mapping[Tensor, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a `save_pretrained` whose ``state_dict`` has whole tables in place of those in columns."""
    if not whole:
        return dict(settings)
    names = model.named_parameters(remove_duplicate=False)
    tables = {name: whole[weight] for name, weight in names if weight in whole}
    return {**settings, "state_dict": {**(settings.get("state_dict") or model.state_dict()), **tables}}


def _gathered(tensor: Any) -> Tensor:
    whole = tensor.detach().full_tensor()
    return nn.Parameter(whole, requires_grad=False) if isinstance(tensor, nn.Parameter) else whole


def _mapped(table: ColumnTable, file: Path) -> nn.Parameter:
    weight = table.weight
    size = weight.numel() * weight.element_size()
    with file.open("wb") as opened:
        opened.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a disk that is full would end a process that writes to what is mapped
            os.posix_fallocate(opened.fileno(), 0, size)
    mapped = torch.from_file(str(file), shared=True, size=weight.numel(), dtype=weight.dtype)
    with suppress(OSError):  # on Windows it is removed at the end; elsewhere nothing can leave it behind from here on
        file.unlink()
    return nn.Parameter(mapped.view(weight.shape), requires_grad=False)


@torch.no_grad()
def _fill(table: ColumnTable, whole_SV: Tensor | None) -> None:
    columns_SC, bounds = own_part(table.weight), table.bounds
    slots, width = table.weight.shape
    rows = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, slots, rows):
        piece = columns_SC[start : start + rows]
        pieces = table.ranks.gather_uneven(piece.flatten(), [len(piece) * (last - first) for first, last in bounds])
        if whole_SV is not None:
            for received, (first, last) in zip(pieces, bounds, strict=True):
                whole_SV[start : start + rows, first:last] = received.view(len(piece), -1)


def _tell(groups: Sequence[Ranks], error: BaseException | None) -> None:
    """Raises on all ranks where one has an error."""
    fault = None if error is None else f"{type(error).__name__}: {error}"
    for ranks in groups:
        fault = next((text for text in ranks.gather_objects(fault) if text is not None), None)
    if error is not None:
        raise error
    if fault is not None:
        raise RuntimeError(f"the rank that writes has failed: {fault}")
