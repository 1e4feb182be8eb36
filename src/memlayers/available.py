"""How much memory can still be had: of the machine, of the container that this process is in, of a GPU.

And whether an error says that there was none left.
"""

import re
from pathlib import Path

import torch

_NO_LIMIT = 2**62  # version 1 of control groups writes a number about as large for none


def available_memory(device: str | torch.device) -> int:
    """Bytes that can still be had on a device.

    CPU: what the kernel says is available, or what is left in the tightest control group (version 2 or 1) of this
    process, whichever is less; where neither is said (not on Linux), so many that no check fails.
    """
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by this process, for itself
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_left_on_machine(Path("/proc/meminfo")), left_in_groups(Path("/proc/self/cgroup")))


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; PyTorch says so on a CPU, and of sizes beyond 64 bits, by its message alone."""
    signs = ("alloc_cpu", "DefaultCPUAllocator", "can't allocate memory", "size calculation overflow")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def left_in_groups(membership: Path, root: Path = Path("/sys/fs/cgroup")) -> int:
    """The same for control groups alone. `membership`: the file that says which groups the process is in."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    left = _NO_LIMIT
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, place = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names, place = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), root / "memory"
        else:
            continue
        # Inside a container its own group is mounted as the root, and the path is of no use; a parent's limit counts.
        group = place / path.strip("/")
        for folder in (group, *group.parents):
            left = min(left, _left(folder, *names))
            if folder == place:
                break
    return left


def _left(folder: Path, limit_name: str, used_name: str, cached_name: str) -> int:
    try:
        limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
        cached = re.search(rf"^{cached_name} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return _NO_LIMIT
    if limit == "max" or int(limit) >= _NO_LIMIT:
        return _NO_LIMIT
    # Files that were read count as used, and make room when it is needed.
    return max(0, int(limit) - used + (int(cached[1]) if cached else 0))


def _left_on_machine(meminfo: Path) -> int:
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return _NO_LIMIT
    return _NO_LIMIT if found is None else int(found[1]) * 1024
