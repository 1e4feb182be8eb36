"""What a saved folder holds beside the weights, and how it is written: aside, flushed, then moved into place."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memlayers.files import flush

MEMORY_CONFIG_NAME = "memory_config.json"
REMOTE_MODULE = "modeling_memlayers"
# `auto_map` in config.json points here: with trust_remote_code=True the Auto classes find the registered classes in a
# process that never imported memlayers. It holds no code of its own, so old folders get the installed library's fixes.
REMOTE_CODE = '''"""The classes of this model, for `trust_remote_code=True`. Needs `pip install "memlayers[lm]"`."""

from memlayers.models.classes import {names}  # noqa: F401
'''


def write_identity(folder: Path, section: dict[str, Any], auto_map: Mapping[str, str]) -> None:
    """Writes ``memory_config.json`` (`section`: configuration and placement) and the module `auto_map` points to."""
    (folder / MEMORY_CONFIG_NAME).write_text(json.dumps(section, indent=2) + "\n", encoding="utf-8")
    write_remote_code(folder, auto_map)


def write_remote_code(folder: Path, auto_map: Mapping[str, str]) -> None:
    """Writes the module that `auto_map` points to."""
    names = ", ".join(sorted({place.rpartition(".")[2] for place in auto_map.values()}))
    (folder / f"{REMOTE_MODULE}.py").write_text(REMOTE_CODE.format(names=names), encoding="utf-8")


@contextmanager
def written_aside(folder: str | os.PathLike[str], *, replaces: str = "") -> Iterator[Path]:
    """Gives a folder to write into; its files replace those of the same name in `folder` once all are on disk.

    If files were written whose names match the pattern `replaces`, others of such names in `folder` go. An error inside
    leaves the files of `folder` as they were. No file is ever half-written; ``config.json`` comes last, so a new folder
    that has one is complete.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"the folder to save to must be none or a folder, got the file {str(target)!r}")
    target.mkdir(parents=True, exist_ok=True)
    # Inside, so on the same file system: moves are atomic.
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield aside
        names = sorted((path.name for path in aside.iterdir()), key=lambda name: (name == "config.json", name))
        for name in names:
            flush(aside / name)
        for name in names:
            os.replace(aside / name, target / name)
        if any(re.fullmatch(replaces, name) for name in names):
            for path in target.iterdir():
                if path.name not in names and re.fullmatch(replaces, path.name):
                    path.unlink()
        flush(target)
    finally:
        shutil.rmtree(aside)
