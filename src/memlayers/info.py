"""What is installed, what it runs on, and how many parameters a model has."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memlayers.layer import MemoryLayer
from memlayers.ops import cpu, gpu
from memlayers.version import __version__

REPORTED_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "numba", "triton")


# Operations, and the dtypes of tables that their kernels know: of a CPU, of a GPU.
_16_BITS = "float32, bfloat16, float16"
_OPERATIONS = {
    "search, select, infer": ("float32", _16_BITS),
    "read and its gradients": (f"tables in {_16_BITS}", f"tables in {_16_BITS}"),
    "row step": ("tables in float32, bfloat16", f"tables in {_16_BITS}"),
}


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that decide about results; absent ones are left out."""
    found = {"python": platform.python_version(), "memlayers": __version__}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processor, the threads that PyTorch uses, and the GPU if there is one."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_gigabytes": round(properties.total_memory / 2**30, 1)}
    return found


def operations() -> dict[str, str]:
    """What runs each operation on a CPU and on a GPU, and why."""
    found = {}
    for name, (on_cpu, on_gpu) in _OPERATIONS.items():
        runs = (("CPU", "Numba", cpu.why_not(), on_cpu), ("GPU", "Triton", gpu.why_not(), on_gpu))
        found[name] = ", ".join(
            f"{kernels} on a {device} ({dtypes})" if why_not is None else f"PyTorch on a {device} ({why_not})"
            for device, kernels, why_not, dtypes in runs
        )
    return found


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part: the memories' query networks, keys and values, the rest of the model, and the total.

    A table that several memories share counts once; an output projection of a memory counts as rest.
    """
    memories = [layer for layer in model.modules() if isinstance(layer, MemoryLayer)]
    parts = {
        "query": {parameter for layer in memories for parameter in layer.query.parameters()},
        "keys": {parameter for layer in memories for parameter in layer.keys.parameters()},
        "values": {layer.values.weight for layer in memories},
    }
    # All parameters of a table: while a row optimizer owns it, it has one more that is no weight.
    owned = parts["query"] | parts["keys"] | {other for layer in memories for other in layer.values.parameters()}
    parts["rest"] = set(model.parameters()) - owned
    counts = {part: sum(parameter.numel() for parameter in parameters) for part, parameters in parts.items()}
    return {**counts, "total": sum(counts.values())}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
