"""The kernels for a CPU, in Numba. Compiled at first use and kept on disk; without Numba the references are used.

- select, search, matrix_units; read, low_bits; rows, row_rules; products, infer: the operations' kernels
- draw: fresh rows of tables in files
- intrinsics: what they are written with
- compile, cache, processor: how they are compiled, kept, and for which processors
- launch: how they run on threads
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

SWITCH = "MEMLAYERS_REFERENCE"
IMPORTED_IN = os.getpid()  # threads do not survive a fork: how `launch` tells a forked process


def kernels(operation: str) -> ModuleType | None:
    """The module of kernels (select, search, infer, read, low_bits, rows, draw); None: the references run."""
    return None if why_not() else importlib.import_module(f"memlayers.ops.cpu.{operation}")


def compile_all() -> None:
    """Compile the kernels of all operations, or take them from disk, before they are needed."""
    for operation in ("select", "search", "infer", "read", "low_bits", "rows"):
        kernels(operation)
    if (search := kernels("search")) is not None:
        search.matrix_units()


def is_switched_off() -> bool:
    """Whether the environment asks for the references."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


@functools.cache
def why_not() -> str | None:
    """Why the kernels are not used in this process, or None when they are.

    Raises `ValueError` where the environment asks for kernels that this processor cannot run.
    """
    if is_switched_off():
        return f"{SWITCH} is set"
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    for module in ("processor", "intrinsics"):
        try:
            importlib.import_module(f"memlayers.ops.cpu.{module}")
        except Exception as error:  # Numba refuses some versions of Python and NumPy in several ways
            return f"Numba does not import: {error}"
        variant()  # before Numba makes its target, which the first decorator has it do
    return None


def variant() -> str:
    """The variant of the kernels, in words."""
    return importlib.import_module("memlayers.ops.cpu.processor").describe()
