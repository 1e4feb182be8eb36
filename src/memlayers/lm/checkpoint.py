"""Checkpoints: a run's state on disk, from which it goes on as if it had never stopped.

checkpoints/step-00000240/     appears by a rename, once all of it is on the disk
    checkpoint.json            sealed (`memlayers.files`): the step, the run's configuration and figures, and the
                               size and SHA-256 of every other file; written last
    model.safetensors ...      the model, as `save_pretrained` writes it: each table once, streamed from where it is
    optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json    as `transformers.Trainer` names them
    usage.safetensors          hits since the last line of usage figures
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from memlayers.files import file_sha256, flush, new_folder, read_sealed, write_sealed

FORMAT = 1
DESCRIPTION = "checkpoint.json"


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
            files = {path.relative_to(aside).as_posix(): path for path in sorted(aside.rglob("*")) if path.is_file()}
            hashes = {name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in files.items()}
            write_sealed(aside / DESCRIPTION, {"format": FORMAT, "step": step, **content, "files": hashes})
            for path in files.values():
                flush(path)
                _forget_cached(path)
            self._read(aside, step)
        for _, older in sorted(self._complete())[: -self.keep]:
            _remove(older)
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
        if content["format"] != FORMAT:
            raise ValueError(
                f"{folder} is a checkpoint of format {content['format']!r}, this version reads format {FORMAT}"
            )
        if content["step"] != step:
            raise ValueError(f"{folder / DESCRIPTION} is damaged: it is of step {content['step']}, another checkpoint")
        for name, expected in content["files"].items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path} is damaged: it is missing")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise ValueError(f"{path} is damaged: it has {size} bytes, {expected['bytes']} were written")
            if file_sha256(path) != expected["sha256"]:
                raise ValueError(f"{path} is damaged: it is not what was written (its SHA-256 does not fit)")
        return Checkpoint(folder, content["step"], content)


def _remove(folder: Path) -> None:
    """Under another name first, so that a process that is killed here leaves no half of a checkpoint."""
    aside = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, aside)
    shutil.rmtree(aside)


def _forget_cached(path: Path) -> None:
    """Have the next reading come from the disk, where the system knows how."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
