"""`open_saved` says what a folder holds, and `Saved` loads model and tokenizer, whoever wrote them.

A folder is that of a run, of a checkpoint in one, of `save_pretrained`, or of `save_memory` (its base is elsewhere).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from memlayers.lm.checkpoint import DESCRIPTION, Checkpoints
from memlayers.lm.config import RunConfig
from memlayers.lm.data import open_corpus
from memlayers.lm.run import RunFolder
from memlayers.lm.saved import load_model
from memlayers.models import load_memory
from memlayers.models.folder import MEMORY_CONFIG_NAME, holds_memory_alone, is_hub_id, read_description
from memlayers.models.storage import Values

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")  # one of them is there


@dataclass(frozen=True)
class Saved:
    """A model on disk."""

    folder: Path  # of its files
    run: RunFolder | None = None  # the finished run that it is of
    config: RunConfig | None = None  # of the run that trained it
    corpus: str | None = None  # folder of the text that it was trained on
    tokenizer_sha256: str | None = None
    base: str | None = None  # of a memory alone: where its base is
    is_moved: bool = False  # whether it is elsewhere than when the memory was added
    values: Values = "memory"  # where its tables shall be

    def load(self) -> PreTrainedModel:
        """The model, on the CPU, in evaluation mode. Raises `ValueError` if it is damaged, or its base is not there."""
        if self.run is not None:
            self.run.verify_model()
        if self.base is None or not self.is_moved:
            return load_model(self.folder, **({} if self.values == "memory" else {"values": self.values}))
        base = load_model(model_folder(self.base))
        return load_memory(base, self.folder, values=self.values).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model. Raises `ValueError` if there is none."""
        found = self.find_tokenizer()
        if found is None:
            raise ValueError(
                f"the folder must hold the tokenizer of its model, too, got {str(self.folder)!r} with none: save it "
                f"there by tokenizer.save_pretrained"
            )
        return found

    def find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the model, beside its base, or of its corpus; None if there is none."""
        if self.run is not None:
            self.run.verify_model()
        for folder in (self.folder, *([] if self.base is None else [model_folder(self.base)])):
            if any((folder / name).is_file() for name in TOKENIZERS):
                return AutoTokenizer.from_pretrained(folder)
        if self.corpus is not None and Path(self.corpus).is_dir():
            return open_corpus(self.corpus).tokenizer()
        is_on_the_hub = self.base is not None and not Path(self.base).is_dir()
        return AutoTokenizer.from_pretrained(self.base) if is_on_the_hub else None


def open_saved(
    folder: str | Path, *, base: str | None = None, values: Values = "memory", field: str = "checkpoint"
) -> Saved:
    """What a folder holds. Raises `ValueError`, which names the option `field`, if it is no model.

    base: Where the base of a memory alone is; None: where it was when the memory was added.
    values: As of `memlayers.load_memory`.
    """
    folder = Path(folder)
    run = RunFolder(folder)
    found: dict[str, Any] = {}
    if run.finished:
        data = run.read_result()["data"]
        found = {"run": run, "config": run.read_config(), "corpus": data.get("folder")}
        found["tokenizer_sha256"] = data.get("tokenizer_sha256")
        folder = run.model
    elif (folder / DESCRIPTION).is_file():
        content = Checkpoints(folder.parent).named(folder.name).content
        try:
            found = {"config": RunConfig.from_dict(content["config"])}
            found["tokenizer_sha256"] = content["data"].get("tokenizer_sha256")
        except (KeyError, ValueError) as error:
            raise ValueError(f"{folder / DESCRIPTION} is of another version: {error}") from error
        if found["config"].tables_in_files:
            raise ValueError(
                f"{field} must hold its tables, got {str(folder)!r} of a run whose tables are in files "
                f"({found['config'].memory_values}): let the run end (--resume), and name the run"
            )
        # A checkpoint does not say where its text is; without being told, a run puts it beside its own folder.
        found["corpus"] = str(folder.absolute().parents[2] / "corpus")
    elif run.checkpoints.is_dir() or run.is_run:
        raise ValueError(
            f"{field} must be the folder of a finished run, got {str(folder)!r}, which did not finish; name one of its "
            f"checkpoints in {str(run.checkpoints)!r}"
        )
    elif not (folder / "config.json").is_file():
        of_a_module = (folder / MEMORY_CONFIG_NAME).is_file()
        what = ", which has a memory of a module that is not of transformers: load_memory(model, folder)"
        raise ValueError(
            f"{field} must be the folder of a run, of a checkpoint in one, or of a saved model, got {str(folder)!r}"
            f"{what if of_a_module else ''}"
        )
    if not holds_memory_alone(folder / MEMORY_CONFIG_NAME):
        for name, value, usual in (("base", base, None), ("memory_values", values, "memory")):
            if value != usual:
                raise ValueError(
                    f"{name} must be {usual or 'left out'} for a folder with a whole model, got {value!r} for "
                    f"{str(folder)!r}: it is for one with a memory alone (save_memory)"
                )
        return Saved(folder, **found)
    known = read_description(folder).base.name_or_path
    place = known if base is None else base
    if not (place and Path(place).is_dir()) and (base is not None or not is_hub_id(place)):
        raise ValueError(
            f"base must be the folder of the model that the memory in {str(folder)!r} was added to, got {place!r}, "
            f"which is not there: --base FOLDER"
        )
    return Saved(folder, **found, base=place, is_moved=base is not None, values=values)


def model_folder(place: str) -> Path:
    """The folder of a model: of that of a finished run, or the folder itself. Raises `ValueError` for a damaged run."""
    run = RunFolder(place)
    if not run.finished:
        return Path(place)
    run.verify_model()
    return run.model
