"""The format on disk: what a folder holds beside the weights of a whole model, and what one with a memory alone holds.

    memory_config.json   describes the memories
    memory.safetensors   the weights of a memory without its base
    README.md            the card of such a folder, for people and for the Hub
    modeling_memlayers.py    what `auto_map` names, for loading with ``trust_remote_code=True``

`save_pretrained` writes a `MemoryPlacement` to ``memory_config.json``; for a memory without its base it is a sealed
file, which also says what the base is and what the files of weights must be.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memlayers.files import finish_replacing, path_below, read_sealed, write_sealed
from memlayers.models.identity import BaseIdentity, require_fields
from memlayers.models.placement import MemoryPlacement
from memlayers.version import __version__

MEMORY_CONFIG_NAME = "memory_config.json"
FORMAT = 1
KEYS = ("format", "memlayers", "memory", "names", "base", "files")  # of the description
WEIGHTS = r"memory(-\d+-of-\d+)?\.safetensors"
WHOLE_MODEL = r"(pytorch_)?model([-.].*)?\.(safetensors|bin)"  # weights of a whole model
REMOTE_MODULE = "modeling_memlayers"
# `auto_map` in config.json points here: with trust_remote_code=True the Auto classes find the registered classes in a
# process that never imported memlayers. It holds no code of its own, so old folders get the installed library's fixes.
REMOTE_CODE = '''"""The classes of this model, for `trust_remote_code=True`. Needs `pip install "memlayers[lm]"`."""

from memlayers.models.classes import {names}  # noqa: F401
'''

CARD = "README.md"
# A card is replaced by the next save as long as this line has the digest of it, with zeros in the digest's place.
_DIGEST = "0" * 16
_OURS = f"<!-- Written by memlayers, {_DIGEST}: replaced by the next save, unless it was changed. -->"

_TEXT = """\
---
library_name: memlayers
{base_model}tags:
- memory-layer
- product-key-memory
---
{ours}

# A memory for {title}

{modules}, trained beside a base model that is not in here. Needs `pip install "memlayers[lm]"`.

```python
{load}
```

| | |
|---|---|
| kind | {kind} |
| mode | {mode} |
| at | {names} |
| slots of a table | {slots:,} of width {width} |
| tables | {tables} |
| read for a token, by a memory | {read} slots ({heads} heads, {topk} each) |
| parameters | {parameters:,} |
| base | {base} |
"""

_MODES = {"replace": "in place of each module", "parallel": "beside each module, behind a gate"}


def write_placement(folder: Path, placement: MemoryPlacement, auto_map: Mapping[str, str]) -> None:
    """Writes ``memory_config.json`` of a whole model, and the module that `auto_map` points to."""
    text = json.dumps(placement.to_dict(), indent=2) + "\n"
    (folder / MEMORY_CONFIG_NAME).write_text(text, encoding="utf-8")
    write_remote_code(folder, auto_map)


def write_remote_code(folder: Path, auto_map: Mapping[str, str]) -> None:
    """Writes the module that `auto_map` in ``config.json`` points to."""
    classes = ", ".join(sorted({place.rpartition(".")[2] for place in auto_map.values()}))
    (folder / f"{REMOTE_MODULE}.py").write_text(REMOTE_CODE.format(names=classes), encoding="utf-8")


@dataclass(frozen=True)
class Description:
    """What ``memory_config.json`` of a memory alone says."""

    placement: MemoryPlacement
    names: list[str]  # of the modules in whose places the memories are
    base: BaseIdentity
    files: dict[str, dict[str, Any]]  # of weights, as `memlayers.files.describe_files` describes them


def write_description(folder: Path, description: Description) -> None:
    """Writes ``memory_config.json`` of a memory alone, for `read_description`."""
    content = {
        "format": FORMAT,
        "memlayers": __version__,
        "memory": description.placement.to_dict(),
        "names": description.names,
        "base": description.base.to_dict(),
        "files": {name: {"size": file["bytes"], "sha256": file["sha256"]} for name, file in description.files.items()},
    }
    write_sealed(folder / MEMORY_CONFIG_NAME, content)


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
    except (OSError, ValueError, RecursionError):
        return None


def read_description(folder: Path) -> Description:
    """The inverse of `write_description`. Raises `ValueError` for what `save_memory` did not write, or not as it is."""
    finish_replacing(folder)
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
    content = read_sealed(config)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"format of {config} must be {FORMAT}, got {content.get('format')!r} of memlayers "
            f"{content.get('memlayers')}: a newer memlayers can load it"
        )
    if missing := [key for key in KEYS if key not in content]:
        raise ValueError(f"{config} must have the keys {', '.join(KEYS)}; {', '.join(missing)} is missing")
    names, files = content["names"], content["files"]
    try:
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"names must be a list of names of modules, got {names!r:.80}")
        if not isinstance(files, dict):
            raise ValueError(f"files must be a dictionary, got {files!r:.80}")
        for name, written in files.items():
            require_fields(f"files[{name!r:.80}]", written, size=int, sha256=str)
            if not re.fullmatch(WEIGHTS, name):
                raise ValueError(f"files must be named memory*.safetensors, got {name!r}")
        placement, base = MemoryPlacement.from_dict(content["memory"]), BaseIdentity.from_dict(content["base"])
    except ValueError as error:
        raise ValueError(f"{config} is no description that save_memory wrote: {error}") from None
    described = {name: {"bytes": written["size"], "sha256": written["sha256"]} for name, written in files.items()}
    return Description(placement, names, base, described)


def is_whole_model(folder: Path) -> bool:
    """Whether `folder` holds the weights of a whole model."""
    return any(re.fullmatch(WHOLE_MODEL, path.name) and path.is_file() for path in folder.iterdir())


FLOATS = ("F64", "F32", "F16", "BF16")  # as files of safetensors call them


TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool
}  # fmt: skip
PAGE = 4096  # bytes of a file that the system reads at once


def tensor_start(file: Path, name: str) -> int:
    """The byte of a file of safetensors where a tensor begins. The file was opened by `safe_open` before."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return 8 + size + header[name]["data_offsets"][0]


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of safetensors whose tables begin on a page: a row that fills one is read at once.

    Larger numbers come first, as the library's own files have them, and of those tables; the header is filled up with
    blanks. A table whose bytes fill no whole pages leaves those behind it where they come to lie.
    """
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), not _is_table(name), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, table_start = 0, None
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        table_start = start if table_start is None and _is_table(name) else table_start
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + (table_start or 0)) % PAGE)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].contiguous().view(-1)
            if flat.numel():
                opened.write(flat.view(torch.uint8).numpy().data)


def _is_table(name: str) -> bool:
    return name.endswith((".values.weight", ".values.codes", ".inputs.weight", ".inputs.codes"))


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    shape: list[int]
    dtype: str  # as in `FLOATS`


def stored_tensors(folder: Path, files: Iterable[str]) -> dict[str, Stored]:
    """The tensors in the files. Raises `ValueError` for a file that says nothing."""
    found = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no dictionary)
                    part = opened.get_slice(key)
                    found[key] = Stored(folder / name, list(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{folder / name} must be a file of safetensors ({error})") from None
    return found


def check_whole_model(folder: Path) -> None:
    """Raises `ValueError` for weights of memories that are no numbers, and for an index that leads out of `folder`.

    Before `transformers` casts the ones, and follows the other.
    """
    for path in folder.glob("*.safetensors.index*.json"):
        content = _content(path)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not (isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())):
            raise ValueError(f"{path} must have a weight_map, names of tensors and of their files")
        for name in set(shards.values()):
            path_below(folder, name)
    files = [path.name for path in folder.glob("*.safetensors") if re.fullmatch(WHOLE_MODEL, path.name)]
    for name, stored in stored_tensors(folder, files).items():
        part = name.rpartition(".")[2]
        if (
            ".memory." in name
            and part in ("weight", "bias", "running_mean", "running_var")
            and stored.dtype not in FLOATS
        ):
            raise ValueError(f"{name!r} in {stored.file} must be of {', '.join(FLOATS)}, got {stored.dtype}")
        if ".memory." in name and part in ("codes", "scales") and stored.dtype != "U8":
            raise ValueError(f"{name!r} in {stored.file} must be of U8, got {stored.dtype}")


def keeps_card(folder: Path) -> bool:
    """Whether `folder` has a card that somebody wrote or changed."""
    card = folder / CARD
    if not card.exists():
        return False
    text = card.read_bytes().decode(errors="replace")
    ours = re.search(_OURS.replace(_DIGEST, "([0-9a-f]{16})"), text)
    return ours is None or _signed(text.replace(ours[1], _DIGEST, 1)) != text


def _signed(text: str) -> str:
    return text.replace(_DIGEST, hashlib.sha256(text.encode()).hexdigest()[: len(_DIGEST)], 1)


def card(description: Description, parameters: int, *, auto_class: str | None) -> str:
    """The text of the card of a memory with so many parameters.

    `auto_class` is the class of `transformers` that loads base and memory at once.
    """
    placement, names, base = description.placement, description.names, description.base
    config, count = placement.config, len(names)
    is_public = is_hub_id(base.name_or_path) and not Path(base.name_or_path).exists()
    text = _TEXT.format(
        base_model=f"base_model: {base.name_or_path}\n" if is_public else "",
        ours=_OURS,
        title=base.name_or_path if is_public else f"a {base.class_name}",
        modules="A memory layer" if count == 1 else f"{count} memory layers",
        load=_loading(base, auto_class if is_public else None),
        kind=placement.kind,
        mode=f"{placement.mode}, {_MODES[placement.mode]}",
        names=", ".join(f"`{name}`" for name in names),
        slots=config.slots,
        width=config.width,
        tables="1, shared" if placement.share_values and count > 1 else count,
        read=config.heads * config.topk,
        heads=config.heads,
        topk=config.topk,
        parameters=parameters,
        # The path of a folder means nothing to others.
        base=base if is_public else f"a {base.class_name} in {base.dtype}",
    )
    return _signed(text)


def _loading(base: BaseIdentity, auto_class: str | None) -> str:
    if auto_class is not None:
        return (
            f"import memlayers.models  # or trust_remote_code=True below\n"
            f"from transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained("path/to/this/folder")'
        )
    return (
        f"from memlayers import load_memory\n\n"
        f"model = ...  # the base, a {base.class_name} with the weights that this was trained with\n"
        f'load_memory(model, "path/to/this/folder")'
    )
