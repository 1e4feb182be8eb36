"""What a GPU would run, found out without one: the launches of a call are recorded instead of run, and compiled.

    with recorded() as launches:
        run("cuda", "read", table_SV, slots_TK, weights_TK)  # of tensors on "meta", of any size
    print(compile_launch(launches[0], SM_90))

Needs Triton 3.6 or later, and a process in which it does not interpret. (What it calls within Triton differs in 3.4 and
3.5: they have no `JITFunction._pack_args`, and their `get_ptxas` takes no argument.)
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SM_80, SM_90 = (GPUTarget("cuda", arch, 32) for arch in (80, 90))
GFX942 = GPUTarget("hip", "gfx942", 64)

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9]*_\w+)")


class Launch(NamedTuple):
    """One launch: arguments in the order of the kernel's parameters, and settings by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        """How many are started."""
        return math.prod(self.grid)


class Jump(NamedTuple):
    """From one instruction to another, by their numbers."""

    place: int
    to: int


def _counted(nvidia: str, amd: str) -> property:
    return property(lambda self: self.count(nvidia, amd))


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel for one GPU."""

    name: str
    target: GPUTarget
    warps: int  # of a program
    registers: int  # of a thread; on AMD those of vectors
    spilled_bytes: int  # of a thread's memory, not its registers
    shared_bytes: int  # of a program
    instructions: tuple[str, ...] = field(repr=False)  # in order, without operands; padding after the last is left out
    jumps: tuple[Jump, ...]  # not known of AMD
    assembly: str = field(repr=False)  # SASS, or what AMD has

    @property
    def loops(self) -> list[range]:
        """Instructions that are repeated: what is jumped back over."""
        return sorted((range(to, place + 1) for place, to in self.jumps if to < place), key=lambda loop: loop.start)

    loads_of_16_bytes = _counted(r"LDG.*\.128", r"(global|buffer|flat)_load_dwordx4")  # from global memory
    stores_of_16_bytes = _counted(r"STG.*\.128", r"(global|buffer|flat)_store_dwordx4")  # to global memory
    loads = _counted(r"LDG", r"(global|buffer|flat)_load_")  # from global memory, of any width
    stores = _counted(r"STG", r"(global|buffer|flat)_store_")  # to global memory, of any width
    barriers = _counted(r"BAR\.", r"s_barrier")  # of a program's warps
    shuffles = _counted(r"SHFL", r"(ds_b?permute|ds_swizzle|v_permlane)|.*_dpp")  # between the threads of a warp
    local_accesses = _counted(r"(LDL|STL)", r"scratch_(load|store)")  # of a thread's memory: spills, arrays

    def count(self, nvidia: str, amd: str) -> int:
        """Instructions whose name begins with a pattern."""
        pattern = re.compile(amd if self.target.backend == "hip" else nvidia)
        return sum(pattern.match(instruction) is not None for instruction in self.instructions)

    def __str__(self) -> str:
        return (
            f"{self.name} for {self.target.backend} {self.target.arch}: {self.warps} warps, "
            f"{self.registers} registers, {self.spilled_bytes} B spilled, {self.shared_bytes} B shared, "
            f"{len(self.instructions)} instructions, "
            f"{self.loads_of_16_bytes} of {self.loads} loads and {self.stores_of_16_bytes} of {self.stores} stores of "
            f"16 bytes, {self.barriers} barriers, {self.shuffles} shuffles"
        )


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches within are put into a list instead of being run, so that their tensors may be on any device."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches cannot be recorded where Triton interprets: unset TRITON_INTERPRET")
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel, *arguments, grid, warmup=False, **settings):
        launches.append(Launch(kernel, tuple(grid), arguments, settings))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, target: GPUTarget) -> Compiled:
    """Compiled as it would be at its first launch: arguments of 1, and multiples of 16, are known to the compiler.

    Of a tensor only dtype, size and where it begins in its storage are looked at; a storage begins at a multiple of 16.
    """
    source, options = _source(launch, target)
    compiled = triton.compile(source, target=target, options=options)
    of_target = _of_amd if target.backend == "hip" else _of_nvidia
    return Compiled(
        name=launch.name,
        target=target,
        warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        **of_target(compiled),
    )


class _Pointer:
    """What the compiler sees of a tensor."""

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self._tensor = tensor

    def data_ptr(self) -> int:
        return int(self._tensor.storage_offset()) * self._tensor.element_size()

    def ptr_range(self) -> int:
        return self._tensor.untyped_storage().nbytes()


def _source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """By the functions that Triton itself calls for a launch."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = [_Pointer(given) if isinstance(given, Tensor) else given for given in launch.arguments]
    bound, specialization, options = bind(*arguments, **launch.settings)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.settings, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def _of_nvidia(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    arch = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)[1]  # type: ignore[index]
    ptxas = Path(get_ptxas(compiled.metadata.target.arch).path)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        fusion = [] if compiled.metadata.enable_fp_fusion else ["--fmad=false"]
        said = _run(ptxas, "-v", *fusion, f"--gpu-name={arch}", source, "-o", binary)
        sass = _run(ptxas.with_name("nvdisasm"), "-c", binary)
    names, jumps = parse_sass(sass)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {
        "registers": max(int(used) for used in re.findall(r"Used (\d+) registers", said)),
        "spilled_bytes": sum(map(int, spilled)),
        "instructions": names,
        "jumps": jumps,
        "assembly": sass,
    }


def parse_sass(sass: str) -> tuple[tuple[str, ...], tuple[Jump, ...]]:
    """Names of the instructions, up to the jump to itself that ends a kernel, and the jumps between them."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.match(line):
            _, name, operands = found.groups()
            if name.startswith("BRA") and (to := re.search(r"\.L_\w+", operands)):
                jumps.append((len(names), to[0]))
            names.append(name)
    known = [Jump(place, labels[to]) for place, to in jumps if to in labels]
    end = max((jump.place for jump in known if jump.to == jump.place), default=len(names))
    return tuple(names[:end]), tuple(jump for jump in known if jump.place < end)


def _of_amd(compiled: Any) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]

    def said(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        return int(found[1]) if found else 0

    code = assembly.split(".rodata")[0]
    names = (found[1] for line in code.splitlines() if (found := _AMD_INSTRUCTION.match(line)))
    names = (name for name in names if name != "s_code_end")  # padding
    return {
        "registers": said("vgpr_count"),
        "spilled_bytes": said("private_segment_fixed_size"),
        "instructions": tuple(names),
        "jumps": (),
        "assembly": assembly,
    }


def _run(*command: Any) -> str:
    """What a tool says."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr
