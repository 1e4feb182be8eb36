"""The tables of a run that are in files (`memory_values` "mapped:FOLDER"): where, how large, whether they are new."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from memlayers.lm.config import MAPPED, RunConfig
from memlayers.sizes import size_text
from memlayers.storage import MappedFile, MappedTable
from memlayers.values import value_tables

if TYPE_CHECKING:
    from memlayers.lm.footprint import Footprint


def place_of(config: RunConfig) -> MappedFile | None:
    """Where the run's tables are; None: in memory."""
    if not config.tables_in_files:
        return None
    return MappedFile(config.memory_values.removeprefix(MAPPED))


def mapped_tables(model: nn.Module) -> list[MappedTable]:
    """The tables of a model that are in files."""
    return [table for table in value_tables(model) if isinstance(table, MappedTable)]


@contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Inside, no weight of a table in files is in a `state_dict` of the model."""
    with ExitStack() as stack:
        for table in mapped_tables(model):
            stack.enter_context(table.left_out())
        yield


def begin_tables(model: nn.Module, *, resume: bool) -> None:
    """Has tables in files be new ones, for a run that begins.

    resume: A run that was killed before its first checkpoint may have left some; they are put back to the beginning.
    Raises `ValueError` for tables that another run has trained.
    """
    for table in mapped_tables(model):
        if resume and 0 in table.checkpoints:
            table.restore(0)
        if table.checkpoints[-1] != 0:
            raise ValueError(
                f"memory_values must name a folder without tables for a run that begins, got {str(table.folder)!r}, "
                f"which holds one of checkpoint {table.checkpoints[-1]}: remove it, name another, or let its run go on "
                f"(--resume)"
            )


def weight_bytes(config: RunConfig) -> int:
    """Of the tables in files, in float32: what the finished model has on the disk for them."""
    if not config.tables_in_files:
        return 0
    count = 1 if config.memory_share_values else len(config.memory_layers)
    return 4 * config.memory.slots * config.memory.width * count


def lines(config: RunConfig, need: "Footprint") -> list[tuple[str, str]]:
    """For people: what tables in files take on the disk, and what a step reads and writes; nothing for others."""
    if not config.tables_in_files:
        return []
    memory, weights = config.memory, weight_bytes(config)
    count = 1 if config.memory_share_values else len(config.memory_layers)
    read = config.training.batch_tokens * memory.heads * memory.topk * len(config.memory_layers) // count
    rows = min(memory.slots, read)
    step = rows * need.in_files // memory.slots
    folder = config.memory_values.removeprefix(MAPPED)
    return [
        ("tables in files", f"{size_text(need.in_files)} with moments in {folder}, once all rows are trained"),
        ("tables in memory", "none; of their pages what the system can spare"),
        ("a step", f"reads and writes at most {rows:,} rows a table, {size_text(step)}"),
        ("finished model", f"has all rows, {size_text(weights)}, which are written to the files, too"),
    ]
