"""16 float32 at a time: a value that LLVM keeps in as many registers as the processor needs for it.

Loops over such values are as fast as they look, whatever the auto-vectoriser makes of a plain loop.
"""

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


def all_lanes(lane_type, value):
    """The constant vector of one value."""
    return ir.Constant(ir.VectorType(lane_type, LANES), [value] * LANES)


def broadcast(builder, value):
    """The vector of one value."""
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, _INT32(0))
    return builder.shuffle_vector(first, undefined, all_lanes(_INT32, 0))


def _declared(builder, name, result, arguments):
    """LLVM's own function of this name for vectors of ours."""
    name = f"{name}.v{LANES}f32"
    function_type = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)


def _load(builder, address, lane_type):
    pointer = builder.inttoptr(address, ir.PointerType(ir.VectorType(lane_type, LANES)))
    return builder.load(pointer, align=lane_type.width // 8 if isinstance(lane_type, ir.IntType) else 4)


@intrinsic
def load(context, address):
    """16 float32."""

    def generate(context, builder, signature, arguments):
        return _load(builder, arguments[0], _FLOAT)

    return FLOATS(types.int64), generate


@intrinsic
def load_bfloat16(context, address):
    """16 bfloat16, widened."""

    def generate(context, builder, signature, arguments):
        bits = builder.zext(_load(builder, arguments[0], ir.IntType(16)), ir.VectorType(_INT32, LANES))
        return builder.bitcast(builder.shl(bits, all_lanes(_INT32, 16)), _VECTOR)

    return FLOATS(types.int64), generate


@intrinsic
def load_float16(context, address):
    """16 float16, widened; in integers, since not every processor has an instruction for it."""

    def generate(context, builder, signature, arguments):
        bits = builder.zext(_load(builder, arguments[0], ir.IntType(16)), ir.VectorType(_INT32, LANES))
        sign = builder.shl(builder.and_(bits, all_lanes(_INT32, 0x8000)), all_lanes(_INT32, 16))
        magnitude = builder.shl(builder.and_(bits, all_lanes(_INT32, 0x7FFF)), all_lanes(_INT32, 13))
        # A power of two moves the exponent to where float32 has it, that of subnormals too.
        moved = builder.fmul(builder.bitcast(magnitude, _VECTOR), all_lanes(_FLOAT, 2.0**112))
        special = builder.or_(magnitude, all_lanes(_INT32, 0x7F800000))
        is_special = builder.icmp_unsigned(">=", magnitude, all_lanes(_INT32, 0x7C00 << 13))
        value = builder.select(is_special, special, builder.bitcast(moved, special.type))
        return builder.bitcast(builder.or_(value, sign), _VECTOR)

    return FLOATS(types.int64), generate


@intrinsic
def store(context, address, values):
    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.PointerType(_VECTOR)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, FLOATS), generate


@intrinsic
def add_scaled(context, total, factor, values):
    """total + factor * values, factor a number."""

    def generate(context, builder, signature, arguments):
        total, factor, values = arguments
        return builder.fadd(total, builder.fmul(broadcast(builder, factor), values, flags=_FLAGS), flags=_FLAGS)

    return FLOATS(FLOATS, types.float32, FLOATS), generate


def _binary(instruction):
    @intrinsic
    def operation(context, one, other):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments, flags=_FLAGS)

        return FLOATS(FLOATS, FLOATS), generate

    return operation


add = _binary("fadd")
subtract = _binary("fsub")
multiply = _binary("fmul")
divide = _binary("fdiv")


@intrinsic
def fill(context, value):
    """16 times one number."""

    def generate(context, builder, signature, arguments):
        return broadcast(builder, arguments[0])

    return FLOATS(types.float32), generate


@intrinsic
def square_root(context, values):
    def generate(context, builder, signature, arguments):
        return builder.call(_declared(builder, "llvm.sqrt", _VECTOR, [_VECTOR]), arguments)

    return FLOATS(FLOATS), generate


@intrinsic
def store_bfloat16(context, address, values, noise):
    """Round to bfloat16: to the nearest, ties to even, where `noise` is negative; else stochastically.

    noise: a number for each call; lane i takes 16 bits of a hash of noise + i (`memlayers.ops.rounding`).
    """

    def generate(context, builder, signature, arguments):
        address, values, noise = arguments
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
        return context.get_dummy_value()

    return types.void(types.int64, FLOATS, types.int64), generate


@intrinsic
def lane_sum(context, values):
    """The sum of the 16."""

    def generate(context, builder, signature, arguments):
        function = _declared(builder, "llvm.vector.reduce.fadd", _FLOAT, [_FLOAT, _VECTOR])
        return builder.call(function, [ir.Constant(_FLOAT, -0.0), arguments[0]], fastmath=_FLAGS)

    return types.float32(FLOATS), generate


@intrinsic
def store_ordered(context, address, values):
    """Store the codes (`intrinsics.order_64`) of 16 float32."""

    def generate(context, builder, signature, arguments):
        address, values = arguments
        codes = ordered(builder, builder.bitcast(values, ir.VectorType(_INT32, LANES)))
        builder.store(codes, builder.inttoptr(address, ir.PointerType(codes.type)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, FLOATS), generate


@intrinsic
def store_sums(context, address, number, numbers):
    """Store number + each of the 16 int32 at address `numbers`."""

    def generate(context, builder, signature, arguments):
        address, number, numbers = arguments
        sums = builder.add(_load(builder, numbers, _INT32), broadcast(builder, number))
        builder.store(sums, builder.inttoptr(address, ir.PointerType(sums.type)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int32, types.int64), generate


def ordered(builder, bits):
    """int32 in the order of the float32 of these bits: zeros of both signs are 0, and nothing is -2**31."""
    vector = bits.type
    lowest, zero = ir.Constant(vector, [-(2**31)] * vector.count), ir.Constant(vector, [0] * vector.count)
    bits = builder.select(builder.icmp_signed("==", bits, lowest), zero, bits)
    sign = builder.ashr(bits, ir.Constant(vector, [31] * vector.count))
    codes = builder.xor(bits, builder.and_(sign, ir.Constant(vector, [2**31 - 1] * vector.count)))
    return greater(builder, codes, ir.Constant(vector, [-(2**31) + 1] * vector.count))


def greater(builder, one, other):
    """The greater of two vectors of int32, lane by lane."""
    return builder.select(builder.icmp_signed(">", one, other), one, other)
