"""Checkpoints: a run's state on disk, from which it goes on as if it had never stopped.

checkpoints/step-00000240/     appears by a rename, once all of it is on the disk
    checkpoint.json            sealed (`memlayers.files`): the step, the run's configuration and figures, and the
                               size and SHA-256 of every other file; written last
    model.safetensors ...      the model, as `save_pretrained` writes it: each table once, streamed from where it is;
                               or memories alone, as `save_memory` writes them, beside a base that is frozen
    optimizer.pt               the optimizer's state; without tables in files, which have checkpoints of their own
    loop.pt                    the states of the schedule, of the loss scaler, and of all random generators, those of
                               every process
    usage.safetensors          hits since the last line of usage figures

`Checkpoints` keeps such folders, `TrainingState` fills one and takes it back.
"""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memlayers.files import (
    describe_files,
    flush,
    new_folder,
    read_sealed,
    refuse_others,
    remove_folder,
    verify_files,
    write_sealed,
)
from memlayers.lm.run import without_bars
from memlayers.lm.tables import mapped_tables
from memlayers.lm.weights import load_weights, save_weights
from memlayers.usage import UsageMeter
from memlayers.values import left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 2
DESCRIPTION = "checkpoint.json"
OPTIMIZER, LOOP, USAGE = "optimizer.pt", "loop.pt", "usage.safetensors"


class Checkpoint(NamedTuple):
    """A verified checkpoint: where it lies, the step it was made after, and what its description says."""

    folder: Path
    step: int
    content: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; the newest `keep` of them stay."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def write(self, step: int, content: dict[str, Any], save: Callable[[Path], None]) -> Path:
        """Write one: `save` fills a folder, `content` goes into its description. Older ones go once it is verified."""
        folder = self.folder / f"step-{step:08d}"
        with new_folder(folder) as aside:
            save(aside)
            files = describe_files(aside)
            write_sealed(aside / DESCRIPTION, {"format": FORMAT, "step": step, **content, "files": files})
            for name in files:
                flush(aside / name)
                _forget_cached(aside / name)
            self._read(aside, step)
        for _, older in sorted(self._complete())[: -self.keep]:
            remove_folder(older)
        return folder

    def newest(self) -> Checkpoint | None:
        """The last checkpoint, verified; None if there is none. Raises `ValueError` naming the file that is damaged."""
        complete = sorted(self._complete())
        return self._read(complete[-1][1], complete[-1][0]) if complete else None

    def named(self, name: str) -> Checkpoint:
        """The checkpoint of that name, verified. Raises `ValueError` if it is none, or damaged."""
        match = re.fullmatch(r"step-(\d+)", name)
        if match is None:
            raise ValueError(f"checkpoint must be the folder of a complete one, step-..., got {name!r}")
        return self._read(self.folder / name, int(match[1]))

    def newest_step(self) -> int | None:
        """The step of the last checkpoint, which is not looked into."""
        return max((step for step, _ in self._complete()), default=None)

    def remove_incomplete(self) -> list[str]:
        """Remove what a process left that was killed while it wrote or removed one; their names."""
        left = [path for path in self.folder.glob(".step-*") if path.is_dir()]
        for path in left:
            shutil.rmtree(path)
        return sorted(path.name.split(".")[1] for path in left if path.name.endswith(".partial"))

    def _complete(self) -> Iterator[tuple[int, Path]]:
        for path in self.folder.glob("step-*"):
            if match := re.fullmatch(r"step-(\d+)", path.name):
                yield int(match[1]), path

    def _read(self, folder: Path, step: int) -> Checkpoint:
        content = read_sealed(folder / DESCRIPTION)
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{folder} is a checkpoint of format {content.get('format')!r}, this version reads format {FORMAT}: "
                f"resume the run with the version of memlayers that began it, or have it replaced (--overwrite)"
            )
        if missing := {"step", "files"} - set(content):
            raise ValueError(f"{folder / DESCRIPTION} is damaged: it has no {min(missing)!r}")
        if content["step"] != step:
            raise ValueError(f"{folder / DESCRIPTION} is damaged: it is of step {content['step']}, another checkpoint")
        verify_files(folder, content["files"])
        refuse_others(folder, {*content["files"], DESCRIPTION})
        return Checkpoint(folder, content["step"], content)


class TrainingState(NamedTuple):
    """All that decides how a run goes on, beside its configuration and its text."""

    model: "PreTrainedModel"
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    meters: Mapping[str, UsageMeter]
    keep: int = 1  # checkpoints of the run that stay

    def save(self, folder: Path, random_states: Sequence[Mapping[str, Any]]) -> None:
        """Write it to `folder`, with the `random_states` of each process."""
        with without_bars(), left_out(self.model):
            save_weights(self.model, folder)
        # One more is kept than there are checkpoints, for this one may not come to be.
        numbers = [table.checkpoint(keep=self.keep + 1) for table in mapped_tables(self.model)]
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        loop = {
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states[0],
            "random_of_others": random_states[1:],
            "tables": numbers,
        }
        torch.save(loop, folder / LOOP)
        totals = {f"{name}/{part}": t for name, meter in self.meters.items() for part, t in meter.state_dict().items()}
        save_file(totals, folder / USAGE)

    def load(self, folder: Path, rank: int = 0) -> None:
        """Take back what `save` wrote, in the process of that rank.

        The first process has the hits of all; one that there was not yet keeps its random generators as they are.
        From the disk straight into place (files are mapped): a second copy of a table or of its moments may not fit.
        Raises `ValueError` for a model of other tensors.
        """
        load_weights(self.model, folder, beside=(USAGE,), without_tables=True)
        loop = torch.load(folder / LOOP, map_location="cpu", weights_only=True)
        for table, number in zip(mapped_tables(self.model), loop.get("tables", ()), strict=True):
            table.restore(number)
        saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        mapped = {value.data_ptr() for state in saved["state"].values() for value in _tensors(state)}
        self.optimizer.load_state_dict(saved)
        for state in self.optimizer.state.values():
            for name, value in state.items():  # what was taken over as it is must not stay a file
                if isinstance(value, Tensor) and value.data_ptr() in mapped:
                    state[name] = value.clone()
        self.scheduler.load_state_dict(loop["scheduler"])
        self.scaler.load_state_dict(loop["scaler"])
        totals = load_file(folder / USAGE)
        for name, meter in self.meters.items():
            prefix = f"{name}/"
            meter.load_state_dict({key.removeprefix(prefix): t for key, t in totals.items() if key.startswith(prefix)})
            if rank:
                meter.reset()
        for states in [loop["random"], *loop.get("random_of_others", ())][rank : rank + 1]:
            _set_random_states(states)


def random_states() -> dict[str, Any]:
    """The states of this process's generators, of Python, NumPy and PyTorch."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),  # what `weights_only` loads
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _forget_cached(path: Path) -> None:
    """Have the next reading come from the disk, where the system knows how."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
