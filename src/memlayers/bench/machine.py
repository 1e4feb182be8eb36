"""The machine: its device, its free memory, its threads, its cache, and the commit that runs on it."""

import contextlib
import gc
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

import memlayers

_UNKNOWN_CACHE = 32 * 2**20


def device_of(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means. Raises `ValueError` for another, or for cuda without one."""
    allowed = ("auto", "cpu", "cuda") if torch.cuda.is_available() else ("auto", "cpu")
    if name not in allowed:
        raise ValueError(f"device must be one of {', '.join(allowed)} on this machine, got {name!r}")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held on the device so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss, which starts from that of the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]])
    return max(sizes, default=_UNKNOWN_CACHE)


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
    root = Path(memlayers.__file__).resolve().parents[2]
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
