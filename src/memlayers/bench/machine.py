"""The machine: its device, its free memory, its threads, its cache, and the commit that runs on it."""

import contextlib
import gc
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from memlayers.ops import cpu, gpu

_UNKNOWN_CACHE = 32 * 2**20
# "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ..."
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def device_of(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means. Raises `ValueError` for another, or for cuda without one."""
    allowed = ("auto", "cpu", "cuda") if torch.cuda.is_available() else ("auto", "cpu")
    if name not in allowed:
        raise ValueError(f"device must be one of {', '.join(allowed)} on this machine, got {name!r}")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _UNKNOWN_CACHE
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]])
    return max(sizes, default=_UNKNOWN_CACHE)


def gpu_of(device: torch.device) -> dict[str, Any]:
    """The GPU that this is, its driver, and what PyTorch is built for."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "gigabytes": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cache_megabytes": cache_bytes(device) // 2**20,
        "driver": _driver(),
        "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
    }


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d{3,}\.\d+(\.\d+)*)\s", _DRIVER_FILE.read_text())
        if found:
            return found[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return next(iter(done.stdout.split()), None)
    return None


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within, float32 products are float32 throughout (no TF32), so that results compare; afterwards as before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Within, every operation runs on its reference, as with MEMLAYERS_REFERENCE, in all threads of this process."""
    before = cpu.why_not, gpu.why_not
    cpu.why_not = gpu.why_not = lambda: "the reference is measured"  # type: ignore[assignment]
    try:
        yield
    finally:
        cpu.why_not, gpu.why_not = before


def kernels_on(device: torch.device) -> str:
    """What runs the operations there."""
    name, why_not = ("Triton", gpu.why_not()) if device.type == "cuda" else ("Numba", cpu.why_not())
    return f"kernels in {name}" if why_not is None else f"no kernels ({why_not})"


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Within, Python's collector looks only at what is new: walking all modules takes longer than what is timed."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Within, PyTorch uses so many threads; afterwards as many as before."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def commit() -> str | None:
    """The commit of the checkout that this package runs from, ``-dirty`` if files differ; None outside of one."""
    root = Path(__file__).resolve().parents[3]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:  # installed somewhere inside of another project's checkout
            return None
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
        return _git(root, "rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
