"""How functions become kernels: `kernel`, and what kernels call: `part`, `shared`, and `lowered` for a line of LLVM.

Numba optimises each function that it compiles and makes machine code of it, so a function within a function within a
kernel would be compiled three times. Here a part is optimised where it is inlined, and nowhere else.
"""

import ctypes
import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

from llvmlite import binding, ir
from numba import _dynfunc, njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering
from numba.extending import intrinsic

from memlayers.ops import rounding
from memlayers.ops.cpu.cache import compile_kept
from memlayers.ops.cpu.launch import Counters

# Sums may be contracted and reordered; NaN and infinity mean what they mean.
SUMS = ("contract", "reassoc", "nsz")
_OPTIONS = {"fastmath": {*SUMS}, "error_model": "numpy", "no_rewrites": True}
_PART = {
    **_OPTIONS, "inline": "never", "forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip


def kernel(function):
    """Compile ``function(counters, ...)`` to a C function of a record that `launch` fills; cached on disk.

    The record holds the counters and then each further parameter of the function, under its name: an int64, or a
    float64 where it is annotated ``float``.
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    kinds = {one.name: ctypes.c_double if one.annotation is float else ctypes.c_int64 for one in parameters}
    record = type(function.__name__, (Counters,), {"_fields_": list(kinds.items())})
    entry, signature = _entry(function, record, kinds), types.void(types.CPointer(types.int64))
    compiled = compile_kept(entry, signature, _OPTIONS, _sources())
    compiled.record, compiled.names = record, kinds.keys()
    return compiled


def _entry(function, record, kinds):
    """``entry(counters)``, which calls the function with what the record holds behind the counters."""
    fields = {name: f"counters[{getattr(record, name).offset // 8}]" for name in kinds}
    values = [f"bits_double({fields[name]})" if kinds[name] is ctypes.c_double else fields[name] for name in kinds]
    source = f"def entry(counters): function(counters, {', '.join(values)})"
    # Text, since a closure's variables are in its code.
    names = {"__name__": function.__module__, "function": part(function), "bits_double": bits_double}
    exec(compile(source, function.__code__.co_filename, "exec"), names)
    names["entry"].__name__ = names["entry"].__qualname__ = function.__name__
    return names["entry"]


@functools.cache
def _sources() -> str:
    """A hash of all files of kernels, and of the one whose constants they have."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(rounding.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def part(function):
    """A function that kernels call; compiled into them."""
    return njit(pipeline_class=_PartCompiler, **_PART)(function)


def part_with_a_sum(function):
    """A part that is optimised by itself first, so that LLVM gives a sum the order that it always had."""
    return njit(**_PART)(function)


class _PartCompiler(CompilerBase):
    """Numba's compiler, but for its last step."""

    def define_pipelines(self):
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_LowerPart, NativeLowering)
        passes.passes = [one for one in passes.passes if one[0] is not NativeLowering]
        passes.finalize()
        return [passes]


class _PartLibrary(JITCodeLibrary):
    """The code of a part: as it is written, for those who inline it."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerPart(NativeLowering):
    """Makes LLVM's code of a function, and no machine code."""

    _name = "memlayers_part"

    def run_pass(self, state) -> bool:
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        made = state.cr
        # What stands for the function in Numba's tables, for Python cannot call it.
        stub = _dynfunc.make_function(
            made.fndesc.lookup_module(), made.fndesc.qualname, "", 0, made.env, (state.library,)
        )
        state.targetctx.insert_user_function(stub, made.fndesc, [state.library])
        state.cr = made._replace(cfunc=stub)
        return True


def lowered(signature):
    """Decorates ``emit(builder, *values)``, which returns the LLVM value of a call, as a function that kernels call.

    The signature is of Numba's types. What is `void` returns nothing.
    """

    def decorate(emit):
        def generate(context, builder, _, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        # Numba takes the names of the arguments from `emit`, the first of which is its own business.
        made = intrinsic(functools.wraps(emit)(lambda context, *kinds: (signature, generate)))
        made.emit = emit
        return made

    return decorate


def shared(function):
    """A long function of integers that returns nothing, for several kernels: compiled once, and called by them."""
    parameters = inspect.signature(function).parameters
    signature = types.void(*[types.int64] * len(parameters))
    compiled = compile_kept(function, signature, _OPTIONS, _sources())
    name = f"{function.__module__}.{function.__name__}"
    binding.add_symbol(name, compiled.address)  # where LLVM looks for what a kernel from the disk calls, too

    def emit(builder: Any, *values: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), values)

    first = inspect.Parameter("builder", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named: Any = emit
    named.__signature__ = inspect.Signature([first, *parameters.values()])
    call = lowered(signature)(named)
    call.compiled = compiled  # its code lives as long
    return call


@lowered(types.float64(types.int64))
def bits_double(builder, bits):
    """The float64 of these bits."""
    return builder.bitcast(bits, ir.DoubleType())
