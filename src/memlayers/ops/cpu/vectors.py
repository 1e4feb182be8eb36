"""16 float32 at a time: a value that LLVM keeps in as many registers as the processor needs for it.

Loops over such values are as fast as they look, whatever the auto-vectoriser makes of a plain loop.
"""

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16
_INT32, _INT64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLAGS = ("contract", "reassoc", "nsz")


class _Floats(types.Type):
    def __init__(self):
        super().__init__(name="Floats16")


FLOATS = _Floats()
_VECTOR = ir.VectorType(_FLOAT, LANES)


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, _VECTOR)


def lowered(signature):
    """Decorates ``emit(builder, *values)``, which returns the LLVM value of a call, as a function that kernels call.

    The signature is of Numba's types. What is `void` returns nothing.
    """

    def decorate(emit):
        def generate(context, builder, _, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        # Numba takes the names of the arguments from `emit`, the first of which is its own business.
        return intrinsic(functools.wraps(emit)(lambda context, *kinds: (signature, generate)))

    return decorate


def all_lanes(lane_type, value, lanes=LANES):
    """The constant vector of one value."""
    return ir.Constant(ir.VectorType(lane_type, lanes), [value] * lanes)


def broadcast(builder, value, lanes=LANES):
    """The vector of one value."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _INT32(0))
    return builder.shuffle_vector(first, undefined, all_lanes(_INT32, 0, lanes))


def _declared(builder, name, result, arguments):
    """LLVM's own function of this name for vectors of ours."""
    name = f"{name}.v{LANES}f32"
    function_type = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)


def _load(builder, address, lane_type):
    pointer = builder.inttoptr(address, ir.PointerType(ir.VectorType(lane_type, LANES)))
    return builder.load(pointer, align=lane_type.width // 8 if isinstance(lane_type, ir.IntType) else 4)


@lowered(FLOATS(types.int64))
def load(builder, address):
    """16 float32."""
    return _load(builder, address, _FLOAT)


@lowered(FLOATS(types.int64))
def load_bfloat16(builder, address):
    """16 bfloat16, widened."""
    bits = builder.zext(_load(builder, address, ir.IntType(16)), ir.VectorType(_INT32, LANES))
    return builder.bitcast(builder.shl(bits, all_lanes(_INT32, 16)), _VECTOR)


@lowered(FLOATS(types.int64))
def load_float16(builder, address):
    """16 float16, widened; in integers, since not every processor has an instruction for it."""
    bits = builder.zext(_load(builder, address, ir.IntType(16)), ir.VectorType(_INT32, LANES))
    sign = builder.shl(builder.and_(bits, all_lanes(_INT32, 0x8000)), all_lanes(_INT32, 16))
    magnitude = builder.shl(builder.and_(bits, all_lanes(_INT32, 0x7FFF)), all_lanes(_INT32, 13))
    # A power of two moves the exponent to where float32 has it, that of subnormals too.
    moved = builder.fmul(builder.bitcast(magnitude, _VECTOR), all_lanes(_FLOAT, 2.0**112))
    special = builder.or_(magnitude, all_lanes(_INT32, 0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, all_lanes(_INT32, 0x7C00 << 13))
    value = builder.select(is_special, special, builder.bitcast(moved, special.type))
    return builder.bitcast(builder.or_(value, sign), _VECTOR)


@lowered(types.void(types.int64, FLOATS))
def store(builder, address, values):
    builder.store(values, builder.inttoptr(address, ir.PointerType(_VECTOR)), align=4)


@lowered(FLOATS(FLOATS, types.float32, FLOATS))
def add_scaled(builder, total, factor, values):
    """total + factor * values, factor a number."""
    return builder.fadd(total, builder.fmul(broadcast(builder, factor), values, flags=_FLAGS), flags=_FLAGS)


def _binary(instruction):
    @lowered(FLOATS(FLOATS, FLOATS))
    def operation(builder, one, other):
        return getattr(builder, instruction)(one, other, flags=_FLAGS)

    return operation


add = _binary("fadd")
subtract = _binary("fsub")
multiply = _binary("fmul")
divide = _binary("fdiv")


@lowered(FLOATS(types.float32))
def fill(builder, value):
    """16 times one number."""
    return broadcast(builder, value)


@lowered(FLOATS(FLOATS))
def square_root(builder, values):
    return builder.call(_declared(builder, "llvm.sqrt", _VECTOR, [_VECTOR]), [values])


@lowered(types.void(types.int64, FLOATS, types.int64))
def store_bfloat16(builder, address, values, noise):
    """Round to bfloat16: to the nearest, ties to even, where `noise` is negative; else stochastically.

    noise: a number for each call; lane i takes 16 bits of a hash of noise + i (`memlayers.ops.rounding`).
    """
    bits = builder.bitcast(values, ir.VectorType(_INT32, LANES))
    upper = builder.lshr(bits, all_lanes(_INT32, 16))
    nearest = builder.add(builder.and_(upper, all_lanes(_INT32, 1)), all_lanes(_INT32, 0x7FFF))
    lanes = ir.Constant(ir.VectorType(_INT32, LANES), list(range(LANES)))
    random = builder.add(broadcast(builder, builder.trunc(noise, _INT32)), lanes)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        random = builder.xor(random, builder.lshr(random, all_lanes(_INT32, shift)))
        if factor is not None:
            random = builder.mul(random, all_lanes(_INT32, factor))
    random = builder.and_(random, all_lanes(_INT32, 0xFFFF))
    is_nearest = broadcast(builder, builder.icmp_signed("<", noise, _INT64(0)))
    rounded = builder.add(bits, builder.select(is_nearest, nearest, random))
    # Infinity and NaN stay what they are: nothing is carried into or out of them (a NaN keeps a bit).
    exponent = all_lanes(_INT32, 0x7F800000)
    is_special = builder.icmp_signed("==", builder.and_(bits, exponent), exponent)
    is_nan = builder.icmp_signed("!=", builder.and_(bits, all_lanes(_INT32, 0x7FFFFF)), all_lanes(_INT32, 0))
    quiet = builder.select(is_nan, builder.or_(bits, all_lanes(_INT32, 0x400000)), bits)
    upper = builder.lshr(builder.select(is_special, quiet, rounded), all_lanes(_INT32, 16))
    half = ir.VectorType(ir.IntType(16), LANES)
    builder.store(builder.trunc(upper, half), builder.inttoptr(address, ir.PointerType(half)), align=2)


@lowered(types.float32(FLOATS))
def lane_sum(builder, values):
    """The sum of the 16."""
    function = _declared(builder, "llvm.vector.reduce.fadd", _FLOAT, [_FLOAT, _VECTOR])
    return builder.call(function, [ir.Constant(_FLOAT, -0.0), values], fastmath=_FLAGS)


@lowered(types.void(types.int64, FLOATS))
def store_ordered(builder, address, values):
    """Store the codes (`intrinsics.order_64`) of 16 float32."""
    codes = ordered(builder, builder.bitcast(values, ir.VectorType(_INT32, LANES)))
    builder.store(codes, builder.inttoptr(address, ir.PointerType(codes.type)), align=4)


@lowered(types.void(types.int64, types.int32, types.int64))
def store_sums(builder, address, number, numbers):
    """Store number + each of the 16 int32 at address `numbers`."""
    sums = builder.add(_load(builder, numbers, _INT32), broadcast(builder, number))
    builder.store(sums, builder.inttoptr(address, ir.PointerType(sums.type)), align=4)


def ordered(builder, bits):
    """int32 in the order of the float32 of these bits: zeros of both signs are 0, and nothing is -2**31."""
    lowest, zero, shift, others, least = (
        all_lanes(_INT32, value, bits.type.count) for value in (-(2**31), 0, 31, 2**31 - 1, -(2**31) + 1)
    )
    bits = builder.select(builder.icmp_signed("==", bits, lowest), zero, bits)
    codes = builder.xor(bits, builder.and_(builder.ashr(bits, shift), others))
    return greater(builder, codes, least)


def greater(builder, one, other):
    """The greater of two vectors of int32, lane by lane."""
    return builder.select(builder.icmp_signed(">", one, other), one, other)
