"""The folder that a memory alone is saved to: its description, its files, and whether they are what was written."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open

from memlayers.files import file_sha256, read_sealed
from memlayers.models.files import MEMORY_CONFIG_NAME

FORMAT = 1
KEYS = ("format", "memlayers", "memory", "names", "base", "files")  # of the description
WEIGHTS = r"memory(-\d+-of-\d+)?\.safetensors"
WHOLE_MODEL = r"(pytorch_)?model([-.].*)?\.(safetensors|bin)"  # weights of a whole model


def local_folder(folder: str | os.PathLike[str], *, subfolder: str = "", **hub: Any) -> Path:
    """`folder` itself if there is one, or else the files of a memory in a repository of the Hub, fetched.

    Raises `ValueError` for what is neither.
    """
    path = Path(folder)
    if path.is_dir():
        return path / subfolder
    if path.exists() or not (isinstance(folder, str) and is_hub_id(folder)):
        what = "a file" if path.exists() else "nothing"
        raise ValueError(f"folder must be a folder or a repository of the Hub, got {str(folder)!r}, which is {what}")
    inside = f"{subfolder}/" if subfolder else ""
    patterns = [f"{inside}{MEMORY_CONFIG_NAME}", f"{inside}memory*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(folder, allow_patterns=patterns, **hub)) / subfolder
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder must be a folder or a repository of the Hub, got {folder!r}: there is no such folder, and from "
            f"the Hub comes {type(error).__name__}: {error}"
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether a repository of the Hub may have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def holds_memory_alone(config: Path) -> bool:
    """Whether the file `config` is the description of a memory without its base."""
    content = _content(config)
    return isinstance(content, dict) and "base" in content


def is_damaged_memory(folder: Path) -> bool:
    """Whether `folder` must have been a memory without its base, and its description is lost or no longer one."""
    if is_whole_model(folder):
        return False
    config = folder / MEMORY_CONFIG_NAME
    return (config.is_file() and _content(config) is None) or any(
        re.fullmatch(WEIGHTS, path.name) for path in folder.iterdir()
    )


def lacks_memory(folder: Path) -> bool:
    """Whether nobody ever wrote a memory to `folder`."""
    return not folder.is_dir() or not any(folder.iterdir())


def _content(config: Path) -> Any:
    try:
        return json.loads(config.read_bytes())
    except (OSError, ValueError):
        return None


def read_description(folder: Path) -> dict[str, Any]:
    """What `save_memory` wrote about `folder`. Raises `ValueError` if it did not write it, or not as it is."""
    config = folder / MEMORY_CONFIG_NAME
    whole = is_whole_model(folder)
    if not config.is_file():
        hint = "; it holds a whole model: use from_pretrained" if whole else ""
        raise ValueError(
            f"folder must hold a memory that save_memory wrote, got {str(folder)!r} without {MEMORY_CONFIG_NAME}{hint}"
        )
    if whole and not holds_memory_alone(config):
        raise ValueError(
            f"folder must hold a memory that save_memory wrote, got {str(folder)!r} with a whole model that "
            f"save_pretrained wrote: use from_pretrained"
        )
    description = read_sealed(config)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"format of {config} must be {FORMAT}, got {description.get('format')!r} of memlayers "
            f"{description.get('memlayers')}: a newer memlayers can load it"
        )
    if missing := [key for key in KEYS if key not in description]:
        raise ValueError(f"{config} must have the keys {', '.join(KEYS)}; {', '.join(missing)} is missing")
    return description


def is_whole_model(folder: Path) -> bool:
    """Whether `folder` holds the weights of a whole model."""
    return any(re.fullmatch(WHOLE_MODEL, path.name) and path.is_file() for path in folder.iterdir())


def check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises `ValueError` for a file that is missing, or is not what was written."""
    for name, written in files.items():
        if not re.fullmatch(WEIGHTS, name):
            raise ValueError(f"files of {folder / MEMORY_CONFIG_NAME} must be named memory*.safetensors, got {name!r}")
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing; the memory needs {', '.join(files)}")
        if (size := file.stat().st_size) != written["size"]:
            raise ValueError(f"{file} is damaged: it must have {written['size']:,} bytes, got {size:,}")
    for name, written in files.items():  # sizes first: they cost nothing
        if (digest := file_sha256(folder / name)) != written["sha256"]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 must be {written['sha256']}, got {digest}")


def stored_tensors(folder: Path, files: Iterable[str]) -> dict[str, tuple[Path, list[int]]]:
    """Each tensor in the files: which it is in, and its shape. Raises `ValueError` for a file that says nothing."""
    found = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no dictionary)
                    found[key] = (folder / name, list(opened.get_slice(key).get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} must be a file of safetensors ({error})") from None
    return found
