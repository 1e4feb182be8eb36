"""RunFolder: where the parts of one run lie on disk, and how they are written and read back."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayers.files import (
    describe_files,
    new_folder,
    read_sealed,
    refuse_others,
    verify_files,
    write_json,
    write_sealed,
)
from memlayers.lm.config import RunConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlayers.lm.data import Corpus


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of `transformers` for saving and loading."""
    from transformers.utils import logging  # takes seconds to import

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def check_output(path: Path) -> None:
    """Raises `ValueError` if `path` is no folder that results can go to, nor can become one; nothing is made."""
    try:
        place, is_folder = _nearest(path.absolute())
    except OSError as error:
        raise ValueError(f"output must be a folder that can be made, got {str(path)!r}: {error.strerror}") from None
    is_there = place == path.absolute()
    if not is_folder:
        if is_there:
            raise ValueError(f"output must be a folder, got the file {str(path)!r}")
        raise ValueError(f"output must be a folder that can be made, got {str(path)!r}: {str(place)!r} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        if is_there:
            raise ValueError(f"output must be a folder that can be written to, got {str(path)!r}")
        raise ValueError(
            f"output must be a folder that can be made, got {str(path)!r}: {str(place)!r} cannot be written to"
        )


def _nearest(path: Path) -> tuple[Path, bool]:
    """The deepest part of `path` that is there, and whether it is a folder.

    Raises `OSError` for what cannot be looked at, and for names that are too long.
    """
    place = next(part for part in (path, *path.parents) if _is_there(part))
    for name in path.relative_to(place).parts:  # one that is too long is noticed only in a folder that is there
        _is_there(place / name)
    return place, place.is_dir()


def _is_there(path: Path) -> bool:
    try:
        path.lstat()  # a link to nothing is there: no folder can be made in its place
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class RunFolder:
    """A folder that holds one run.

    ========================  =======================================================================
    ``config.json``           the resolved configuration; written first, so it marks a run that began
    ``metrics.jsonl``         one line for each step; some have usage, rates and evaluations
    ``tensorboard/``          those figures for TensorBoard
    ``checkpoints/``          what an unfinished run goes on from (`memlayers.lm.checkpoint`)
    ``model/``                the trained model and its tokenizer, as `save_pretrained` writes them; beside a base that
                              is frozen the memories alone, as `save_memory` does
    ``result.json``           metrics, configuration, versions, hardware, hashes of the model's files; sealed, written
                              last: a finished run
    ``.replaced/``            the finished run that is overwritten, whole, until the new one is finished
    ``.replacing/``           the same while its parts are moved there, the result first
    ========================  =======================================================================
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.replaced = self.path / ".replaced"
        self.replacing = self.path / ".replacing"
        self.result = self.path / "result.json"

    @property
    def begun(self) -> bool:
        """Whether the folder holds anything of a run."""
        return any(part.exists() for part in self._parts())

    @property
    def finished(self) -> bool:
        """Whether the folder holds a run that came to its end."""
        return self.result.is_file()

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run, of this or of another version: its parts have names that others use, too."""
        for file, fields in ((self.config, {"model", "training"}), (self.result, {"config", "model_files"})):
            try:
                content = json.loads(file.read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(content, dict) and fields <= set(content):
                return True
        return False

    def check(self, *, overwrite: bool = False, resume: bool = False) -> None:
        """Raises `ValueError` if the folder cannot be, or holds a run that may neither be overwritten nor go on."""
        if overwrite and resume:
            raise ValueError("overwrite must be False to resume: a run either goes on or is replaced")
        check_output(self.path)
        if self.begun and not self.is_run:
            held = ", ".join(part.name for part in self._parts() if part.exists())
            raise ValueError(
                f"output must be the folder of a run or one without {held}, got {str(self.path)!r}, whose "
                f"{self.config.name} is missing or not that of a run: choose another one, or move them away yourself"
            )
        if self.begun and not overwrite and not resume:
            state = "a finished run" if self.finished else "a run that did not finish"
            raise ValueError(
                f"output must be a folder without a run, got {str(self.path)!r}, which holds {state}; choose another "
                f"one, {'' if self.finished else 'let it go on (--resume, resume=True), '}or have it "
                f"replaced (--overwrite, overwrite=True)"
            )

    def takes_the_place_of(self, path: str | Path) -> bool:
        """Whether a run that begins here moves or removes what lies at `path`: this folder, or in a part of the run."""
        place = Path(os.path.realpath(path))
        is_inside = any(place.is_relative_to(os.path.realpath(part)) for part in self._parts())
        return is_inside or place == Path(os.path.realpath(self.path))

    def start(self, config: RunConfig, *, overwrite: bool = False) -> None:
        """Make the folder ready for a run: `check` it, put aside the run that may be overwritten, write `config.json`.

        A finished run that is overwritten goes only when the new one is finished; a process that is killed while it
        puts it aside has the next start go on with that.
        """
        self.check(overwrite=overwrite)
        if self.finished:
            self.tidy()
            self.replacing.mkdir()
        if self.finished or (self.replacing / self.result.name).is_file():
            for part in self._parts():
                if part.exists():
                    os.replace(part, self.replacing / part.name)
            os.replace(self.replacing, self.replaced)
        for part in self._parts():
            if part.is_dir() and not part.is_symlink():  # what a link points to is not ours to remove
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, config.to_dict())

    def finish(self, result: dict[str, Any]) -> None:
        """Write `result.json`: from here on the run is finished. What only an unfinished one needs goes."""
        write_sealed(self.result, {**result, "model_files": describe_files(self.model)})
        self.tidy()

    def tidy(self) -> None:
        """Remove what a finished run has no more use for, and a process that was killed may have left.

        For who holds the folder alone (`memlayers.files.sole_user`). Leaves a run that is not finished as it is.
        """
        if self.finished:
            for folder in (self.checkpoints, self.replaced, self.replacing):
                shutil.rmtree(folder, ignore_errors=True)

    def read_config(self) -> RunConfig:
        """The configuration of the run. Raises `ValueError` if the folder holds no run, or one that cannot be read."""
        if self.finished:
            return _config_of(self.result, self.read_result()["config"])
        if not self.config.is_file():
            raise ValueError(f"run must be the folder of a run, got {str(self.path)!r}: it has no {self.config.name}")
        try:
            fields = json.loads(self.config.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.config} is damaged: {error}") from error
        return _config_of(self.config, fields)

    def read_result(self) -> dict[str, Any]:
        """What `result.json` says. Raises `ValueError` if the folder holds no finished run, or a damaged one."""
        if not self.finished:
            raise ValueError(f"run must be the folder of a run, got {str(self.path)!r}: it has no {self.result.name}")
        result = read_sealed(self.result)
        if missing := {"config", "data", "model_files"} - set(result):
            raise ValueError(f"{self.result} is of another version: it has no {min(missing)!r}")
        return result

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`. Raises `ValueError` naming the line that is damaged, or half written."""
        lines = []
        for number, line in enumerate(self.metrics.read_bytes().splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.metrics}, line {number}, is damaged: {error}") from error
        return lines

    def save_model(self, model: "PreTrainedModel", corpus: "Corpus") -> None:
        """Write the model and the tokenizer of its corpus; the folder `model/` appears only once it is complete."""
        from memlayers.lm.tables import mapped_tables  # imports torch, which takes seconds
        from memlayers.lm.weights import save_weights  # likewise

        for left in (self.model, *self.path.glob(f".{self.model.name}.*.partial")):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        for table in mapped_tables(model):
            table.fill()
            table.checkpoint(keep=len(table.checkpoints) + 1)  # a resumed run may go back from here
        with new_folder(self.model) as folder:
            with without_bars():
                save_weights(model, folder)
            corpus.save_tokenizer(folder)

    def load_model(self, device: "torch.device | str" = "cpu") -> "PreTrainedModel":
        """The trained model, in evaluation mode. Raises `ValueError` if there is none or it is damaged."""
        from memlayers.lm.saved import load_model  # imports transformers, which takes seconds

        self.verify_model()
        with without_bars():
            model = load_model(self.model)
        model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
        return model

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that the model was trained with."""
        from transformers import AutoTokenizer  # takes seconds to import

        self.verify_model()
        return AutoTokenizer.from_pretrained(self.model)

    def _parts(self) -> list[Path]:
        return [self.result, self.model, self.checkpoints, self.tensorboard, self.metrics, self.config]

    def verify_model(self) -> None:
        """Raises `ValueError` if there is no model of a finished run, or it is damaged."""
        if not self.finished:
            raise ValueError(f"run must be the folder of a finished run, got {str(self.path)!r}: it has no result.json")
        described = self.read_result()["model_files"]
        # Runs of 0.1.0 have the hash alone.
        verify_files(self.model, {n: {"sha256": d} if isinstance(d, str) else d for n, d in described.items()})
        refuse_others(self.model, described)


def _config_of(file: Path, fields: Any) -> RunConfig:
    try:
        return RunConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{file} is of another version: {error}") from error
