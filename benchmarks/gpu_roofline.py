"""How long the GPU's kernels take on paper: from what they must move, and from the instructions they are compiled to.

    python benchmarks/gpu_roofline.py

Nothing is measured, and no GPU is needed: kernels are compiled for an H100 (an H200 has the same instructions), bytes
are counted by Triton's interpreter on a few tokens, with the blocks of the full size, and scaled. Prints Markdown.

must move    bytes that no kernel could do without, each once; checked against the distinct bytes that are counted
asks for     bytes of all loads and stores; what is asked for again is mostly in a cache
instructions of a warp, counted in the machine code, times the trips of its loops, which are estimates: both sides of a
             branch count, but for the rarely used exact path of select
in flight    bytes an SM has on their way if all loads of a trip are, in as many programs as fit it
at least     the greater of must move / bandwidth and instructions / issue rate, of public data sheets
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor

from memlayers.ops import gpu
from memlayers.ops.read import dot_on_gpu, read_on_gpu
from memlayers.ops.row_step import row_adam_on_gpu_
from memlayers.ops.row_sum import row_norm_on_gpu
from memlayers.ops.search import search_backward_on_gpu
from memlayers.ops.select import select_on_gpu

HEADS, TOPK, SUBKEYS, WIDTH, HALF = 4, 32, 1024, 1024, 256
SLOTS, READS = SUBKEYS**2, HEADS * TOPK
FEW = 2  # tokens that are interpreted

# NVIDIA's data sheets of the SXM cards; both have four schedulers an SM.
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
ISSUES = 132 * 4 * 1.755e9
# Of an SM.
REGISTERS, SHARED_BYTES, MOST_WARPS, MOST_BLOCKS = 65536, 227 * 1024, 64, 32


class Case(NamedTuple):
    """run: of (tokens, device). must_move: bytes of the main kernel, of (tokens, rows that are read)."""

    name: str
    tokens: int
    main: str
    run: Callable[[int, str], object]
    must_move: Callable[[int, float], float]


class Counted(NamedTuple):
    """Of one kernel on a few tokens."""

    asked: int
    distinct: int


def slots_of(tokens: int, device: str) -> Tensor:
    """Slots in order, which are distinct: a table has that many rows here."""
    return torch.arange(tokens * READS, device=device).view(tokens, READS)


def read_case(dtype: torch.dtype, tokens: int, device: str, of_outputs: bool = False) -> None:
    rows = SLOTS if device == "meta" else tokens * READS
    table_SV, slots_TK = torch.zeros(rows, WIDTH, dtype=dtype, device=device), slots_of(tokens, device)
    if of_outputs:
        dot_on_gpu(table_SV, slots_TK, torch.zeros(tokens, WIDTH, device=device))
    else:
        read_on_gpu(table_SV, slots_TK, torch.zeros(tokens, READS, device=device))


def select_case(tokens: int, device: str) -> None:
    select_on_gpu(*torch.randn(2, HEADS, tokens, SUBKEYS, device=device), TOPK)


def backward_case(tokens: int, device: str) -> None:
    query = torch.zeros(tokens, HEADS, 2 * HALF, device=device)
    keys = torch.zeros(2, HEADS, SUBKEYS, HALF, device=device)
    slots = torch.arange(tokens * READS, device=device).view(tokens, HEADS, TOPK) * (SUBKEYS + 1) % SLOTS
    search_backward_on_gpu(torch.ones(tokens, HEADS, TOPK, device=device), slots, query, keys)


def gradient(tokens: int, device: str) -> tuple[int, list[list[Tensor]]]:
    """Slots of the table, and the gradient's factors; as many reads a slot for a few tokens as for many."""
    slots = SLOTS if device == "meta" else round(SLOTS * tokens / STEP_TOKENS)
    generator = torch.Generator(device).manual_seed(0) if device != "meta" else None
    slots_TK = torch.randint(slots, (tokens, READS), generator=generator, device=device)
    return slots, [[slots_TK], [torch.ones(tokens, READS, device=device)], [torch.ones(tokens, WIDTH, device=device)]]


def adam_case(dtype: torch.dtype, tokens: int, device: str) -> None:
    slots, factors = gradient(tokens, device)
    table_SV = torch.zeros(slots, WIDTH, dtype=dtype, device=device)
    moments, steps_S = torch.zeros(2, slots, WIDTH, device=device), torch.zeros(slots, dtype=torch.int32, device=device)
    seed = 0 if dtype == torch.bfloat16 else -1
    row_adam_on_gpu_(table_SV, *moments, steps_S, *factors, 1e-3, 0.9, 0.999, 1e-8, seed=seed)


def norm_case(tokens: int, device: str) -> None:
    slots, factors = gradient(tokens, device)
    row_norm_on_gpu(*factors, slots)


READ_TOKENS, STEP_TOKENS = 16384, 2048


def bytes_read(itemsize: int, tokens: int, rows: float) -> float:
    return tokens * (READS * (WIDTH * itemsize + 8 + 4) + 4 * WIDTH)


def bytes_summed(per_row: int, tokens: int, rows: float) -> float:
    """Entries (key, token, weight) and gradients in; rows in and out."""
    return tokens * (READS * 12 + 4 * WIDTH) + rows * per_row


CASES = [
    Case("read, float32", READ_TOKENS, "_read_kernel", partial(read_case, torch.float32), partial(bytes_read, 4)),
    Case("read, bfloat16", READ_TOKENS, "_read_kernel", partial(read_case, torch.bfloat16), partial(bytes_read, 2)),
    Case(
        "dot, float32", READ_TOKENS, "_dot_kernel", partial(read_case, torch.float32, of_outputs=True),
        partial(bytes_read, 4),
    ),
    Case(
        "dot, bfloat16", READ_TOKENS, "_dot_kernel", partial(read_case, torch.bfloat16, of_outputs=True),
        partial(bytes_read, 2),
    ),
    Case(
        "select", READ_TOKENS, "_select", select_case,
        lambda tokens, rows: tokens * HEADS * (2 * SUBKEYS * 4 + TOPK * (4 + 8)),
    ),
    Case(
        "gradient of half scores", READ_TOKENS, "_scatter", backward_case,
        lambda tokens, rows: tokens * READS * (4 + 8 + 2 * 4),
    ),
    Case(
        "RowAdam, float32 table", STEP_TOKENS, "_walk", partial(adam_case, torch.float32),
        partial(bytes_summed, 2 * 3 * WIDTH * 4 + 4),
    ),
    Case(
        "RowAdam, bfloat16 table", STEP_TOKENS, "_walk", partial(adam_case, torch.bfloat16),
        partial(bytes_summed, 2 * (2 + 2 * 4) * WIDTH + 4),
    ),
    Case("norm of row gradients", STEP_TOKENS, "_walk", norm_case, partial(bytes_summed, 0)),
]  # fmt: skip


def as_for_many_tokens() -> None:
    """The blocks of the full size, though there are few tokens."""
    reading, rows = gpu.kernels("read"), gpu.kernels("rows")
    assert reading is not None
    assert rows is not None
    reading._FEW_PROGRAMS = 0
    length = rows.block_length(STEP_TOKENS * READS)
    rows.block_length = lambda count: length


def count() -> dict[str, dict[str, Counted]]:
    """By case and kernel, in this process."""
    from memlayers.bench.interpreted import checked

    as_for_many_tokens()
    counted = {}
    for case in CASES:
        with checked() as launches:
            case.run(FEW, "cpu")
        of_case: dict[str, Counted] = {}
        for launch in launches:
            before = of_case.get(launch.name, Counted(0, 0))
            distinct = sum(moved.distinct_loaded + moved.distinct_stored for moved in launch.arguments.values())
            of_case[launch.name] = Counted(before.asked + launch.loaded + launch.stored, before.distinct + distinct)
        counted[case.name] = of_case
    return counted


def count_in_another_process() -> dict[str, dict[str, Counted]]:
    """Whether Triton interprets is decided when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, "--count_only", "true"]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return {
        case: {kernel: Counted(*bytes_) for kernel, bytes_ in of_case.items()}
        for case, of_case in json.loads(said.stdout).items()
    }


def rows_read(tokens: int, slots: int) -> float:
    """How many of the slots are expected to be read, at random."""
    return slots * -math.expm1(-tokens * READS / slots)


def instructions(kernel: Any, launch: Any) -> float:
    """Of all warps."""
    known = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.settings
    trips = {
        "_read_kernel": lambda: math.ceil(READS / known["ROWS"]),
        "_dot_kernel": lambda: math.ceil(WIDTH / known["COLUMNS"]),
        "_walk": lambda: min(known["length"], known["count"]),
    }.get(launch.name, lambda: 1)()
    usual, repeated = usual_places(kernel)
    of_warp = sum(trips if place in repeated else 1 for place in usual)
    return of_warp * kernel.warps * launch.programs


def usual_places(kernel: Any) -> tuple[list[int], set[int]]:
    """Places of instructions that are run each time, and of those among them in a loop.

    The exact path of select, for scores that differ in their last bits only, is one that is jumped over, loops and all.
    """
    loops = kernel.loops
    rare = [
        range(place + 1, to)
        for place, to in kernel.jumps
        if kernel.name == "_select" and any(place < loop.start and loop.stop <= to for loop in loops)
    ]
    usual = [place for place in range(len(kernel.instructions)) if not any(place in part for part in rare)]
    return usual, {place for place in usual if any(place in loop for loop in loops)}


def programs_of_sm(kernel: Any) -> int:
    """How many fit."""
    registers = 8 * math.ceil(kernel.registers / 8) * 32 * kernel.warps
    return min(
        MOST_BLOCKS, MOST_WARPS // kernel.warps, REGISTERS // registers, SHARED_BYTES // (kernel.shared_bytes + 1024)
    )


def bytes_in_flight(kernel: Any) -> int:
    """Of an SM."""
    usual, repeated = usual_places(kernel)
    names = [kernel.instructions[place] for place in repeated or usual]
    loads = [name for name in names if name.startswith("LDG")]
    widths = [next((size for mark, size in ((".128", 16), (".64", 8), ("16", 2)) if mark in name), 4) for name in loads]
    return sum(widths) * 32 * kernel.warps * programs_of_sm(kernel)


def lines_of(case: Case, counted: dict[str, Counted]) -> list[str]:
    """A line of Markdown for each kernel."""
    from memlayers.bench.compiled import SM_90, compile_launch, recorded

    few = case.must_move(FEW, counted_rows(case))
    if abs(counted[case.main].distinct / few - 1) > 0.02:
        raise RuntimeError(f"{case.name}: {few:,.0f} bytes must move, but {counted[case.main].distinct:,} are counted")
    with recorded() as launches:
        case.run(case.tokens, "meta")
    lines = []
    for name in dict.fromkeys(launch.name for launch in launches):
        of_name = [launch for launch in launches if launch.name == name]
        kernel = compile_launch(of_name[0], SM_90)
        asked, distinct = (size * case.tokens / FEW for size in counted[name])
        must = case.must_move(case.tokens, rows_read(case.tokens, SLOTS)) if name == case.main else distinct
        issued = sum(instructions(kernel, launch) for launch in of_name)
        times = [1e3 * max(must / bandwidth, issued / ISSUES) for bandwidth in BANDWIDTHS.values()]
        by = "bytes" if must / BANDWIDTHS["H100"] > issued / ISSUES else "instructions"
        lines.append(
            f"| {case.name} | `{name.strip('_')}` | {must / 1e9:.3f} | {asked / 1e9:.3f} | {issued / 1e6:,.1f} "
            f"| {kernel.registers} | {programs_of_sm(kernel) * kernel.warps} | {bytes_in_flight(kernel) / 1024:.0f} "
            f"| {times[0]:.3f} | {times[1]:.3f} | {by} |"
        )
    return lines


def counted_rows(case: Case) -> int:
    """Rows that the few tokens read, where they may read one twice."""
    if case.tokens != STEP_TOKENS:
        return FEW * READS
    return len(gradient(FEW, "cpu")[1][0][0].unique())


def main(count_only: bool = False) -> None:
    """Prints the table; takes some minutes.

    Args:
        count_only: Print the bytes of a few tokens instead, as JSON: what the script asks a process that interprets.
    """
    if count_only:
        print(json.dumps(count()))
        return
    counted = count_in_another_process()
    print("On paper, not measured. H = 4, K = 32, N = 1,024, V = 1,024, a table of 2^20 rows, random slots.")
    print(f"{READ_TOKENS:,} tokens ({READ_TOKENS * HEADS:,} queries); row steps and norms {STEP_TOKENS:,} tokens.\n")
    print(
        "| operation | kernel | must move, GB | asks for, GB | warp instructions, M ≈ | registers | warps an SM "
        "| in flight an SM, KB | H100 at least, ms | H200 at least, ms | bound by |"
    )
    print("|---|---|" + "---:|" * 8 + "---|")
    for case in CASES:
        for line in lines_of(case, counted[case.name]):
            print(line, flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
