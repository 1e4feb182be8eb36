"""What `memlayers info` says of this machine: what is installed, what it runs on, and what runs each operation."""

from memlayers.hardware import hardware, versions
from memlayers.ops import cpu, gpu
from memlayers.parameters import count_parameters

__all__ = ["count_parameters", "hardware", "operations", "versions"]

# Operations, and the dtypes of tables that their kernels know: of a CPU, of a GPU.
_16_BITS = "float32, bfloat16, float16"
_OPERATIONS = {
    "search, select, infer": ("float32", _16_BITS),
    "read and its gradients": (f"tables in {_16_BITS}", f"tables in {_16_BITS}"),
    "row step": ("tables in float32, bfloat16", f"tables in {_16_BITS}"),
}


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
