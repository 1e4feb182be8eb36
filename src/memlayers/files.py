"""How files reach the disk: written aside, flushed, then moved into place, so that nothing is ever half there."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON so that `file` holds either what it held before or all of `content`."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write text so that `file` holds either what it held before or all of `text`."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    os.replace(aside, file)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `folder` once all that it holds is on the disk.

    It is removed if anything fails, the renaming included (`OSError` if the name is taken by then). A process that is
    killed leaves `.<name>.<random>.partial` behind, which nothing reads.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    aside.mkdir()
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            flush(path)
        os.rename(aside, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """A file's content, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
