"""MetricsFile: one line of JSON for each training step, appended as the run goes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlayers.files import flush


class MetricsFile:
    """`metrics.jsonl` of a run. Figures that are not finite are written as null, since JSON has no word for them."""

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

    def flush(self) -> int:
        """Have all lines on the disk; how many bytes they are."""
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
