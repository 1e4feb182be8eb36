"""What the kernels need of the machine and Numba does not offer: pointers, atomics, prefetch, bits, vectors.

Each is a line or two of LLVM, the same on every processor. A vector of 16 float32 is a value that LLVM keeps in as many
registers as the processor needs for it; loops over such values are as fast as they look, whatever the auto-vectoriser
makes of a plain loop.
"""

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from memlayers.ops.cpu.compile import SUMS, lowered, part
from memlayers.ops.cpu.launch import Counters
from memlayers.ops.cpu.processor import approximates, converts_halves

LANES = 16
_INT32, _INT64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_EXACT = ("nsz",)  # of what may not be reordered; where there are none, Numba puts all of its own
_ERROR = Counters.error.offset // 8


def _pointer_to(element, stored):
    @lowered(types.CPointer(element)(types.int64))
    def pointer(builder, address):
        return builder.inttoptr(address, ir.PointerType(stored))

    return pointer


# address -> pointer: f32(address)[i]
f32 = _pointer_to(types.float32, _FLOAT)
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
    return builder.bitcast(bits, _FLOAT)


# 16 float32 at a time.


class _Floats(types.Type):
    def __init__(self):
        super().__init__(name="Floats16")


FLOATS = _Floats()
_VECTOR, _PLACES = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, _VECTOR)


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
    size = {ir.HalfType(): 2, _FLOAT: 4}.get(lane_type) or lane_type.width // 8
    return builder.load(pointer, align=size)


@lowered(FLOATS(types.int64))
def load(builder, address):
    """16 float32."""
    return _load(builder, address, _FLOAT)


@lowered(FLOATS(types.int64))
def load_bfloat16(builder, address):
    """16 bfloat16, widened."""
    words = _load(builder, address, ir.IntType(16))
    upper = ir.Constant(ir.VectorType(_INT32, 2 * LANES), [at for i in range(LANES) for at in (LANES, i)])
    return builder.bitcast(builder.shuffle_vector(words, all_lanes(ir.IntType(16), 0), upper), _VECTOR)


@lowered(FLOATS(types.int64))
def load_float16(builder, address):
    """16 float16, widened."""
    if converts_halves():
        return builder.fpext(_load(builder, address, ir.HalfType()), _VECTOR)
    bits = builder.zext(_load(builder, address, ir.IntType(16)), ir.VectorType(_INT32, LANES))
    sign = builder.shl(builder.and_(bits, all_lanes(_INT32, 0x8000)), all_lanes(_INT32, 16))
    magnitude = builder.shl(builder.and_(bits, all_lanes(_INT32, 0x7FFF)), all_lanes(_INT32, 13))
    # A power of two moves the exponent to where float32 has it, that of subnormals too.
    moved = builder.fmul(builder.bitcast(magnitude, _VECTOR), all_lanes(_FLOAT, 2.0**112))
    special = builder.or_(magnitude, all_lanes(_INT32, 0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, all_lanes(_INT32, 0x7C00 << 13))
    value = builder.select(is_special, special, builder.bitcast(moved, special.type))
    return builder.bitcast(builder.or_(value, sign), _VECTOR)


@lowered(FLOATS(types.int64))
def load_int8(builder, address):
    """16 int8."""
    return builder.sitofp(builder.sext(_load(builder, address, ir.IntType(8)), ir.VectorType(_INT32, LANES)), _VECTOR)


def _nibble(number):
    """Loads 16 words of 32 bits, of each its four bits of this number, in their place of 16 bits."""

    @lowered(FLOATS(types.int64))
    def load_nibble(builder, address):
        words = _load(builder, address, _INT32)
        if number >= 4:
            words = builder.lshr(words, all_lanes(_INT32, 16))
        return builder.sitofp(builder.and_(words, all_lanes(_INT32, 15 << 4 * (number % 4))), _VECTOR)

    return load_nibble


# 16 integers from 0 to 15 each, times 16 ** (number % 4).
nibble0, nibble1, nibble2, nibble3, nibble4, nibble5, nibble6, nibble7 = map(_nibble, range(8))


@lowered(FLOATS(types.int64))
def load_rounded(builder, address):
    """16 float32, each rounded to the nearest bfloat16, ties to even."""
    values = _load(builder, address, _FLOAT)
    bits = builder.bitcast(values, ir.VectorType(_INT32, LANES))
    odd = builder.and_(builder.lshr(bits, all_lanes(_INT32, 16)), all_lanes(_INT32, 1))
    rounded = builder.add(bits, builder.add(odd, all_lanes(_INT32, 0x7FFF)))
    rounded = builder.bitcast(builder.and_(rounded, all_lanes(_INT32, 0xFFFF0000)), _VECTOR)
    return builder.select(builder.fcmp_ordered("ord", values, values), rounded, values)  # NaN stays NaN


@lowered(types.void(types.int64, FLOATS))
def store(builder, address, values):
    builder.store(values, builder.inttoptr(address, ir.PointerType(_VECTOR)), align=4)


@lowered(FLOATS(FLOATS, types.float32, FLOATS))
def add_scaled(builder, total, factor, values):
    """total + factor * values, factor a number."""
    return builder.fadd(total, builder.fmul(broadcast(builder, factor), values, flags=SUMS), flags=SUMS)


@lowered(FLOATS(FLOATS, types.float32))
def scaled(builder, values, factor):
    """values * factor, rounded before anything is added."""
    return builder.fmul(values, broadcast(builder, factor), flags=_EXACT)


@lowered(FLOATS(FLOATS, types.float32, FLOATS))
def add_scaled_last(builder, total, factor, values):
    """total + factor * values, where values are rounded before, whatever they are the result of."""
    flags = "contract", *_EXACT
    return builder.fadd(total, builder.fmul(broadcast(builder, factor), values, flags=flags), flags=flags)


def _binary(instruction):
    @lowered(FLOATS(FLOATS, FLOATS))
    def operation(builder, one, other):
        return getattr(builder, instruction)(one, other, flags=SUMS)

    return operation


add = _binary("fadd")
subtract = _binary("fsub")
multiply = _binary("fmul")
divide = _binary("fdiv")


@lowered(FLOATS(FLOATS, FLOATS))
def maximum(builder, one, other):
    """Lane by lane, `other` where one of them is NaN."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


@lowered(FLOATS(types.float32))
def fill(builder, value):
    """16 times one number."""
    return broadcast(builder, value)


@lowered(FLOATS(FLOATS))
def square_root(builder, values):
    return builder.call(_declared(builder, "llvm.sqrt", _VECTOR, [_VECTOR]), [values])


def _approximate(name):
    @lowered(FLOATS(FLOATS))
    def operation(builder, values):
        mask = ir.IntType(LANES)
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR, mask])
        full_name = f"llvm.x86.avx512.{name}.ps.512"
        function = builder.module.globals.get(full_name) or ir.Function(builder.module, kind, full_name)
        return builder.call(function, [values, all_lanes(_FLOAT, 0.0), mask(2**LANES - 1)])

    return operation


# To 2**-14 of themselves.
about_reciprocal_root, about_reciprocal = _approximate("rsqrt14"), _approximate("rcp14")


@lowered(types.boolean(FLOATS))
def are_finite(builder, values):
    """Whether none of the 16 is infinite or NaN."""
    bits = builder.bitcast(values, ir.VectorType(_INT32, LANES))
    special = builder.icmp_unsigned(">=", builder.shl(bits, all_lanes(_INT32, 1)), all_lanes(_INT32, 0xFF000000))
    mask = ir.IntType(LANES)
    return builder.icmp_unsigned("==", builder.bitcast(special, mask), mask(0))


@lowered(types.void(types.int64, FLOATS, FLOATS, types.int64, types.int64, types.boolean))
def store_bfloat16(builder, address, one, other, noise, factor, are_all_finite):
    """Round 32 numbers to bfloat16: to the nearest, ties to even, where `noise` is negative; else stochastically.

    noise, factor: number i takes the upper 16 of the 32 bits of (noise + i) * factor (`memlayers.ops.rounding`).
    """
    count = 2 * LANES
    ints, first_to_last = ir.VectorType(_INT32, count), ir.Constant(ir.VectorType(_INT32, count), list(range(count)))

    def every(value):
        return all_lanes(_INT32, value, count)

    values = builder.shuffle_vector(one, other, first_to_last)
    bits = builder.bitcast(values, ints)
    with builder.if_else(builder.icmp_signed("<", noise, _INT64(0))) as (to_nearest, stochastically):
        with to_nearest:
            odd = builder.and_(builder.lshr(bits, every(16)), every(1))
            nearest, nearest_block = builder.add(odd, every(0x7FFF)), builder.block
        with stochastically:
            first = broadcast(builder, builder.trunc(builder.mul(noise, factor), _INT32), count)
            steps = builder.mul(first_to_last, broadcast(builder, builder.trunc(factor, _INT32), count))
            random = builder.lshr(builder.add(first, steps), every(16))
            random_block = builder.block
    more = builder.phi(ints)
    more.add_incoming(nearest, nearest_block)
    more.add_incoming(random, random_block)
    rounded = builder.add(bits, more)
    with builder.if_else(are_all_finite, likely=True) as (usual, special):
        with usual:
            _store_upper(builder, address, rounded)
        with special:  # infinity and NaN stay what they are: nothing is carried into or out of them
            is_nan = builder.fcmp_unordered("uno", values, values)
            kept = builder.select(is_nan, builder.or_(bits, every(0x400000)), bits)  # a NaN keeps a bit
            is_special = builder.icmp_unsigned(">=", builder.shl(bits, every(1)), every(0xFF000000))
            _store_upper(builder, address, builder.select(is_special, kept, rounded))


# Of 32 numbers those at even, and those at odd places, so that bfloat16 is widened and narrowed where it lies.

_ALTERNATE = [ir.Constant(ir.VectorType(_INT32, LANES), list(range(first, 2 * LANES, 2))) for first in (0, 1)]
_UPPER = 0xFFFF0000


def _alternate(place):
    @lowered(FLOATS(types.int64))
    def load_every_other(builder, address):
        vector = ir.VectorType(_FLOAT, 2 * LANES)
        values = builder.load(builder.inttoptr(address, ir.PointerType(vector)), align=4)
        return builder.shuffle_vector(values, ir.Constant(vector, ir.Undefined), _ALTERNATE[place])

    @lowered(FLOATS(types.int64))
    def widen_every_other(builder, address):
        pairs = builder.load(builder.inttoptr(address, ir.PointerType(ir.VectorType(_INT32, LANES))), align=2)
        if place == 0:
            return builder.bitcast(builder.shl(pairs, all_lanes(_INT32, 16)), _VECTOR)
        return builder.bitcast(builder.and_(pairs, all_lanes(_INT32, _UPPER)), _VECTOR)

    return load_every_other, widen_every_other


(load_even, widen_even), (load_odd, widen_odd) = _alternate(0), _alternate(1)


@lowered(types.void(types.int64, FLOATS, FLOATS, types.int64, types.int64))
def store_alternate(builder, address, even, odd, noise, factor):
    """`store_bfloat16` of numbers that are all finite, or whose lower 16 bits are zero."""
    ints = ir.VectorType(_INT32, LANES)
    bits = [builder.bitcast(one, ints) for one in (even, odd)]
    with builder.if_else(builder.icmp_signed("<", noise, _INT64(0))) as (to_nearest, stochastically):
        with to_nearest:
            odds = [builder.and_(builder.lshr(one, all_lanes(_INT32, 16)), all_lanes(_INT32, 1)) for one in bits]
            nearest = [builder.add(one, all_lanes(_INT32, 0x7FFF)) for one in odds]
            nearest_block = builder.block
        with stochastically:
            first = broadcast(builder, builder.trunc(builder.mul(noise, factor), _INT32))
            step = broadcast(builder, builder.trunc(factor, _INT32))
            random = [builder.add(first, builder.mul(step, places)) for places in _ALTERNATE]
            random = [builder.lshr(one, all_lanes(_INT32, 16)) for one in random]
            random_block = builder.block
    more = [builder.phi(ints), builder.phi(ints)]
    for one, near, some in zip(more, nearest, random, strict=True):
        one.add_incoming(near, nearest_block)
        one.add_incoming(some, random_block)
    lower, upper = (builder.add(one, other) for one, other in zip(bits, more, strict=True))
    lower = builder.lshr(lower, all_lanes(_INT32, 16))
    if approximates():  # LLVM would make it a shuffle of words, which takes three times as long
        name, kind = "llvm.x86.avx512.pternlog.d.512", ir.FunctionType(ints, [ints, ints, ints, _INT32])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        pairs = builder.call(function, [all_lanes(_INT32, _UPPER), upper, lower, _INT32(0xCA)])
    else:
        pairs = builder.or_(lower, builder.and_(upper, all_lanes(_INT32, _UPPER)))
    builder.store(pairs, builder.inttoptr(address, ir.PointerType(ints)), align=2)


def _store_upper(builder, address, bits):
    """Store the upper 16 bits of 32 int32."""
    words = builder.bitcast(bits, ir.VectorType(ir.IntType(16), 4 * LANES))
    odd = ir.Constant(ir.VectorType(_INT32, 2 * LANES), list(range(1, 4 * LANES, 2)))
    upper = builder.shuffle_vector(words, ir.Constant(words.type, ir.Undefined), odd)
    builder.store(upper, builder.inttoptr(address, ir.PointerType(upper.type)), align=2)


@lowered(types.void(types.int64, FLOATS))
def store_float16(builder, address, values):
    """Round to float16, to the nearest, ties to even."""
    if converts_halves():
        half = builder.fptrunc(values, ir.VectorType(ir.HalfType(), LANES))
        builder.store(half, builder.inttoptr(address, ir.PointerType(half.type)), align=2)
        return
    ints = ir.VectorType(_INT32, LANES)
    bits = builder.bitcast(values, ints)
    magnitude = builder.and_(bits, all_lanes(_INT32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, all_lanes(_INT32, 13)), all_lanes(_INT32, 1))
    rounded = builder.add(magnitude, builder.add(odd, all_lanes(_INT32, 0xFFF - (112 << 23))))
    normal = builder.lshr(rounded, all_lanes(_INT32, 13))
    # Beside 0.5 the unit of a float32 is that of float16's subnormals.
    beside = builder.bitcast(builder.fadd(builder.bitcast(magnitude, _VECTOR), all_lanes(_FLOAT, 0.5)), ints)
    small = builder.sub(beside, all_lanes(_INT32, 0x3F000000))
    is_small = builder.icmp_unsigned("<", magnitude, all_lanes(_INT32, 0x38800000))
    half = builder.select(is_small, small, normal)
    is_large = builder.icmp_unsigned(">=", magnitude, all_lanes(_INT32, 0x477FF000))  # what rounds to infinity
    half = builder.select(is_large, all_lanes(_INT32, 0x7C00), half)
    is_nan = builder.icmp_unsigned(">", magnitude, all_lanes(_INT32, 0x7F800000))
    half = builder.select(is_nan, all_lanes(_INT32, 0x7E00), half)
    sign = builder.and_(builder.lshr(bits, all_lanes(_INT32, 16)), all_lanes(_INT32, 0x8000))
    halves = ir.VectorType(ir.IntType(16), LANES)
    half = builder.trunc(builder.or_(half, sign), halves)
    builder.store(half, builder.inttoptr(address, ir.PointerType(halves)), align=2)


@lowered(types.float32(FLOATS))
def lane_sum(builder, values):
    """The sum of the 16."""
    function = _declared(builder, "llvm.vector.reduce.fadd", _FLOAT, [_FLOAT, _VECTOR])
    return builder.call(function, [ir.Constant(_FLOAT, -0.0), values], fastmath=SUMS)


def _row_products(load_row):
    """An intrinsic: total + <16 elements of a row, values> for the 16 rows that begin at base + slot * row_bytes.

    slots: the address of 16 int64. Each sum is that of `lane_sum`: of halves, and of their halves.
    """

    @lowered(FLOATS(FLOATS, FLOATS, types.int64, types.int64, types.int64))
    def products(builder, total, values, base, slots, row_bytes):
        slot = builder.inttoptr(slots, ir.PointerType(_INT64))

        def sums(first, step):
            """Partial sums of rows `first`, `first + step` and so on, as many of each as there is room for."""
            if step == LANES:
                start = builder.mul(builder.load(builder.gep(slot, [_INT64(first)])), row_bytes)
                return builder.fmul(load_row.emit(builder, builder.add(base, start)), values, flags=_EXACT)
            parts = sums(first, 2 * step), sums(first + step, 2 * step)
            both = [
                at + LANES * one
                for start in range(0, LANES, 2 * step)
                for one in (0, 1)
                for at in range(start, start + step)
            ]
            halves = [
                builder.shuffle_vector(*parts, ir.Constant(_PLACES, [at + by for at in both])) for by in (0, step)
            ]
            return builder.fadd(*halves, flags=_EXACT)

        return builder.fadd(total, sums(0, 1), flags=_EXACT)

    return products


add_products, add_products_bfloat16, add_products_float16 = map(_row_products, (load, load_bfloat16, load_float16))


@lowered(types.void(types.int64, FLOATS))
def store_ordered(builder, address, values):
    """Store the codes (`order_64`) of 16 float32."""
    codes = ordered(builder, builder.bitcast(values, ir.VectorType(_INT32, LANES)))
    builder.store(codes, builder.inttoptr(address, ir.PointerType(codes.type)), align=4)


@lowered(types.void(types.int64, types.int32, types.int64))
def store_sums(builder, address, number, numbers):
    """Store number + each of the 16 int32 at address `numbers`."""
    sums = builder.add(_load(builder, numbers, _INT32), broadcast(builder, number))
    builder.store(sums, builder.inttoptr(address, ir.PointerType(sums.type)), align=4)


# 64 int32 at a time.


@lowered(types.int64(types.int64, types.int32))
def mask_at_least_64(builder, address, least):
    """Which of the 64 int32 at an address are at least `least`: bit i for element i."""
    vector = ir.VectorType(_INT32, 64)
    values = builder.load(builder.inttoptr(address, ir.PointerType(vector)), align=4)
    return builder.bitcast(builder.icmp_signed(">=", values, broadcast(builder, least, 64)), _INT64)


def _keep(builder, codes, least, numbers, kept, kept_numbers):
    """Of 16 int32 at `codes`, and of as many numbers, write those whose code is at least `least`; how many.

    Writes 16 each, whatever there are. With AVX-512 alone.
    """
    vector, mask = ir.VectorType(_INT32, LANES), ir.VectorType(ir.IntType(1), LANES)
    values = _load(builder, codes, _INT32)
    reached = builder.icmp_signed(">=", values, broadcast(builder, least))
    name, kind = "llvm.x86.avx512.mask.compress.v16i32", ir.FunctionType(vector, [vector, vector, mask])
    compress = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    for given, address in ((values, kept), (numbers, kept_numbers)):
        packed = builder.call(compress, [given, all_lanes(_INT32, 0), reached])
        builder.store(packed, builder.inttoptr(address, ir.PointerType(vector)), align=4)
    return builder.zext(builder.ctpop(builder.bitcast(reached, ir.IntType(LANES))), _INT64)


@lowered(types.int64(types.int64, types.int32, types.int64, types.int64, types.int64))
def keep_16(builder, codes, least, numbers, kept, kept_numbers):
    """`_keep` of the numbers at an address."""
    return _keep(builder, codes, least, _load(builder, numbers, _INT32), kept, kept_numbers)


@lowered(types.int64(types.int64, types.int32, types.int32, types.int64, types.int64))
def keep_places_16(builder, codes, least, first, kept, kept_numbers):
    """`_keep` of the numbers from `first` on."""
    numbers = builder.add(broadcast(builder, first), ir.Constant(_PLACES, list(range(LANES))))
    return _keep(builder, codes, least, numbers, kept, kept_numbers)


@lowered(types.int64(types.int64))
def lowest_bit(builder, mask):
    """The number of the lowest bit that is set; undefined for 0."""
    return builder.cttz(mask, ir.Constant(ir.IntType(1), 1))


@lowered(types.int64(types.int64))
def count_bits(builder, mask):
    """How many bits are set."""
    return builder.ctpop(mask)


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
