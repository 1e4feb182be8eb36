"""How results are shown to people: tables, numbers as text, and what plots have in common."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memlayers.files import file_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = list[tuple[str, str]]  # names, and what is said of them

# Distinct for colour-blind readers and in print (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def two_columns(lines: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of them, in two columns."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where a float does not hold it: a model that has diverged is reported, too."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity_text(value: float | None) -> str:
    """A perplexity as text: one decimal, or three digits where it is huge (per word of source code), or a dash."""
    if value is None:
        return "-"
    return f"{value:.2e}" if value >= 1e6 else f"{value:,.1f}"


def duration_text(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 07 min."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def save_figure(figure: "Figure", file: Path) -> None:
    """Write a plot as PNG so that `file` holds either what it held before or all of it."""
    with file_aside(file) as aside:
        figure.savefig(aside, format="png")
