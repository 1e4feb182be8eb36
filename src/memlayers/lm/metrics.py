"""Where the figures of a run go: `metrics.jsonl`, TensorBoard, a bar; and the clock that they are timed by."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayers.console import bar
from memlayers.files import flush

if TYPE_CHECKING:
    from memlayers.lm.config import TrainingConfig


class TrainingClock:
    """Seconds spent on training: what passes between marks counts, unless it is skipped."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mark = time.perf_counter()

    def tick(self) -> None:
        """Count the time since the last mark."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Leave out the time since the last mark."""
        self._mark = time.perf_counter()


class MetricsFile:
    """`metrics.jsonl` of a run: one line of JSON for each step, appended as the run goes.

    Figures that are not finite are written as null, since JSON has no word for them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Add the line of a step."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(finite, allow_nan=False) + "\n")

    def lines(self) -> int:
        """How many lines are complete."""
        return self.path.read_bytes().count(b"\n") if self.path.is_file() else 0

    def flush(self) -> int:
        """Have all lines on the disk, and return how many bytes they are."""
        with open(self.path, "ab") as stream:
            os.fsync(stream.fileno())
            size = stream.tell()
        flush(self.path.parent)  # where its name stands
        return size

    def cut(self, size: int) -> None:
        """Forget what was appended after `size` bytes. Raises `ValueError` if they are not there any more."""
        held = self.path.stat().st_size if self.path.is_file() else 0
        if held < size:
            raise ValueError(f"{self.path} is damaged: it has {held} bytes, {size} were written before the checkpoint")
        if held:
            os.truncate(self.path, size)


class TensorBoard:
    """The figures of a run for TensorBoard, under ``train/`` and, those of evaluations, ``eval/``.

    A run that goes on `after_step` hides what a killed process wrote of later steps: it is written again.
    """

    def __init__(self, folder: Path, *, after_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, since it takes a second to import

        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures of a step."""
        for name, value in figures.items():
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Progress:
    """A bar of tokens, with their rate, the time that is left, and the latest figures."""

    def __init__(self, training: "TrainingConfig", step: int, *, shown: bool) -> None:
        done, total = (steps * training.batch_tokens for steps in (step, training.steps))
        self._part_tokens = training.batch_tokens // training.accumulate
        self._figures: dict[str, str] = {}
        self._bar = bar(desc="training", total=total, initial=done, unit=" tokens", disable=not shown)

    def add_part(self) -> None:
        """Count a part of a step."""
        self._bar.update(self._part_tokens)

    def show(self, figures: Mapping[str, float]) -> None:
        """Show loss and perplexity, if they are among the figures."""
        for name, shown in (("loss", "loss"), ("eval_perplexity", "validation perplexity")):
            if name in figures:
                self._figures[shown] = f"{figures[name]:.4g}"
        self._bar.set_postfix(self._figures)

    def close(self) -> None:
        """Leave the bar as it stands, whatever ended the training."""
        self._bar.close()


def usage_figures(name: str, usage: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a memory's usage that are followed, from `UsageReport.to_dict`."""
    return {f"{figure}/{name}": usage["overall"][figure] for figure in ("usage", "kl", "top1_usage")}
