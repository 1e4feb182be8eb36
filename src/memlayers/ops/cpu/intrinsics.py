"""What the kernels need of the machine and Numba does not offer: pointers, atomics, prefetch, bits.

Each is a line or two of LLVM, the same on every processor.
"""

import ctypes
import functools
import hashlib
import inspect
from pathlib import Path

from llvmlite import ir
from numba import njit, types

from memlayers.ops.cpu.cache import compile_kept
from memlayers.ops.cpu.launch import Counters
from memlayers.ops.cpu.vectors import all_lanes, broadcast, greater, lowered, ordered

# Sums may be contracted and reordered; NaN and infinity mean what they mean.
_OPTIONS = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
_ERROR = Counters.error.offset // 8
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


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
    # Text, since a closure's variables are in its code. What Numba inlines it does not also compile by itself.
    inlined = njit(inline="always", **_OPTIONS)(function)
    names = {"__name__": function.__module__, "function": inlined, "bits_double": bits_double}
    exec(compile(source, function.__code__.co_filename, "exec"), names)
    names["entry"].__name__ = names["entry"].__qualname__ = function.__name__
    return names["entry"]


@functools.cache
def _sources() -> str:
    """A hash of all files of kernels."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def part(function):
    """A function that kernels call; compiled into them."""
    return njit(inline="never", forceinline=True, **_OPTIONS)(function)


def _pointer_to(element, stored):
    @lowered(types.CPointer(element)(types.int64))
    def pointer(builder, address):
        return builder.inttoptr(address, ir.PointerType(stored))

    return pointer


# address -> pointer: f32(address)[i]
f32 = _pointer_to(types.float32, ir.FloatType())
f64 = _pointer_to(types.float64, ir.DoubleType())
i64 = _pointer_to(types.int64, _INT64)
i32 = _pointer_to(types.int32, _INT32)
u16 = _pointer_to(types.uint16, ir.IntType(16))


def _count(name):
    """An intrinsic that adds 1 atomically; returns what it was. What was written before it is seen after it."""

    @lowered(types.int64(types.CPointer(types.int64)))
    def count(builder, counters):
        return builder.atomic_rmw("add", _counter(builder, counters, name), _INT64(1), "acq_rel")

    return count


def _counter(builder, counters, name):
    return builder.gep(counters, [_INT64(getattr(Counters, name).offset // 8)])


# next_task(counters), and so on
next_task, this_thread, task_done = _count("next_task"), _count("thread"), _count("done")


@lowered(types.int64(types.CPointer(types.int64)))
def tasks_done(builder, counters):
    """How many tasks are done; what their threads wrote before is seen after it."""
    return builder.load_atomic(_counter(builder, counters, "done"), "acquire", 8)


@part
def fail(counters):
    """Have `launch` return 1."""
    counters[_ERROR] = 1


@lowered(types.void(types.int64))
def prefetch(builder, address):
    """Ask for the cache line at an address, which need not be valid."""
    line = ir.PointerType(ir.IntType(8))
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [line], ir.FunctionType(ir.VoidType(), [line, _INT32, _INT32, _INT32])
    )
    builder.call(function, [builder.inttoptr(address, line), _INT32(0), _INT32(3), _INT32(1)])


@lowered(types.int32(types.float32))
def float_bits(builder, value):
    """The bits of a float32, as int32."""
    return builder.bitcast(value, _INT32)


@lowered(types.float32(types.int32))
def bits_float(builder, bits):
    """The float32 of these bits."""
    return builder.bitcast(bits, ir.FloatType())


@lowered(types.float64(types.int64))
def bits_double(builder, bits):
    """The float64 of these bits."""
    return builder.bitcast(bits, ir.DoubleType())


@lowered(types.int64(types.int64, types.int32))
def mask_at_least_64(builder, address, least):
    """Which of the 64 int32 at an address are at least `least`: bit i for element i."""
    vector = ir.VectorType(_INT32, 64)
    values = builder.load(builder.inttoptr(address, ir.PointerType(vector)), align=4)
    return builder.bitcast(builder.icmp_signed(">=", values, broadcast(builder, least, 64)), _INT64)


@lowered(types.int64(types.int64))
def lowest_bit(builder, mask):
    """The number of the lowest bit that is set; undefined for 0."""
    return builder.cttz(mask, ir.Constant(ir.IntType(1), 1))


@lowered(types.void(types.int64, types.int64, types.int64, types.int64))
def count_greater_64(builder, values, count, at, ranks):
    """For each of the 64 int32 at address `at`, how many of the `count` int32 at `values` are greater; to `ranks`."""
    vector = ir.VectorType(_INT32, 64)
    zeros = all_lanes(_INT32, 0, 64)
    pivots = builder.load(builder.inttoptr(at, ir.PointerType(vector)), align=4)
    values = builder.inttoptr(values, ir.PointerType(_INT32))
    before, body, after = builder.block, builder.append_basic_block("body"), builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed(">", count, _INT64(0)), body, after)
    builder.position_at_end(body)
    index, total = builder.phi(_INT64), builder.phi(vector)
    value_64 = broadcast(builder, builder.load(builder.gep(values, [index])), 64)
    more = builder.sub(total, builder.sext(builder.icmp_signed(">", value_64, pivots), vector))
    following = builder.add(index, _INT64(1))
    for phi, first, later in ((index, _INT64(0), following), (total, zeros, more)):
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    builder.position_at_end(after)
    result = builder.phi(vector)
    result.add_incoming(zeros, before)
    result.add_incoming(more, body)
    builder.store(result, builder.inttoptr(ranks, ir.PointerType(vector)), align=4)


@lowered(types.void(types.int64, types.int64, types.int64))
def order_64(builder, scores, codes, maxima):
    """Write the codes of 64 float32, in their order; raise the 64 maxima to them.

    Both zeros have the code 0. No score has the code -2**31.
    """
    vector = ir.VectorType(_INT32, 64)
    scores, codes, maxima = (builder.inttoptr(address, ir.PointerType(vector)) for address in (scores, codes, maxima))
    code = ordered(builder, builder.load(scores, align=4))
    builder.store(code, codes, align=4)
    builder.store(greater(builder, code, builder.load(maxima, align=4)), maxima, align=4)
