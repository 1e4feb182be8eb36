"""The folder in which a corpus is made: beside the one it becomes, with a name that the next run finds again."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from memlayers.files import sole_user


@contextmanager
def working_folder(folder: Path) -> Iterator[Path | None]:
    """Give `.<name>.partial` beside `folder`, held by this process alone; None if `folder` is there by then.

    Waits while another process holds it, and says so. The end of a process, however it comes, frees it.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    with ExitStack() as held:
        while not is_occupied(folder):
            aside.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(sole_user(aside, waiting=f"waiting for another process that prepares {folder}"))
            except FileNotFoundError:  # finished, or given up, by the process that held it
                continue
            if not is_occupied(folder):
                yield aside
                return
            remove_if_empty(aside)
        yield None


def is_occupied(folder: Path) -> bool:
    """Whether there is anything that a new corpus would overwrite."""
    if folder.is_dir():
        return any(folder.iterdir())
    return folder.exists() or folder.is_symlink()


def keep_only(folder: Path, names: set[str]) -> None:
    """Remove everything in `folder` but these files and folders."""
    for path in folder.iterdir():
        if path.name in names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    if not any(folder.iterdir()):
        folder.rmdir()
