"""advise: what the system is told of many stretches of a map, in one call where the system has one.

Rows lie at random places, so each stretch is a page or two; a call of Python's for each costs more than what it asks
for. Linux 6.13 and later takes any advice of a process about itself in lists (process_madvise).
"""

import ctypes
import functools
import mmap
import os

import numpy as np

POPULATE_WRITE = 23  # of Linux 5.14 and later, without a name in `mmap`: pages are made ready to be written to
_PROCESS_MADVISE = 440  # the number of the call, on all processors
_AT_ONCE = 1024  # stretches that it takes


def advise(pages: mmap.mmap, address: int, runs: np.ndarray, advice: int) -> None:
    """Advises of stretches [R, 2] of a map, the first byte and the one behind the last, in whole pages.

    address: of the map. Raises `OSError` at the first stretch that cannot be had.
    """
    process = _itself(os.getpid())
    if process is None:
        for begin, end in runs.tolist():
            pages.madvise(advice, begin, end - begin)
        return
    vectors = np.stack((runs[:, 0] + address, runs[:, 1] - runs[:, 0]), 1).astype(np.int64)  # address and size
    while len(vectors):
        some = vectors[:_AT_ONCE]
        done = _process_madvise(process, some, advice)
        vectors = vectors[np.searchsorted(some[:, 1].cumsum(), done, side="right") :]


def _process_madvise(process: int, vectors: np.ndarray, advice: int) -> int:
    """The bytes that were advised of, at least a stretch's."""
    call = _libc().syscall
    done = call(_PROCESS_MADVISE, process, vectors.ctypes.data_as(ctypes.c_void_p), len(vectors), advice, 0)
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


@functools.cache
def _libc() -> ctypes.CDLL:
    found = ctypes.CDLL(None, use_errno=True)
    found.syscall.restype = ctypes.c_long
    found.syscall.argtypes = [
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_uint,
    ]
    return found


@functools.cache
def _itself(process: int) -> int | None:
    """A descriptor of this process, or None where the system takes no advice in lists."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.pidfd_open(process)
    except OSError:
        return None
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        at = np.frombuffer(page, np.uint8).ctypes.data
        try:
            _process_madvise(descriptor, np.array([[at, mmap.PAGESIZE]]), POPULATE_WRITE)
            return descriptor
        except OSError:
            os.close(descriptor)
            return None
