"""Whether a file is what was written. Only one that is not there, or differs, is not: one that cannot be read raises.

What is not whole is made again, and what was made is removed for it. A disk that fails for a moment, or a file of
another user, must not cost finished work.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from memlayers.files import file_sha256, read_sealed


def verify_files(folder: Path, hashes: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Whether each file has the hash that it should have; several files at a time. A missing file has not.

    Raises `OSError` naming the file if one is there and cannot be read.
    """

    def same(name: str) -> bool:
        try:
            return file_sha256(folder / name) == hashes[name]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _named(error, folder / name) from None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        try:
            yield from zip(hashes, pool.map(same, hashes), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def read_if_whole(file: Path) -> dict[str, Any]:
    """A sealed file's content; empty if it is not there or not whole. Raises `OSError` if it cannot be read."""
    try:
        file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _named(error, file) from None
    try:
        return read_sealed(file)
    except ValueError:
        return {}


def _named(error: OSError, file: Path) -> OSError:
    """The error with the name of the file, which one of reading, not of opening, lacks."""
    return error if error.filename is not None else OSError(error.errno, error.strerror, str(file))
