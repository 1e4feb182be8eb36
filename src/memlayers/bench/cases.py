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
from memlayers.bench.layers import make_layer, make_table, make_textbook
from memlayers.bench.machine import cache_bytes
from memlayers.bench.peak import measure as measure_peak
from memlayers.bench.result import OURS, Result, fold
from memlayers.bench.shapes import Shape
from memlayers.bench.timing import Stopwatch
from memlayers.bench.training import TRAINED, contender_bytes, make_steps, takes_part
from memlayers.ops.select import select_pairs
from memlayers.values import ValueTable

_ROWS = "random rows (limit)"
_SUM = "query + keys + rows (limit)"
# A step of decoding takes a millisecond, so that many rounds cost little.
_DECODING_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every case needs."""

    watch: Stopwatch
    sum_rows: dict[str, limits.SumRows]
    update_rows: dict[str, limits.UpdateRows]

    @classmethod
    def on(cls, watch: Stopwatch) -> "Bench":
        sums, updates = limits.row_kernels(watch.device)
        return cls(watch=watch, sum_rows=sums, update_rows=updates)

    @property
    def device(self) -> torch.device:
        return self.watch.device

    def lacks(self, needed: int) -> str | None:
        """Why something that needs so many bytes cannot run here; None if it can."""
        gc.collect()
        free = available_memory(self.device)
        if free is None or needed <= free:
            return None
        return f"needs {needed / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free"


Run = Callable[[Bench, Shape], Iterator[Result]]


def select(bench: Bench, shape: Shape) -> Iterator[Result]:
    """Half scores to the K best slots."""
    first_HTN, second_HTN = torch.randn(2, shape.heads, shape.tokens, shape.num_subkeys, device=bench.device)
    gate.check_selection(shape, first_HTN, second_HTN)
    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: select_pairs(first_HTN, second_HTN, shape.topk),
        "three torch.topk": lambda: grid_topk(first_HTN, second_HTN, shape.topk),
        "three torch.topk, no grid of slots": lambda: lean_grid_topk(first_HTN, second_HTN, shape.topk),
    }
    with torch.no_grad():
        yield Result(case="select", shape=shape, samples=bench.watch.rounds(contenders))


@torch.no_grad()
def read(bench: Bench, shape: Shape) -> Iterator[Result]:
    """The weighted sum of H * K rows a token; float32 and bfloat16 tables."""
    table_SV = make_table(shape, bench.device)
    slots_TR, weights_TR = _hits(shape, table_SV)
    for dtype in (torch.float32, torch.bfloat16):
        table = ValueTable(1, 1, device="meta")
        table_SV = table_SV.to(dtype)
        table.weight = nn.Parameter(table_SV)
        gate.check_read(shape, table, slots_TR, weights_TR)
        yield _read(bench, shape, table, slots_TR, weights_TR)


def _read(bench: Bench, shape: Shape, table: ValueTable, slots_TR: Tensor, weights_TR: Tensor) -> Result:
    table_SV, own_weights_TR = table.weight.data, weights_TR.to(table.weight.dtype)
    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: table.read(slots_TR, weights_TR),
        "F.embedding_bag": lambda: F.embedding_bag(slots_TR, table_SV, per_sample_weights=own_weights_TR, mode="sum"),
    }
    notes: tuple[str, ...] = ()
    ways: dict[str, Callable[[], object]] = {}
    if table_SV.shape[1] * table_SV.itemsize % 4 == 0:
        # As many bytes; what the sums of halves of numbers come to does not matter.
        ways = _ways_to_sum(bench, table_SV.view(torch.float32), slots_TR)
    samples = bench.watch.rounds({**contenders, **ways})
    if ways:
        notes = (f"{_ROWS}: without weights, {fold(samples, ways, _ROWS)}",)
    moved = float(slots_TR.numel() * table_SV.shape[1] * table_SV.itemsize)
    return Result(
        case="read",
        part=f"{str(table_SV.dtype).removeprefix('torch.')} table",
        shape=shape,
        samples=samples,
        work=dict.fromkeys(samples, (moved, "GB/s")),
        notes=notes,
    )


@torch.no_grad()
def forward(bench: Bench, shape: Shape) -> Iterator[Result]:
    """The layer in evaluation, and the sum of its limits."""
    modules, x_TD, notes = _modules(bench, shape)
    contenders = {name: call_of(module, x_TD) for name, module in modules.items()}
    table_SV = modules["textbook"].get_parameter("values").data
    slots_TR, _ = _hits(shape, table_SV)
    parts = {
        "query projection (limit)": limits.query_projection(shape, bench.device),
        "key products (limit)": limits.key_products(shape, bench.device),
        _ROWS: _ways_to_sum(bench, table_SV, slots_TR),
    }
    samples = bench.watch.rounds({**contenders, **{way: call for ways in parts.values() for way, call in ways.items()}})
    notes += [f"{name}: {fold(samples, ways, name)}" for name, ways in parts.items()]
    samples[_SUM] = [sum(together) for together in zip(*(samples[name] for name in parts), strict=True)]
    yield Result(case="forward", shape=shape, samples=samples, notes=tuple(notes))


def train(bench: Bench, shape: Shape) -> Iterator[Result]:
    """Forward, backward and update."""
    yield time_training(bench, "train", shape, TRAINED)


def memory(bench: Bench, shape: Shape) -> Iterator[Result]:
    """Peak memory of a training step, each contender in a process of its own."""
    samples, notes = {}, []
    for name in TRAINED:
        if not takes_part(name, shape):
            continue
        lack = bench.lacks(contender_bytes(name, shape))
        if lack:
            notes.append(f"{name}: {lack}")
            continue
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
    flushed = torch.zeros(max(2**26, 4 * cache_bytes(bench.device)) // 4, device=bench.device)
    modules, x_TD, notes = _modules(bench, one)
    contenders = {name: call_of(module, x_TD) for name, module in modules.items()}
    # Streams with the threads of torch, as the blocks before the layer would.
    samples = watch.rounds(contenders, before=lambda: flushed.add_(1))
    yield Result(case="decode", shape=one, samples=samples, notes=tuple(notes))


def machine(bench: Bench, shape: Shape) -> Iterator[Result]:
    """What the machine can do at the layer's shapes."""
    device = bench.device
    tables = [make_table(shape, device) for _ in range(3)]
    slots_TR, _ = _hits(shape, tables[0])
    touched_R = slots_TR.unique()
    projection, products = limits.product_flops(shape)
    row_bytes = 4.0 * shape.value_dim
    groups: dict[str, tuple[dict[str, Callable[[], object]], float, str]] = {
        "query projection": (limits.query_projection(shape, device), projection, "GFLOP/s"),
        "key products": (limits.key_products(shape, device), products, "GFLOP/s"),
        "random rows, summed": (_ways_to_sum(bench, tables[0], slots_TR), slots_TR.numel() * row_bytes, "GB/s"),
        "rows read and written in three tables, in order": (
            {name: _bind(kernel, *tables, touched_R) for name, kernel in bench.update_rows.items()},
            6 * len(touched_R) * row_bytes,
            "GB/s",
        ),
    }
    for name, (ways, moved) in limits.streams(device, bench.sum_rows).items():
        groups[f"stream, {name}"] = (ways, moved, "GB/s")
    with torch.no_grad():
        samples = bench.watch.rounds({way: call for ways, _, _ in groups.values() for way, call in ways.items()})
    best = {name: fold(samples, ways, name) for name, (ways, _, _) in groups.items()}
    notes = [f"{name}: {best[name]}" for name, (ways, _, _) in groups.items() if len(ways) > 1]
    notes.append(f"{slots_TR.numel():,} rows are read, {len(touched_R):,} of them different")
    work = {name: (amount, unit) for name, (_, amount, unit) in groups.items()}
    yield Result(case="machine", shape=shape, samples=samples, work=work, notes=tuple(notes))


def time_training(bench: Bench, case: str, shape: Shape, names: tuple[str, ...], part: str = "") -> Result:
    """Training steps of those contenders that take part and fit."""
    notes: list[str] = []
    able: list[str] = []
    for name in names:
        if takes_part(name, shape):
            lack = bench.lacks(contender_bytes(name, shape))
            (notes if lack else able).append(f"{name}: {lack}" if lack else name)
    if not able:
        return Result(case=case, part=part, shape=shape, notes=tuple(notes))
    steps, more = make_steps(tuple(able), shape, bench.device)
    return Result(case=case, part=part, shape=shape, samples=bench.watch.rounds(steps), notes=(*notes, *more))


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


def _ways_to_sum(bench: Bench, table_SV: Tensor, slots_TR: Tensor) -> dict[str, Callable[[], object]]:
    output_TV = torch.empty(len(slots_TR), table_SV.shape[1], device=bench.device)
    return {name: _bind(kernel, table_SV, slots_TR, output_TV) for name, kernel in bench.sum_rows.items()}


def _bind(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def call_of(module: nn.Module, x_TD: Tensor) -> Callable[[], object]:
    """A forward pass."""
    return lambda: module(x_TD)
