"""Folders with a memory alone for `from_pretrained`: which are, and the base that their memory belongs to."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from memlayers.files import finish_replacing
from memlayers.models.folder import (
    MEMORY_CONFIG_NAME,
    Description,
    holds_memory_alone,
    is_damaged_memory,
    local_folder,
)

# Options of `from_pretrained` that say where a folder is,
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# and those that a configuration has a field for, but that are no changes of it.
OPTIONS_OF_MODELS = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "generation_config")


def find_memory_alone(name: str | os.PathLike[str], *, subfolder: str = "", **hub: Any) -> Path | None:
    """The folder, fetched if it is on the Hub, if `name` is a memory without its base; None if it is anything else."""
    found: Any
    if os.path.isdir(name):
        found = Path(name) / subfolder / MEMORY_CONFIG_NAME
        finish_replacing(found.parent)
        if found.parent.is_dir() and is_damaged_memory(found.parent):
            return found.parent  # and `read_description` says what is wrong with it
    else:
        found = cached_file(
            name,
            MEMORY_CONFIG_NAME,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
    if found is None or not holds_memory_alone(Path(found)):
        return None
    return local_folder(name, subfolder=subfolder, **hub)


def load_base(folder: Path, description: Description, plain_class: Any, config: Any, **options: Any) -> Any:
    """The base that the memory in `folder` belongs to, from where it was loaded when the memory was added.

    `config` says what the memory's ``config.json`` says, and `options` is what `from_pretrained` takes. Raises
    `ValueError` if nobody knows where the base is, or it is not there.
    """
    name = description.base.name_or_path
    advice = f"build the base, a {plain_class.__name__}, and call load_memory(model, {str(folder)!r})"
    if not name:
        raise ValueError(
            f"base of {folder / MEMORY_CONFIG_NAME} must have a name_or_path for from_pretrained, got ''; {advice}"
        )
    plain: Any = copy.deepcopy(config)
    if hasattr(plain, "without_memory"):
        plain = plain.without_memory()
    hub = {key: options[key] for key in ("cache_dir", "local_files_only", "token") if key in options}
    try:
        # A base that is stored quantised is loaded as such.
        stored, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if "quantization_config" in stored:
            plain.quantization_config = stored["quantization_config"]
        size = getattr(plain, "vocab_size", None)
        if stored.get("vocab_size", size) != size:
            raise ValueError(
                f"base {name!r} must have the {size} embeddings of the one that this memory was added to, got "
                f"{stored['vocab_size']}; {advice}"
            )
        return plain_class.from_pretrained(name, config=plain, **options)
    except OSError as error:
        raise ValueError(
            f"base {name!r}, which this memory was added to, cannot be loaded: {error}; {advice}"
        ) from error


@contextmanager
def saying_whose_memory(name: str | os.PathLike[str], description: Description, plain_class: type) -> Iterator[None]:
    """Raises what its block raises; for another class of models than the one that had the memory with the way there."""
    try:
        yield
    except ValueError as error:
        if description.base.class_name == plain_class.__name__:
            raise
        raise ValueError(
            f"the memory in {str(name)!r} was added to a {description.base.class_name}, not to a "
            f"{plain_class.__name__}: load it with that class and save it whole (save_pretrained), from where every "
            f"head can be loaded ({error})"
        ) from error
