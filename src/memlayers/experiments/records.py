"""Finished runs on the disk, and what makes two runs the same.

FOLDER/grid.json             which text the runs of this folder read
FOLDER/results/KEY.json      a finished run, sealed: its figures, without a model. KEY is the hash of what decides
                             the result, so that experiments share the runs that they have in common
FOLDER/runs/KEY/             a run while it trains; removed once it is finished
FOLDER/speeds/NAME.json      the speeds of an experiment's models, measured by themselves
FOLDER/NAME/                 the report of an experiment
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from memlayers.files import read_sealed, write_json
from memlayers.lm.config import OF_MEMORIES, RunConfig, flat_fields
from memlayers.lm.data import Corpus
from memlayers.lm.run import check_output

FORMAT = 1
Record = dict[str, Any]

# When, where and in how many parts a run is computed and kept does not make it another one; its text and precision
# are in its identity as what they come to.
_LEFT_OUT = ("data.", "training.save_every_tokens", "training.keep_checkpoints", "training.precision")
# Fields that came later, with the value by which a run is what it was without them: its name stays. None, False and
# an empty list mean that for every field.
_NEUTRAL = {
    "memory_kind": "memory",
    "memory_mode": "replace",
    "memory_values": "memory",
    "training.value_schedule": "constant",
    "training.value_optimizer": "rows",
}


class Identity(NamedTuple):
    """What all runs of a folder have in common."""

    corpus_sha256: str
    tokenizer_sha256: str
    precision: str

    @classmethod
    def of(cls, corpus: Corpus, precision: str) -> "Identity":
        """The identity of runs on a corpus."""
        return cls(corpus.manifest["corpus_sha256"], corpus.tokenizer_sha256, precision)

    def key(self, config: RunConfig) -> str:
        """The name of a run: a hash of all that decides its result."""
        content = json.dumps({**self._asdict(), "config": deciding_fields(config)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def deciding_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of a configuration that decide its result."""
    left_out = _LEFT_OUT if config.memory_layers else (*_LEFT_OUT, *OF_MEMORIES)
    flat = flat_fields(RunConfig, config.to_dict())
    names = ["data.weights", *(name for name in flat if not name.startswith(left_out))]
    return {name: flat[name] for name in names if not _is_neutral(name, flat[name])}


def _is_neutral(name: str, value: Any) -> bool:
    return value is None or value is False or value == [] or value == _NEUTRAL.get(name)


def read_fields(file: Path) -> dict[str, Any] | None:
    """The fields of a file of JSON; None if it holds something else."""
    try:
        held = json.loads(file.read_bytes())
    except ValueError:
        return None
    return held if isinstance(held, dict) else None


class GridFolder:
    """The folder that experiments on one text share."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.mark = self.path / "grid.json"
        self.results = self.path / "results"
        self.runs = self.path / "runs"
        self.speeds = self.path / "speeds"

    def check(self, report: str, identity: Identity) -> None:
        """Raises `ValueError` if the folder holds results on other text, or files that are none of a grid."""
        check_output(self.path)
        content = {"format": FORMAT, **identity._asdict()}
        if self.mark.exists():
            held = read_fields(self.mark)
            if held is None or set(held) != set(content):
                raise ValueError(f"output must be the folder of a grid, but {str(self.mark)!r} is not that of one")
            for name, value in content.items():
                if held[name] != value:
                    raise ValueError(
                        f"output must not hold results of another {name.removesuffix('_sha256')}: {str(self.path)!r} "
                        f"has {held[name]}, asked for is {value}; choose another folder"
                    )
            return
        if others := [path.name for path in (self.results, self.runs, self.path / report) if path.exists()]:
            raise ValueError(
                f"output must be the folder of a grid or one without {', '.join(others)}, got {str(self.path)!r}, "
                f"which has no {self.mark.name}: choose another one, or move them away"
            )

    def start(self, identity: Identity) -> None:
        """Make the folder, and say which text its runs read."""
        self.results.mkdir(parents=True, exist_ok=True)
        if not self.mark.exists():
            write_json(self.mark, {"format": FORMAT, **identity._asdict()})

    def result(self, key: str) -> Path:
        """The file of a finished run."""
        return self.results / f"{key}.json"

    def read_speeds(self, name: str) -> dict[str, Any] | None:
        """The speeds of an experiment, if they were measured. Raises `ValueError` naming a damaged file."""
        file = self.speeds / f"{name}.json"
        if not file.is_file():
            return None
        if (held := read_fields(file)) is None:
            raise ValueError(f"{file} is damaged: remove it, and measure its speeds anew with --measure_speed")
        return held

    def read(self, key: str) -> Record | None:
        """What is known of a finished run; None if it is not finished. Raises `ValueError` for a damaged file."""
        file = self.result(key)
        return read_sealed(file) if file.is_file() else None
