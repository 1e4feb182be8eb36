"""How files reach the disk, and how it is known that they still are what was written.

Written aside, flushed, then moved into place, so that nothing is ever half there:

    file_aside  write_text  write_json        one file
    new_folder  move_into_place               a folder that appears whole
    replaced_together  finish_replacing       files of a folder that stays

Believed only as written: a sealed file is JSON whose first entry is the SHA-256 of the file itself, with zeros in its
place; it holds what `describe_files` says of the files beside it, and `verify_files` compares.

    write_sealed  read_sealed  read_if_whole
    describe_files  verify_files  find_damage  path_below  refuse_others

`sole_user` keeps other processes out of a folder meanwhile.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from memlayers.console import tell

# --- Written aside, then moved


@contextmanager
def file_aside(file: Path) -> Iterator[Path]:
    """Give a path to write to; what is written there takes the place of `file` once it is on the disk.

    An error inside leaves `file` as it was. A process that is killed leaves `.<name>.partial` behind, which nothing
    reads and the next writing overwrites.
    """
    aside = file.with_name(f".{file.name}.partial")
    try:
        yield aside
        flush(aside)
        os.replace(aside, file)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    flush(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write text so that `file` holds either what it held before or all of `text`."""
    with file_aside(file) as aside:
        aside.write_bytes(text.encode())


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON so that `file` holds either what it held before or all of `content`."""
    write_text(file, json.dumps(content, indent=2) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the name `folder` once all that it holds is on the disk.

    An error removes it, the renaming included (`OSError` if the name is taken by then). A process that is killed
    leaves `.<name>.<random>.partial` behind, which nothing reads.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    aside.mkdir()
    try:
        yield aside
        move_into_place(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def move_into_place(aside: Path, folder: Path) -> None:
    """Give the folder `aside` the name `folder`, with all that it holds on the disk."""
    _flush_all(aside)
    os.rename(aside, folder)
    flush(folder.parent)


# Those of the files that describe the others: with the first of them that was there, a save has taken place.
DESCRIBING = ("config.json", "memory_config.json")
_JOURNAL = ".journal.json"


@contextmanager
def replaced_together(folder: str | os.PathLike[str], *, stale: str = "") -> Iterator[Path]:
    """Give a folder to write into; its files replace those of the same name in `folder` once all are on the disk.

    Of several that save to one folder each waits for those before it. An error inside leaves the files of `folder` as
    they were. A process that is killed leaves them so, too, or all of the new ones to whoever reads the folder next:
    files move from a folder beside them, the one that describes the others first, and readers `finish_replacing`. A
    new folder gets ``config.json`` last, so that one which has it is complete.

    Args:
        stale: A pattern. If files were written whose names match it, others of such names in `folder` are removed.

    Raises:
        ValueError: `folder` is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"the folder to save to must be none or a folder, got the file {str(target)!r}")
    target.mkdir(parents=True, exist_ok=True)
    with sole_user(target, waiting=f"waiting for another save to {target}"):
        _finish(target)
        for left in target.glob(".saving-*"):  # by a process that was killed: nobody else is here
            shutil.rmtree(left)
        token = secrets.token_hex(4)
        aside = target / f".saving-{token}"  # inside, so on the same file system: moves are atomic
        ready = target / f".saved-{token}"
        aside.mkdir()
        try:
            shutil.copymode(target, aside)  # which says who may read the files
            yield aside
            names = sorted(path.name for path in aside.iterdir())
            others = [path.name for path in target.iterdir() if re.fullmatch(stale, path.name)]
            others = [name for name in others if name not in names and any(re.fullmatch(stale, new) for new in names)]
            first = next((name for name in DESCRIBING if name in names and (target / name).exists()), "")
            (aside / _JOURNAL).write_text(json.dumps({"first": first, "stale": others}))
            _flush_all(aside)
            os.rename(aside, ready)
            if first:
                os.replace(ready / first, target / first)
            flush(target)
            _finish(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):
                _finish(target)  # which of the two it is, the interrupted move says
            raise


def finish_replacing(folder: Path) -> None:
    """Move what a save that broke off in the middle has left, before anything in `folder` is read.

    Raises:
        ValueError: There is something to be moved, and it cannot be.
    """
    if not any(folder.glob(".saved-*")):
        return
    try:
        with sole_user(folder, waiting=f"waiting for a save to {folder}"):
            _finish(folder)
    except OSError as error:
        raise ValueError(
            f"{folder} holds a save that broke off half-way, of which the rest cannot be moved into place ({error}): "
            f"load it once where it may be written to"
        ) from error


def _finish(target: Path) -> None:
    """Move the files of a save, of which the one that describes the others has been moved; remove one where it was not.

    For who holds `target` alone.
    """
    for ready in target.glob(".saved-*"):
        try:
            journal = json.loads((ready / _JOURNAL).read_bytes())
            first, stale = ready / journal["first"], [path_below(target, name) for name in journal["stale"]]
            if ready.is_symlink():
                raise ValueError("it is a link")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{ready} must be what a save has left, which it is not: remove it ({error})") from None
        if not first.is_file():
            names = [path.name for path in ready.iterdir() if path.name != _JOURNAL]
            for name in sorted(names, key=lambda name: (name == DESCRIBING[0], name)):
                os.replace(ready / name, target / name)
            for path in stale:
                path.unlink(missing_ok=True)
            flush(target)
        left = ready.with_name(ready.name.replace("saved", "saving", 1))  # half of it gone, it would say something else
        os.rename(ready, left)
        shutil.rmtree(left)
        flush(target)


def remove_folder(folder: Path) -> None:
    """Remove a folder, under the name `.<name>.removed`: a process that is killed here leaves no half of it."""
    aside = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, aside)
    shutil.rmtree(aside)


_WINDOWS = os.name == "nt"  # flushes through what may write alone, and no folders


def flush(path: Path) -> None:
    """Have the system write a file's content, or a folder's list of names, to the disk."""
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    """Flush a folder and all below it; its files can be read by whom the folder can."""
    mode = folder.stat().st_mode & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:  # safetensors keeps its files from others
            path.chmod(mode)
        flush(path)


# --- What was written

SEAL = "0" * 64


def write_sealed(file: Path, content: dict[str, Any]) -> None:
    """Write JSON that `read_sealed` believes; `content` has no ``sha256`` of its own."""
    assert "sha256" not in content
    text = json.dumps({"sha256": SEAL, **content}, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(file, text.replace(SEAL, digest, 1))


def read_sealed(file: Path) -> dict[str, Any]:
    """Return what `write_sealed` wrote, without the seal.

    Raises `ValueError` naming the file if it is not there, or if a single bit of it has changed since.
    """
    try:
        content = _unsealed(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if content is None:
        raise ValueError(f"{file} is damaged: it is not what was written (its own SHA-256 does not fit)")
    return content


def read_if_whole(file: Path) -> dict[str, Any]:
    """Return what `write_sealed` wrote; an empty dictionary if the file is not there or damaged.

    For what is made again then. Raises `OSError` naming a file that is there and cannot be read: a disk that fails for
    a moment must not cost finished work.
    """
    try:
        with _named_errors(file):
            return _unsealed(file.read_bytes()) or {}
    except FileNotFoundError:
        return {}


def _unsealed(raw: bytes) -> dict[str, Any] | None:
    opening = b'{\n "sha256": "'
    seal = raw[len(opening) : len(opening) + len(SEAL)]
    zeroed = raw[: len(opening)] + SEAL.encode() + raw[len(opening) + len(SEAL) :]
    if not raw.startswith(opening) or hashlib.sha256(zeroed).hexdigest().encode() != seal:
        return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):  # the seal is no secret
        return None
    del content["sha256"]
    return content


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal. Raises `OSError` naming a file that cannot be read."""
    with _named_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return ``bytes`` and ``sha256`` of files by their paths below `folder`: of all, or of those in `names`."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = {name: path_below(folder, name) for name in names}
    hashes = _hash_files(paths.values())
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(paths.items(), hashes, strict=True)
    }


def verify_files(
    folder: Path,
    described: Mapping[str, Mapping[str, Any]],
    *,
    checked: Callable[[str], object] = lambda name: None,
    links: bool = False,
) -> None:
    """Compare files with what `describe_files` said of them.

    Args:
        checked: Is called with the name of each file that is right.
        links: Whether a file may be a link out of `folder`, for names that are known to be no paths.

    Raises:
        ValueError: Names the file and what is wrong with it (`find_damage`), or a path that leaves `folder`.
        OSError: A file is there and cannot be read.
    """
    with closing(find_damage(folder, described, checked=checked, links=links)) as found:
        for name, damage in found:
            raise ValueError(f"{folder / name} is damaged: {damage}")


def find_damage(
    folder: Path,
    described: Mapping[str, Mapping[str, Any]],
    *,
    checked: Callable[[str], object] = lambda name: None,
    links: bool = False,
) -> Generator[tuple[str, str]]:
    """Yield each file that is not as described, and what is wrong with it; missing and cut off ones before any is read.

    A description without ``bytes`` is one of the hash alone. Raises as `verify_files` does, but for the damage.
    """
    if not all(isinstance(entry, Mapping) and isinstance(entry.get("sha256"), str) for entry in described.values()):
        raise ValueError(f"{folder} is damaged: what should describe its files does not")
    paths = {name: folder / name if links else path_below(folder, name) for name in described}
    for name, path in list(paths.items()):
        if damage := _wrong_size(path, described[name].get("bytes")):
            del paths[name]
            yield name, damage
    for name, digest in zip(paths, _hash_files(paths.values()), strict=True):
        if digest == described[name]["sha256"]:
            checked(name)
        else:
            yield name, "it is not what was written (its SHA-256 does not fit)"


def path_below(folder: Path, name: object) -> Path:
    """Return the path of `name` in `folder`, for every name that was read from a file.

    Raises `ValueError` unless it lies there: for an absolute path, a drive, ``..`` or a zero byte, on any system, and
    for a link that leads out. (The Hub's cache is made of such links, from ``snapshots`` to the ``blobs`` beside it.)
    """
    parts = PureWindowsPath(name) if isinstance(name, str) else PureWindowsPath()  # which knows both separators
    if not parts.parts or parts.anchor or ".." in parts.parts or "\0" in str(name):
        raise ValueError(f"{folder} is damaged: {name!r} is not the path of a file in it")
    path = folder / str(name)
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    if not any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(home)) for home in homes):
        raise ValueError(f"{folder} is damaged: {name!r} is a link to outside of it, put the file itself there")
    return path


# What libraries load unasked where it lies: weights, configurations, code.
_LOADED = (".bin", ".json", ".pt", ".pth", ".py", ".safetensors")


def refuse_others(folder: Path, names: Collection[str]) -> None:
    """Raise `ValueError` naming a file of `folder` that a library might load and that is none of `names`."""
    for path in sorted(folder.iterdir()):
        if path.name not in names and path.name.endswith(_LOADED):
            raise ValueError(f"{folder} is damaged: {path.name!r} was not written with the files in it, take it away")


def _wrong_size(path: Path, size: int | None) -> str:
    if not path.is_file():
        return "it is missing"
    found = path.stat().st_size
    return "" if size is None or found == size else f"it has {found} bytes, {size} were written"


def _hash_files(files: Iterable[Path]) -> Iterator[str]:
    """Yield the SHA-256 of each file in turn; several are read at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        try:
            yield from pool.map(file_sha256, files)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Give an `OSError` the name of the file, which one of reading, not of opening, lacks."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from None


# --- Alone

# What file systems without locks answer; EBADF is that of NFS, which locks only what is opened for writing.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL)


@contextmanager
def sole_user(folder: Path, *, waiting: str = "") -> Iterator[None]:
    """Hold `folder` for this process, whose end, however it comes, frees it.

    Nothing is held where the system or the file system has no locks.

    Args:
        waiting: Printed on stderr if another process holds the folder; then this one waits for it.

    Raises:
        ValueError: Another process holds the folder, and there is no `waiting`.
        FileNotFoundError: The folder is not there, or the process that held it gave it another name.
    """
    try:
        import fcntl  # which Windows lacks
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                raise ValueError(
                    f"output must be a folder that no other process writes to, got {str(folder)!r}"
                ) from None
            tell(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, "given another name by the process that held it", str(folder))
        yield
    finally:
        os.close(descriptor)
