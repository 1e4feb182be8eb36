"""What an experiment is: a question, the runs that answer it, and what is concluded from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from memlayers.config import MemoryConfig
from memlayers.experiments.points import Points
from memlayers.experiments.records import Record
from memlayers.experiments.scales import Scale
from memlayers.lm.config import RunConfig

Found = Callable[[RunConfig], Record | None]  # a finished run, if there is one


class Run(NamedTuple):
    """One run of an experiment, and where it stands in the report."""

    point: str  # the row: runs of one row differ in their seeds alone
    config: RunConfig
    series: str = ""  # the line of the plot; none: neither plotted nor in the table of all points
    x: float | None = None  # the place on that line; None: a level


class Claim(NamedTuple):
    """Whether a shape of the paper carries over."""

    sentence: str
    holds: bool | None  # None: it cannot be told yet, or the difference is within two standard errors


class Table(NamedTuple):
    """Figures for people."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment, declared."""

    name: str
    question: str
    x_label: str  # of the plot
    # All runs that are known to be needed; called again when they are finished, for what depends on them.
    runs: Callable[[Scale, Found], list[Run]] = lambda scale, found: []
    claims: Callable[[Scale, Points], list[Claim]] = lambda scale, points: []
    paper: Table | None = None  # what the paper measured
    log_x: bool = False
    # What is measured by itself, on a quiet machine: models, in groups that take turns, or single layers.
    speeds: Callable[[Scale], list[dict[str, RunConfig]]] = lambda scale: []
    layers: Callable[[Scale], dict[str, MemoryConfig]] = lambda scale: {}
    measures_training: bool = True
    speed_claims: Callable[[Scale, Found, Mapping[str, Any]], list[Claim]] = lambda scale, found, speeds: []
    tables: Callable[[Scale, Found], list[Table]] = lambda scale, found: []  # beside that of the points
