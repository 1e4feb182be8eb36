"""The kernels for a GPU (CUDA or ROCm), in Triton, compiled at first use; without Triton the references are used."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from memlayers.ops.cpu import SWITCH


def kernels(operation: str) -> ModuleType | None:
    """The module of an operation's kernels (select, search, infer, read, rows), or None: use the reference."""
    return None if why_not() else importlib.import_module(f"memlayers.ops.gpu.{operation}")


@functools.cache
def why_not() -> str | None:
    """Why the kernels are not used in this process, or None when they are."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return f"{SWITCH} is set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("memlayers.ops.gpu.launch")
    except Exception as error:  # whatever a version that does not fit raises
        return f"Triton does not import: {error}"
    return None
