"""How files reach the disk, and how it is known that they still are what was written.

Written aside, flushed, then moved into place, so that nothing is ever half there. A sealed file is JSON whose first
entry is the SHA-256 of the file itself, with zeros in its place: a description that lists the hashes of the files
beside it, and cannot be changed by accident either.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
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
    aside.write_bytes(text.encode())
    flush(aside)
    os.replace(aside, file)
    flush(file.parent)


SEAL = "0" * 64


def write_sealed(file: Path, content: dict[str, Any]) -> None:
    """Write JSON that `read_sealed` believes; `content` has no ``sha256`` of its own."""
    assert "sha256" not in content
    text = json.dumps({"sha256": SEAL, **content}, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(file, text.replace(SEAL, digest, 1))


def read_sealed(file: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the seal.

    Raises `ValueError` naming the file if it is not there, or if a single bit of it has changed since.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    opening = b'{\n "sha256": "'
    seal = raw[len(opening) : len(opening) + len(SEAL)]
    zeroed = raw[: len(opening)] + SEAL.encode() + raw[len(opening) + len(SEAL) :]
    if not raw.startswith(opening) or hashlib.sha256(zeroed).hexdigest().encode() != seal:
        raise ValueError(f"{file} is damaged: it is not what was written (its own SHA-256 does not fit)")
    content = json.loads(raw)
    del content["sha256"]
    return content


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
            if path.is_file():  # safetensors keeps its files from others
                path.chmod(aside.stat().st_mode & 0o666)
            flush(path)
        os.rename(aside, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def replaced_together(folder: str | os.PathLike[str], *, stale: str = "") -> Iterator[Path]:
    """A folder to write into, whose files replace those of the same name in `folder` once all are on the disk.

    If files were written whose names match the pattern `stale`, others of such names in `folder` go. An error inside
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
        if any(re.fullmatch(stale, name) for name in names):
            for path in target.iterdir():
                if path.name not in names and re.fullmatch(stale, path.name):
                    path.unlink()
        flush(target)
    finally:
        shutil.rmtree(aside)


_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without them answer


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises `ValueError` if another one does; its end, however it comes, frees it.

    Where the system or the file system has no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output must be a folder that no other process writes to, got {str(folder)!r}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


_WINDOWS = os.name == "nt"  # flushes through what may write alone, and no folders


def flush(path: Path) -> None:
    """A file's content, or a folder's list of names, onto the disk."""
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
