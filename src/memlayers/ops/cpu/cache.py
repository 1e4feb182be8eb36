"""Compiled kernels on disk: one file a kernel, which is believed only as it was written.

A file is the SHA-256 of the rest and the rest, which is a pickle; so it lies in a folder that nobody else can write to.
A damaged one is compiled again and replaced. Where there is no such folder, or no room, kernels are compiled in memory,
which is said once. Numba's own cache does neither: a file that a power loss cut off is a traceback at every start.
"""

import functools
import gc
import hashlib
import os
import pickle
import platform
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from memlayers.console import announce
from memlayers.files import flush

_DIGEST = hashlib.sha256().digest_size


def compile_kept(function, signature, options: dict, sources: str) -> Any:
    """`numba.cfunc` of a function, from the disk if it is there; `sources` stands for all that is compiled into it."""
    compiled: Any = CFunc(function, normalize_signature(signature), locals={}, options=options)
    compiled._cache = _Cache(f"{function.__module__.rpartition('.')[2]}.{function.__name__}", sources)
    with _without_collector():
        compiled.compile()
    return compiled


@contextmanager
def _without_collector() -> Iterator[None]:
    """Numba makes millions of objects and hardly a cycle, and each collection would look through all that is there."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Cache:
    """What Numba asks for the code of one kernel, and gives it to."""

    def __init__(self, name: str, sources: str) -> None:
        self._name, self._sources = name, sources

    def load_overload(self, signature, context) -> CompileResult | None:
        """The compiled kernel, or None."""
        folder = cache_folder()
        if folder is None:
            return None
        context.refresh()
        try:
            raw = _read_own(folder / self._file(signature, context.codegen()))
            if hashlib.sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
                return None
            return CompileResult._rebuild(context, *pickle.loads(raw[_DIGEST:]))
        except Exception:  # there is none, or it is of no use: compiled again
            return None

    def save_overload(self, signature, compiled) -> None:
        """Keep it for the next process."""
        folder = cache_folder()
        if folder is None or compiled.library.has_dynamic_globals:
            return
        content = dumps(compiled._reduce())
        file = folder / self._file(signature, compiled.codegen)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            try:
                with open(aside, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
                    stream.write(hashlib.sha256(content).digest() + content)
                flush(aside)
                os.replace(aside, file)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            _tell_once(f"{folder} cannot be written to: {error.strerror}")

    def _file(self, signature, codegen) -> str:
        """A name that is another one for all that gives other code."""
        versions = numba.__version__, llvmlite.__version__, platform.python_version(), sys.implementation.cache_tag
        key = repr((self._sources, str(signature), codegen.magic_tuple(), versions))
        return f"{self._name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.code"


def _read_own(file: Path) -> bytes:
    """The bytes of a file that is this user's own."""
    with file.open("rb") as stream:
        if not _is_own(os.fstat(stream.fileno())):
            raise PermissionError(f"{file} belongs to somebody else")
        return stream.read()


def _is_own(found: os.stat_result) -> bool:
    """Whether nobody but this user can write to it, where the system knows."""
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def cache_folder() -> Path | None:
    """The folder of compiled kernels: `memlayers` in ``NUMBA_CACHE_DIR``, else in the user's folder for caches."""
    parent = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    if not parent and sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA")
    return _made(Path(parent or "~/.cache") / "memlayers" / "kernels")


@functools.cache
def _made(folder: Path) -> Path | None:
    """The folder, made if it is not there; None where it cannot be, or is not this user's alone."""
    try:
        folder = folder.expanduser()
        for place in (folder.parent, folder):  # each with this mode, whatever the user's mask is
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (folder, folder.parent):
            found = place.lstat()
            if not stat.S_ISDIR(found.st_mode) or not _is_own(found):
                raise PermissionError(None, "others can write to it, or it belongs to another user")
        folder.chmod(0o700)
        with suppress(FileNotFoundError):  # another process has just removed what this one wrote
            probe = folder / f".probe.{os.getpid()}"
            probe.write_bytes(b"")  # access rights do not say all
            probe.unlink()
    except (OSError, RuntimeError) as error:  # the latter: no home folder
        _tell_once(f"{folder} cannot be used: {getattr(error, 'strerror', None) or error}")
        return None
    return folder


@functools.cache
def _said() -> list[str]:
    return []


def _tell_once(why: str) -> None:
    if not _said():
        _said().append(why)
        announce(f"kernels are compiled in memory, each process anew, for {why}. NUMBA_CACHE_DIR names another folder")
