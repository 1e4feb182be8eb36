"""The folder in which a corpus is made: beside the one it becomes, with a name that the next run finds again."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memlayers.files import flush

try:
    import fcntl
except ImportError:  # Windows: nothing holds a second run back
    fcntl = None  # type: ignore[assignment]


@contextmanager
def working_folder(folder: Path) -> Iterator[Path | None]:
    """`.<name>.partial` beside `folder`, held by this process alone; None if `folder` is there by then.

    Waits while another process holds it, and says so once. The end of a process, however it comes, frees it.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    said = False
    while True:
        aside.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield None if is_occupied(folder) else aside
            return
        try:
            descriptor = os.open(aside, os.O_RDONLY)
        except FileNotFoundError:
            continue  # finished, or given up, by another process a moment ago
        try:
            if not _lock_now(descriptor):
                if not said:
                    print(f"waiting for another process that prepares {folder}", file=sys.stderr, flush=True)
                    said = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_same(descriptor, aside):  # else it was finished or given up by the process that held it
                if is_occupied(folder):
                    remove_if_empty(aside)
                    yield None
                else:
                    yield aside
                return
        finally:
            os.close(descriptor)
        if is_occupied(folder):
            yield None
            return


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without such locks.
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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


def publish(aside: Path, folder: Path) -> None:
    """Give `aside` the name `folder`, with all that it holds on the disk."""
    for path in (*aside.rglob("*"), aside):
        flush(path)
    os.rename(aside, folder)
    flush(folder.parent)
