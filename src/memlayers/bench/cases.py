"""The cases: what is measured, of whom, and whether it is right.

A result's `samples` go by contender; "limit" in a name marks what the machine can do, measured in the same rounds.
Letters: T tokens, D model width, H heads, N sub-keys, K neighbours, S slots, V value width, R rows a token.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.available import available_memory
from memlayers.bench import gate, limits
from memlayers.bench.baselines import PackageMemory, dense_ffn, grid_topk, lean_grid_topk, why_not
from memlayers.bench.layers import make_layer, make_table, make_textbook, table_of
from memlayers.bench.machine import cache_bytes
from memlayers.bench.peak import measure as measure_peak
from memlayers.bench.result import OURS, Result, fold
from memlayers.bench.shapes import Shape
from memlayers.bench.timing import Call, Stopwatch, capture
from memlayers.bench.training import (
    DENSE,
    REFERENCE,
    REFERENCE_ON_GPU,
    TRAINED,
    Moments,
    contender_bytes,
    make_row_step,
    make_steps,
    row_step_bytes,
    takes_part,
)
from memlayers.ops.low_bits import BITS
from memlayers.ops.row_sum import Part
from memlayers.ops.select import select_pairs
from memlayers.storage.low_bits import LowBitTable
from memlayers.values import ValueTable

DTYPES = ("float32", "bfloat16", "autocast")  # autocast: to bfloat16, of float32 weights
_ROWS, _IN_ORDER = "random rows (limit)", "as many bytes in order (limit)"
_COPY = "copy (limit)"
_SUM = "query + keys + rows (limit)"
# A step of decoding takes a millisecond, so that many rounds cost little.
_DECODING_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every case needs."""

    watch: Stopwatch
    sum_rows: dict[str, limits.SumRows]
    update_rows: dict[str, limits.UpdateRows]
    dtypes: tuple[str, ...] = ()  # of `DTYPES`; none: what each case has by itself

    @classmethod
    def on(cls, watch: Stopwatch, dtypes: tuple[str, ...] = ()) -> "Bench":
        sums, updates = limits.row_kernels(watch.device)
        return cls(watch=watch, sum_rows=sums, update_rows=updates, dtypes=dtypes)

    @property
    def device(self) -> torch.device:
        return self.watch.device

    def lacks(self, needed: int) -> str | None:
        """Why something that needs so many bytes cannot run here; None if it can."""
        gc.collect()
        if self.device.type == "cuda":  # what is kept for later is of no use to another process, or in other sizes
            torch.cuda.empty_cache()
        free = available_memory(self.device)
        if free is None or needed <= free:
            return None
        return f"needs {needed / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free"


Run = Callable[[Bench, Shape], Iterator[Result]]


def select(bench: Bench, shape: Shape) -> Iterator[Result]:
    """Half scores to the K best slots."""
    first_HTN, second_HTN = torch.randn(2, shape.heads, shape.tokens, shape.num_subkeys, device=bench.device)
    gate.check_selection(shape, first_HTN, second_HTN)
    contenders: dict[str, Call] = {
        OURS: lambda: select_pairs(first_HTN, second_HTN, shape.topk),
        "three torch.topk": lambda: grid_topk(first_HTN, second_HTN, shape.topk),
        "three torch.topk, no grid of slots": lambda: lean_grid_topk(first_HTN, second_HTN, shape.topk),
    }
    with torch.no_grad():
        yield Result(case="select", shape=shape, samples=bench.watch.rounds(contenders))


@torch.no_grad()
def read(bench: Bench, shape: Shape) -> Iterator[Result]:
    """The weighted sum of H * K rows a token; float32 and bfloat16 tables, and beside float32 those of few bits."""
    table_SV = make_table(shape, bench.device)
    slots_TR, weights_TR = _hits(shape, table_SV)
    for dtype in _table_dtypes(bench):
        table_SV = table_SV.to(dtype)
        table = table_of(table_SV)
        gate.check_read(shape, table, slots_TR, weights_TR)
        yield _read(bench, shape, table, slots_TR, weights_TR)
        if dtype == torch.float32:
            yield _read_low_bits(bench, shape, table, slots_TR, weights_TR)


def _read(bench: Bench, shape: Shape, table: ValueTable, slots_TR: Tensor, weights_TR: Tensor) -> Result:
    table_SV, own_weights_TR = table.weight.data, weights_TR.to(table.weight.dtype)
    copy, copied = limits.copy(bench.device)
    contenders: dict[str, Call] = {
        OURS: lambda: table.read(slots_TR, weights_TR),
        "F.embedding_bag": lambda: F.embedding_bag(slots_TR, table_SV, per_sample_weights=own_weights_TR, mode="sum"),
    }
    notes = [_how_many(slots_TR)]
    name, ways = "", dict[str, Call]()
    if table_SV.shape[1] * table_SV.itemsize % 4 == 0:
        # As many bytes; what the sums of halves of numbers come to does not matter.
        name, ways = _limit_of_rows(bench, table_SV.view(torch.float32), slots_TR)
    samples = bench.watch.rounds({**contenders, **ways, _COPY: copy})
    if ways:
        notes.append(f"{name}: without weights, {fold(samples, ways, name)}")
    moved = float(slots_TR.numel() * table_SV.shape[1] * table_SV.itemsize)
    return Result(
        case="read",
        part=_table_name(table_SV),
        shape=shape,
        samples=samples,
        work={**dict.fromkeys(samples, (moved, "GB/s")), _COPY: (copied, "GB/s")},
        limit=_COPY,
        notes=tuple(notes),
    )


def _read_low_bits(bench: Bench, shape: Shape, table: ValueTable, slots_TR: Tensor, weights_TR: Tensor) -> Result:
    """Rows of any 8 and 4 bits beside those of floats, in one round."""
    contenders: dict[str, Call] = {OURS: lambda: table.read(slots_TR, weights_TR)}
    for bits in BITS:
        rounded = LowBitTable(shape.slots, shape.value_dim, bits, device=bench.device)
        rounded.codes.random_(256)
        rounded.scales.copy_(torch.rand(shape.slots, 1, device=bench.device).view(torch.uint8))
        gate.check_read(shape, rounded, slots_TR, weights_TR)
        contenders[f"{bits} bits"] = _bind(rounded.read, slots_TR, weights_TR)
    samples = bench.watch.rounds(contenders)
    rows = float(slots_TR.numel()) / 1e6
    return Result(
        case="read",
        part="float32 table, and few bits",
        shape=shape,
        samples=samples,
        work=dict.fromkeys(samples, (rows * 1e9, "M rows/s")),
        notes=(_how_many(slots_TR),),
    )


@torch.no_grad()
def update(bench: Bench, shape: Shape) -> Iterator[Result]:
    """The row step of `RowAdam` alone, on what one batch read; float32 and bfloat16 tables, and bfloat16 moments."""
    table_SV = make_table(shape, bench.device)
    part = Part(*_hits(shape, table_SV), torch.randn(shape.tokens, shape.value_dim, device=bench.device))
    kinds = [(dtype, torch.float32) for dtype in _table_dtypes(bench)]
    if (torch.bfloat16, torch.float32) in kinds:
        kinds.append((torch.bfloat16, torch.bfloat16))
    for dtype, of_moments in kinds:
        table_SV = table_SV.to(dtype)
        moments = Moments.of(table_SV, of_moments)
        steps_S = torch.zeros(shape.slots, dtype=torch.int32, device=bench.device)
        gate.check_update(shape, table_SV, (moments.exp_avg_SV, moments.exp_avg_sq_SV, steps_S), part)
        copy, copied = limits.copy(bench.device)
        samples = bench.watch.rounds({OURS: make_row_step(table_SV, moments, steps_S, part), _COPY: copy})
        moved = row_step_bytes(table_SV, moments, steps_S, part)
        yield Result(
            case="update",
            part=_table_name(table_SV) + (" and moments" if of_moments == torch.bfloat16 else ""),
            shape=shape,
            samples=samples,
            work={OURS: (moved, "GB/s"), _COPY: (copied, "GB/s")},
            limit=_COPY,
            notes=(_how_many(part.slots_TK), "counted are rows and states in and out, slots, weights and gradients in"),
        )


@torch.no_grad()
def forward(bench: Bench, shape: Shape) -> Iterator[Result]:
    """The layer in evaluation, and the sum of its limits."""
    for dtype in bench.dtypes or ("float32",):
        yield _forward(bench, shape, dtype)


def _forward(bench: Bench, shape: Shape, dtype: str) -> Result:
    modules, x_TD, notes = _modules(bench, shape)
    contenders = _calls(shape, modules, x_TD, dtype)
    if dtype != "float32":
        return Result(case="forward", part=dtype, shape=shape, samples=bench.watch.rounds(contenders), notes=(*notes,))
    table_SV = modules["textbook"].get_parameter("values").data
    slots_TR, _ = _hits(shape, table_SV)
    rows, ways_to_rows = _limit_of_rows(bench, table_SV, slots_TR)
    parts = {
        "query projection (limit)": limits.query_projection(shape, bench.device),
        "key products (limit)": limits.key_products(shape, bench.device),
        rows: ways_to_rows,
    }
    samples = bench.watch.rounds({**contenders, **{way: call for ways in parts.values() for way, call in ways.items()}})
    notes += [f"{name}: {fold(samples, ways, name)}" for name, ways in parts.items()]
    samples[_SUM] = [sum(together) for together in zip(*(samples[name] for name in parts), strict=True)]
    return Result(case="forward", shape=shape, samples=samples, notes=tuple(notes))


def train(bench: Bench, shape: Shape) -> Iterator[Result]:
    """Forward, backward and update."""
    for dtype in bench.dtypes or ("float32",):
        names = (*TRAINED, REFERENCE) if dtype == "float32" else (OURS, DENSE)
        yield time_training(bench, "train", shape, names, "" if dtype == "float32" else dtype, dtype)


def memory(bench: Bench, shape: Shape) -> Iterator[Result]:
    """Peak memory of a training step, each contender in a process of its own."""
    samples = {}
    able, notes = _able(bench, shape, TRAINED)
    for name in able:
        peak, note = measure_peak(name, shape, bench.device)
        if note:
            notes.append(note)
        if peak is not None:
            samples[name] = [float(peak)]
    samples["table and two moments (limit)"] = [3.0 * shape.table_bytes]
    yield Result(case="memory", shape=shape, samples=samples, unit="bytes", notes=tuple(notes))


@torch.no_grad()
def decode(bench: Bench, shape: Shape) -> Iterator[Result]:
    """One token, with nothing of the layer in the cache."""
    one = dataclasses.replace(shape, tokens=1)
    watch = dataclasses.replace(bench.watch, repeats=_DECODING_ROUNDS * bench.watch.repeats)
    for dtype in bench.dtypes or ("float32",):
        yield from _decode(bench, watch, one, dtype)


def _decode(bench: Bench, watch: Stopwatch, one: Shape, dtype: str) -> Iterator[Result]:
    modules, x_TD, notes = _modules(bench, one)
    contenders, part = _calls(one, modules, x_TD, dtype), "" if dtype == "float32" else dtype
    if bench.device.type == "cuda":
        samples = watch.rounds(contenders, launching=True)
        yield Result(
            case="decode", part=f"{part} launches included".strip(), shape=one, samples=samples, notes=tuple(notes)
        )
        graphs, lacks = _captured(contenders, bench.device)
        samples = watch.rounds(graphs) if graphs else {}
        yield Result(
            case="decode", part=f"{part} as CUDA graphs".strip(), shape=one, samples=samples, notes=(*notes, *lacks)
        )
        return
    flushed = torch.zeros(max(2**26, 4 * cache_bytes(bench.device)) // 4)
    # Streams with the threads of torch, as the blocks before the layer would.
    samples = watch.rounds(contenders, before=lambda: flushed.add_(1))
    yield Result(case="decode", part=part, shape=one, samples=samples, notes=tuple(notes))


def machine(bench: Bench, shape: Shape) -> Iterator[Result]:
    """What the machine can do at the layer's shapes."""
    device = bench.device
    tables = [make_table(shape, device) for _ in range(3)]
    slots_TR, _ = _hits(shape, tables[0])
    touched_R = slots_TR.unique()
    projection, products = limits.product_flops(shape)
    row_bytes = 4.0 * shape.value_dim
    copy, copied = limits.copy(device)
    groups: dict[str, tuple[dict[str, Call], float, str]] = {
        "query projection": (limits.query_projection(shape, device), projection, "GFLOP/s"),
        "key products": (limits.key_products(shape, device), products, "GFLOP/s"),
        "random rows, summed": (_ways_to_sum(bench, tables[0], slots_TR), slots_TR.numel() * row_bytes, "GB/s"),
        "rows read and written in three tables, in order": (
            {name: _bind(kernel, *tables, touched_R) for name, kernel in bench.update_rows.items()},
            6 * len(touched_R) * row_bytes,
            "GB/s",
        ),
        "copy": ({"copy_": copy}, copied, "GB/s"),
    }
    groups = {name: group for name, group in groups.items() if group[0]}  # those that there is a way for here
    for name, (ways, moved) in limits.streams(device, bench.sum_rows).items():
        groups[f"stream, {name}"] = (ways, moved, "GB/s")
    with torch.no_grad():
        samples = bench.watch.rounds({way: call for ways, _, _ in groups.values() for way, call in ways.items()})
    best = {name: fold(samples, ways, name) for name, (ways, _, _) in groups.items()}
    notes = [f"{name}: {best[name]}" for name, (ways, _, _) in groups.items() if len(ways) > 1]
    notes.append(_how_many(slots_TR))
    work = {name: (amount, unit) for name, (_, amount, unit) in groups.items()}
    yield Result(case="machine", shape=shape, samples=samples, work=work, notes=tuple(notes))


def time_training(
    bench: Bench, case: str, shape: Shape, names: tuple[str, ...], part: str = "", dtype: str = "float32"
) -> Result:
    """Training steps of those contenders that take part and fit; in bfloat16 weights, table and moments are so."""
    able, notes = _able(bench, shape, names)
    if not able:
        return Result(case=case, part=part, shape=shape, notes=tuple(notes))
    if REFERENCE in able and bench.device.type == "cuda":
        notes.append(REFERENCE_ON_GPU)
    steps, more = make_steps(tuple(able), shape, bench.device, dtype)
    return Result(case=case, part=part, shape=shape, samples=bench.watch.rounds(steps), notes=(*notes, *more))


def _able(bench: Bench, shape: Shape, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The contenders that take part at a shape and fit, and a line for each that does not fit."""
    lacks = {name: bench.lacks(contender_bytes(name, shape)) for name in names if takes_part(name, shape)}
    return [name for name, lack in lacks.items() if not lack], [
        f"{name}: {lack}" for name, lack in lacks.items() if lack
    ]


def _modules(bench: Bench, shape: Shape) -> tuple[dict[str, nn.Module], Tensor, list[str]]:
    """Ours, the textbook layer, the dense FFN and the package, in evaluation; the first two give the same here."""
    textbook = make_textbook(shape, make_table(shape, bench.device)).eval()
    layer = make_layer(textbook, shape).eval()
    x_TD = gate.draw_tokens(shape, textbook)
    gate.check_outputs(shape, layer, textbook, x_TD)
    modules: dict[str, nn.Module] = {
        OURS: layer,
        "textbook": textbook,
        f"dense FFN ({shape.dim}, {4 * shape.dim})": dense_ffn(shape.dim, bench.device).eval(),
    }
    try:
        package = PackageMemory(shape, textbook.values.data).eval()
        package(x_TD)
    except Exception as error:  # whatever a package of others raises, the rest is measured
        return modules, x_TD, [f"product-key-memory: {why_not(error)}"]
    return {**modules, "product-key-memory": package}, x_TD, []


def _hits(shape: Shape, table_SV: Tensor) -> tuple[Tensor, Tensor]:
    """Slots and weights of random tokens, [T, H * K], spread over the table as those of a fresh layer are."""
    with torch.no_grad():
        textbook = make_textbook(shape, table_SV).eval()
        scores_THK, slots_THK = textbook.search(
            torch.randn(shape.tokens, shape.dim, device=table_SV.device), shape.topk
        )
    return slots_THK.flatten(1), scores_THK.softmax(-1).flatten(1)


def _captured(contenders: dict[str, Call], device: torch.device) -> tuple[dict[str, Call], list[str]]:
    """The calls as CUDA graphs. Second, a line for each that cannot be one."""
    graphs, notes = {}, []
    for name, call in contenders.items():
        try:
            graphs[name] = capture(call, device)
        except Exception as error:  # whatever it is, the rest is measured
            notes.append(f"{name}: not captured: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}")
    return graphs, notes


def _table_dtypes(bench: Bench) -> list[torch.dtype]:
    """Of the tables that are read and updated; under autocast they stay in float32."""
    asked = bench.dtypes or ("float32", "bfloat16")
    wanted = {"float32": {"float32", "autocast"}, "bfloat16": {"bfloat16"}}
    return [getattr(torch, name) for name, by in wanted.items() if by & {*asked}]


def _calls(shape: Shape, modules: dict[str, nn.Module], x_TD: Tensor, dtype: str) -> dict[str, Call]:
    """Forward passes in float32, in bfloat16 (the modules are converted), or under autocast."""
    if dtype == "float32":
        return {name: call_of(module, x_TD) for name, module in modules.items()}
    expected_TD = modules[OURS](x_TD)
    if dtype == "bfloat16":
        x_TD = x_TD.bfloat16()
        for module in modules.values():
            module.bfloat16()
    calls = {name: _under(dtype, x_TD.device, call_of(module, x_TD)) for name, module in modules.items()}
    gate.check_16_bits(shape, f"output in evaluation, {dtype}", calls[OURS](), expected_TD)
    return calls


def _under(dtype: str, device: torch.device, call: Call) -> Call:
    """The call as it is, or under autocast."""

    def autocast() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return call()

    return autocast if dtype == "autocast" else call


def _table_name(table_SV: Tensor) -> str:
    return f"{str(table_SV.dtype).removeprefix('torch.')} table"


def _how_many(slots_TR: Tensor) -> str:
    return f"{slots_TR.numel():,} rows are read, {len(slots_TR.unique()):,} of them different"


def _limit_of_rows(bench: Bench, table_SV: Tensor, slots_TR: Tensor) -> tuple[str, dict[str, Call]]:
    """A name, and ways: the rows without weights, or, where torch's own way is no limit, as many bytes in order."""
    if bench.device.type == "cpu":
        return _ROWS, _ways_to_sum(bench, table_SV, slots_TR)
    return _IN_ORDER, {"torch.sum": limits.read_in_order(table_SV, slots_TR.numel())}


def _ways_to_sum(bench: Bench, table_SV: Tensor, slots_TR: Tensor) -> dict[str, Call]:
    output_TV = torch.empty(len(slots_TR), table_SV.shape[1], device=bench.device)
    return {name: _bind(kernel, table_SV, slots_TR, output_TV) for name, kernel in bench.sum_rows.items()}


def _bind(function: Callable[..., object], *arguments: Any) -> Call:
    return lambda: function(*arguments)


def call_of(module: nn.Module, x_TD: Tensor) -> Call:
    """A forward pass."""
    return lambda: module(x_TD)
