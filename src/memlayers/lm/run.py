"""RunFolder: where the parts of one run lie on disk, and how they are written and read back."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayers.files import new_folder, write_json
from memlayers.lm.config import RunConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_output(path: Path) -> None:
    """Raises `ValueError` if `path` is no folder that results can go to, nor can become one; leaves it as it is."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output must be a folder, got the file {str(path)!r}")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output must be a folder that can be made, got {str(path)!r}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"output must be a folder that can be written to, got {str(path)!r}")
    for folder in missing:
        folder.rmdir()


class RunFolder:
    """A folder that holds one run.

    ========================  =======================================================================
    ``config.json``           the resolved configuration; written first, so it marks a run that began
    ``metrics.jsonl``         one line per log entry and per evaluation
    ``tensorboard/``          the same for TensorBoard
    ``model/``                the trained model and its tokenizer, as `save_pretrained` writes them
    ``result.json``           metrics, configuration, versions, hardware; written last: a finished run
    ========================  =======================================================================
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.result = self.path / "result.json"

    @property
    def begun(self) -> bool:
        """Whether the folder holds anything of a run."""
        return any(part.exists() for part in self._parts())

    @property
    def finished(self) -> bool:
        """Whether the folder holds a run that came to its end."""
        return self.result.is_file()

    def check(self, *, overwrite: bool = False) -> None:
        """Raises `ValueError` if the folder cannot be, or holds a run already that may not be overwritten."""
        check_output(self.path)
        if self.begun and not overwrite:
            state = "a finished run" if self.finished else "a run that did not finish"
            raise ValueError(
                f"output must be a folder without a run, got {str(self.path)!r}, which holds {state}; "
                "choose another one, or allow it to be overwritten"
            )

    def start(self, config: RunConfig, *, overwrite: bool = False) -> None:
        """Make the folder ready for a run: `check` it, remove the run that may be overwritten, write `config.json`."""
        self.check(overwrite=overwrite)
        for part in self._parts():  # the result goes first: from here on the old run is not a finished one
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, config.to_dict())

    def read_config(self) -> RunConfig:
        """The configuration of the run. Raises `ValueError` if the folder holds no run."""
        return RunConfig.from_dict(self._read(self.config))

    def read_result(self) -> dict[str, Any]:
        """What `result.json` says. Raises `ValueError` if the folder holds no finished run."""
        return self._read(self.result)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def save_model(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Write the model and its tokenizer; the folder `model/` appears only once it is complete."""
        with new_folder(self.model) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def load_model(self, device: "torch.device | str" = "cpu") -> "PreTrainedModel":
        """The trained model, in evaluation mode. Raises `ValueError` if there is none."""
        from transformers import AutoModelForCausalLM

        import memlayers.models  # noqa: F401  (registers the classes of models with memories)

        if not self.model.is_dir():
            raise ValueError(f"run must be the folder of a finished run, got {str(self.path)!r}: it has no model/")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model)
        model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
        return model.eval()

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that the model was trained with."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def _parts(self) -> list[Path]:
        return [self.result, self.model, self.tensorboard, self.metrics, self.config]

    def _read(self, file: Path) -> dict[str, Any]:
        if not file.is_file():
            raise ValueError(f"run must be the folder of a run, got {str(self.path)!r}: it has no {file.name}")
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{str(file)!r} must be JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{str(file)!r} must hold one JSON object, got {type(content).__name__}")
        return content
