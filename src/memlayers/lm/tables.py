"""The tables of a run that are not beside its model: in files (`memory_values` "mapped:FOLDER"), or on the host."""

from typing import TYPE_CHECKING

from torch import nn

from memlayers.available import available_memory
from memlayers.lm.config import MAPPED, RunConfig
from memlayers.lm.table_costs import costs_of, rows_on_device, tables_of
from memlayers.sizes import size_text
from memlayers.storage import HostMemory, MappedFile, MappedTable
from memlayers.values import TablePlace, value_tables

if TYPE_CHECKING:
    from memlayers.lm.footprint import Footprint


def place_of(config: RunConfig) -> TablePlace | None:
    """Where the run's tables are; None: beside the model."""
    if config.tables_on_host:
        return HostMemory()
    return MappedFile(config.memory_values.removeprefix(MAPPED)) if config.tables_in_files else None


def mapped_tables(model: nn.Module) -> list[MappedTable]:
    """The tables of a model that are in files."""
    return [table for table in value_tables(model) if isinstance(table, MappedTable)]


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


def weight_bytes(config: RunConfig, need: "Footprint") -> int:
    """Of the tables that are not beside the model, in float32: what the finished model has on the disk for them."""
    if not (need.in_files or need.on_host):
        return 0
    return 4 * config.memory.slots * config.memory.width * tables_of(config)


def lines(config: RunConfig, need: "Footprint") -> list[tuple[str, str]]:
    """For people: what tables that are not beside the model take where they are, and what a step moves of them."""
    if not (config.tables_in_files or config.tables_on_host):
        return []
    step, count = costs_of(config), tables_of(config)
    touched = f"reads and writes at most {step.rows:,} rows a table, {size_text(count * step.at_table)}"
    if config.tables_on_host:
        if not need.on_host:
            return [("tables on the host", "beside the model, which is there, too: nothing is copied")]
        return [
            ("tables on the host", f"{size_text(need.on_host)} with moments and what is recorded"),
            ("host: available", size_text(available_memory("cpu"))),
            (
                "tables on the GPU",
                f"the rows that are read until their backward pass, {size_text(rows_on_device(config))}",
            ),
            ("a step", f"{touched}, on the host"),
            (
                "copied a step",
                f"at most {size_text(count * step.to_device)} to the GPU and {size_text(count * step.to_host)} back",
            ),
        ]
    folder = config.memory_values.removeprefix(MAPPED)
    filled = "" if config.memory.value_std == 0 else ", which are written to the files, too"
    return [
        ("tables in files", f"{size_text(need.in_files)} with moments in {folder}, once all rows are trained"),
        ("tables in memory", "none; of their pages what the system can spare"),
        ("a step", touched),
        ("finished model", f"has all rows, {size_text(weight_bytes(config, need))}{filled}"),
    ]
