"""Which instructions kernels are compiled to: those that the processor has, or fewer, where the environment says so.

``MEMLAYERS_CPU=avx2`` has a processor with more run what one with AVX2 runs. All of Numba's code in the process is then
compiled so, since Numba has one target.
"""

import functools
import os
import platform

from llvmlite import binding
from numba import config
from numba.core.registry import cpu_target

from memlayers.torch_private import starts_matrix_units

SWITCH = "MEMLAYERS_CPU"
# From the least to the greatest, by LLVM's names: the features that a variant must have, and how those begin that no
# lesser one may have.
_X86 = {
    "sse2": ((), ()),
    "avx2": (("avx2", "f16c", "fma"), ("avx", "f16c", "fma", "vaes", "vpclmulqdq", "xop")),
    "avx512": (("avx512f", "avx512bw", "avx512dq", "avx512vl"), ("avx512", "avx10", "evex512")),
    "amx": (("amx-tile", "amx-bf16"), ("amx",)),
}
_MEANING = {
    "amx": "AVX-512, and matrix units for products of bfloat16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "sse2": "what every x86-64 processor has",
    "other": "what LLVM finds for it",
}


def variant() -> str:
    """The greatest variant that this process may run: sse2, avx2, avx512 or amx; "other" on what is no x86-64."""
    if not _is_x86():
        return "other"
    return [name for name, (needed, _) in _X86.items() if all(map(has_feature, needed)) and _is_granted(name)][-1]


def describe() -> str:
    """The variant in words, and which may be asked for."""
    lesser = f"; {SWITCH} may be {', '.join(_variants_here())}" if _is_x86() else ""
    return f"{variant()}: {_MEANING[variant()]}{lesser}"


def has_feature(name: str) -> bool:
    """Whether kernels are compiled for processors that have a feature, by LLVM's name."""
    return f"+{name}" in _features()


def has_matrix_units() -> bool:
    """Whether kernels may use matrix units for bfloat16."""
    return has_feature("amx-bf16") and starts_matrix_units()


def converts_halves() -> bool:
    """Whether there are instructions for float16; else integers do."""
    return platform.machine().lower() in ("aarch64", "arm64") or has_feature("f16c")


def approximates() -> bool:
    """Whether there are `intrinsics.about_reciprocal` and `about_reciprocal_root`."""
    return has_feature("avx512f")


@functools.cache
def _features() -> list[str]:
    """Those that Numba compiles for in this process.

    Raises:
        ValueError: The environment asks for a variant that this processor does not run.
        RuntimeError: Numba had compiled for another one before.
    """
    asked = os.environ.get(SWITCH)
    if asked:
        if asked not in _variants_here():
            known = f"one of {', '.join(_variants_here())}" if _is_x86() else "left out"
            raise ValueError(f"{SWITCH} must be {known} on this processor, got {asked!r}")
        before, config.CPU_FEATURES = config.CPU_FEATURES, _without(asked)
        try:
            context = cpu_target.target_context  # which Numba makes once
        finally:
            config.CPU_FEATURES = before
    else:
        context = cpu_target.target_context
    features = context.codegen().magic_tuple()[2].split(",")
    if asked and any(f"+{name}" in features for name in _more_than(asked)):
        raise RuntimeError(f"{SWITCH}={asked} comes too late: Numba has compiled in this process before memlayers did")
    return features


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def _host() -> dict[str, bool]:
    return dict(binding.get_host_cpu_features())


def _variants_here() -> list[str]:
    """Those that this processor runs, whatever is compiled for."""
    if not _is_x86():
        return []
    return [name for name, (needed, _) in _X86.items() if all(map(_host().get, needed)) and _is_granted(name)]


def _is_granted(name: str) -> bool:
    return name != "amx" or starts_matrix_units()


def _more_than(asked: str) -> list[str]:
    """The processor's features that a variant must not use."""
    names = list(_X86)
    greater = tuple(first for name in names[names.index(asked) + 1 :] for first in _X86[name][1])
    return [name for name, is_there in _host().items() if is_there and name.startswith(greater)]


def _without(asked: str) -> str:
    off = _more_than(asked)
    return ",".join(f"{'+' if is_there and name not in off else '-'}{name}" for name, is_there in _host().items())
