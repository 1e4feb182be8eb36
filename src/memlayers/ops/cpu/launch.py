"""How a compiled kernel runs on the threads of PyTorch.

A kernel is a C function ``void(record *)`` that takes tasks from a shared counter until none is left. The record holds
what all threads count, and then the kernel's arguments under the names that they have in the kernel.

The function is handed to the OpenMP runtime that PyTorch itself is linked to, so there is one pool of threads: none
spins against the other, two Python threads may call at once (each has a team of its own, as in PyTorch), and
`torch.set_num_threads` counts. Where PyTorch brings no such runtime (macOS, Windows) Python threads run the kernel,
without the GIL.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from memlayers.ops.cpu import IMPORTED_IN
from memlayers.torch_private import openmp_parallel


class Counters(ctypes.Structure):
    """What the record of every kernel begins with; all threads read and write it."""

    _fields_ = [
        ("next_task", ctypes.c_int64),
        ("thread", ctypes.c_int64),  # threads that have begun
        ("error", ctypes.c_int64),  # 0: nothing went wrong
        ("_line", ctypes.c_int64 * 5),
        ("done", ctypes.c_int64),  # tasks that are done, in no cache line with one that others read
        ("_done_line", ctypes.c_int64 * 7),
    ]


def threads_for(tasks: int) -> int:
    """How many threads to launch a kernel on."""
    # OpenMP's threads do not survive a fork, and a team that waits for them never ends: a forked process has one.
    return max(1, min(torch.get_num_threads(), tasks)) if os.getpid() == IMPORTED_IN else 1


def launch(kernel, threads: int, **arguments: Tensor | int | float | None) -> int:
    """Run a kernel, which gets the address of a tensor and 0 for None; returns whether it failed, as 0 or 1.

    Raises:
        TypeError: The names are not those of the kernel's parameters, or a float is given for an integer.
    """
    if arguments.keys() != kernel.names:
        raise TypeError(f"{kernel} takes {sorted(kernel.names)}, got {sorted(arguments)}")
    record = kernel.record()
    for name, value in arguments.items():
        if type(value) is not int:  # most are: `isinstance` of a tensor's class is what takes time here
            value = value.data_ptr() if isinstance(value, Tensor) else value or 0
        setattr(record, name, value)
    team()(kernel.address, ctypes.addressof(record), threads)
    return record.error


@functools.cache
def team() -> Callable[[int, int, int], None]:
    """What runs function(argument) once on each of so many threads and waits: (function, argument, threads)."""
    parallel = openmp_parallel()
    if parallel is None:
        return python_threads
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    def openmp_threads(function: int, argument: int, threads: int) -> None:
        parallel(function, argument, threads, 0)

    return openmp_threads


def what_threads() -> str:
    """On which threads kernels run, in words."""
    if team() is python_threads:
        return (
            "Python's, since PyTorch's OpenMP runtime is not found: kernels start later, and share no pool with PyTorch"
        )
    return "PyTorch's OpenMP runtime"


def python_threads(function: int, argument: int, threads: int) -> None:
    """The same on threads of Python's."""
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    others = [_executor(os.getpid(), threads).submit(call, argument) for _ in range(threads - 1)]
    call(argument)
    for other in others:
        other.result()


@functools.cache
def _executor(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="memlayers")
