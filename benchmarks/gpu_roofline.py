"""How long the GPU's kernels take on paper: from what they must move, and from the instructions they are compiled to.

    python benchmarks/gpu_roofline.py

Nothing is measured, and no GPU is needed: kernels are compiled for an H100 (an H200 has the same instructions), bytes
are counted by Triton's interpreter on a few tokens, with the blocks of the full size, and scaled. Prints Markdown, a
row an operation: the sum of its kernels; registers, warps, in flight and what binds are those of its main kernel.
Needs Triton 3.6 or later.

must move    bytes that no kernel could do without, each once; checked against the distinct bytes that are counted
asks for     bytes of all loads and stores; what is asked for again is mostly in a cache
instructions of a warp, counted in the machine code, times the trips of its loops, which are estimates: both sides of a
             branch count
in flight    bytes an SM has on their way if all loads of a trip are, in as many programs as fit it
at least     for each kernel the greatest of must move / bandwidth, of public data sheets, and of its instructions in
             each pipe / the rate of the pipe, below
bound by     which of these it is; where an H200's differs, it comes second
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor

from memlayers.ops import gpu
from memlayers.ops.registry import run

on_gpu = partial(run, "cuda")  # the name of an operation, and its arguments

HEADS, TOPK, SUBKEYS, WIDTH, HALF = 4, 32, 1024, 1024, 256
SLOTS, READS = SUBKEYS**2, HEADS * TOPK
FEW = 2  # tokens that are interpreted

# NVIDIA's data sheets of the SXM cards.
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
CLOCKS = 132 * 1.98e9  # of all SMs, a second
# Instructions of a warp that an SM takes a clock, at compute capability 9.0, from memory of public documents: the CUDA
# programming guide's table of arithmetic throughput (128 lanes a clock for sums and products of float32, so as many as
# are issued; 64 for integers, comparisons and selections; 32 for shuffles; 16 for conversions and special functions),
# and 32 lanes a clock for loads and stores. What is in no list counts as issued only, integer products among it.
RATES = {"issue": 4, "integers": 2, "shuffles": 1, "loads and stores": 1, "special functions": 0.5}
NAMES = {
    "integers": "IADD3 VIADD LEA ISETP FSETP SEL FSEL IMNMX FMNMX VIMNMX VIMNMX3 LOP3 SHF PRMT",
    "shuffles": "SHFL",
    "loads and stores": "LDG STG LDS STS LDSM STSM LDL STL LD ST ATOM ATOMG ATOMS RED",
    "special functions": "MUFU F2F F2I I2F I2I FRND POPC FLO",
}
PIPES = {name: pipe for pipe, names in NAMES.items() for name in names.split()}
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
        on_gpu("dot", table_SV, slots_TK, torch.zeros(tokens, WIDTH, device=device))
    else:
        on_gpu("read", table_SV, slots_TK, torch.zeros(tokens, READS, device=device))


def select_case(tokens: int, device: str) -> None:
    on_gpu("select", *torch.randn(2, HEADS, tokens, SUBKEYS, device=device), TOPK)


def backward_case(tokens: int, device: str) -> None:
    query = torch.zeros(tokens, HEADS, 2 * HALF, device=device)
    keys = torch.zeros(2, HEADS, SUBKEYS, HALF, device=device)
    slots = torch.arange(tokens * READS, device=device).view(tokens, HEADS, TOPK) * (SUBKEYS + 1) % SLOTS
    on_gpu("search_backward", torch.ones(tokens, HEADS, TOPK, device=device), slots, query, keys)


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
    on_gpu("row_adam_", table_SV, *moments, steps_S, *factors, 1e-3, 0.9, 0.999, 1e-8, seed=seed)


def norm_case(tokens: int, device: str) -> None:
    slots, factors = gradient(tokens, device)
    on_gpu("row_norm", *factors, slots)


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
    from kernel_tools.interpreted import checked

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


def instructions(kernel: Any, launch: Any) -> Counter[str]:
    """Of all warps, by pipe; all of them are issued."""
    known = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.settings
    trips = {
        "_read_kernel": lambda: math.ceil(READS / known["ROWS"]),
        "_dot_kernel": lambda: math.ceil(WIDTH / known["COLUMNS"]),
        "_walk": lambda: min(known["length"], known["count"]),
    }.get(launch.name, lambda: 1)()
    repeated = repeated_places(kernel)
    counted: Counter[str] = Counter()
    for place, name in enumerate(kernel.instructions):
        times = (trips if place in repeated else 1) * kernel.warps * launch.programs
        counted["issue"] += times
        if pipe := PIPES.get(name.split(".")[0]):
            counted[pipe] += times
    return counted


def repeated_places(kernel: Any) -> set[int]:
    """Of instructions in a loop."""
    return {place for loop in kernel.loops for place in loop}


def at_least(must_move: float, counted: Mapping[str, float], bandwidth: float) -> tuple[float, str]:
    """Seconds of a kernel, and what binds it."""
    times = {"bytes": must_move / bandwidth} | {pipe: counted[pipe] / (CLOCKS * rate) for pipe, rate in RATES.items()}
    return max((seconds, by) for by, seconds in times.items())


def programs_of_sm(kernel: Any) -> int:
    """How many fit."""
    registers = 8 * math.ceil(kernel.registers / 8) * 32 * kernel.warps
    return min(
        MOST_BLOCKS, MOST_WARPS // kernel.warps, REGISTERS // registers, SHARED_BYTES // (kernel.shared_bytes + 1024)
    )


def bytes_in_flight(kernel: Any) -> int:
    """Of an SM."""
    repeated = repeated_places(kernel)
    names = [name for place, name in enumerate(kernel.instructions) if not repeated or place in repeated]
    loads = [name for name in names if name.startswith("LDG")]
    widths = [next((size for mark, size in ((".128", 16), (".64", 8), ("16", 2)) if mark in name), 4) for name in loads]
    return sum(widths) * 32 * kernel.warps * programs_of_sm(kernel)


def line_of(case: Case, counted: dict[str, Counted]) -> str:
    """A line of Markdown: the sum of its kernels, and the main one's use of an SM."""
    from kernel_tools.compiled import SM_90, compile_launch, recorded

    few = case.must_move(FEW, counted_rows(case))
    if abs(counted[case.main].distinct / few - 1) > 0.02:
        raise RuntimeError(f"{case.name}: {few:,.0f} bytes must move, but {counted[case.main].distinct:,} are counted")
    with recorded() as launches:
        case.run(case.tokens, "meta")
    moved, asked, issued = 0.0, 0.0, 0.0
    times = dict.fromkeys(BANDWIDTHS, 0.0)
    for name in dict.fromkeys(launch.name for launch in launches):
        of_name = [launch for launch in launches if launch.name == name]
        kernel = compile_launch(of_name[0], SM_90)
        in_all = sum((instructions(kernel, launch) for launch in of_name), Counter[str]())
        asks, must = (size * case.tokens / FEW for size in counted[name])
        if name == case.main:
            must = case.must_move(case.tokens, rows_read(case.tokens, SLOTS))
        moved, asked, issued = moved + must, asked + asks, issued + in_all["issue"]
        floors = {card: at_least(must, in_all, bandwidth) for card, bandwidth in BANDWIDTHS.items()}
        times = {card: times[card] + seconds for card, (seconds, _) in floors.items()}
        if name == case.main:
            of_main, by = kernel, " / ".join(dict.fromkeys(by for _, by in floors.values()))
    return (
        f"| {case.name} | {moved / 1e9:.3f} | {asked / 1e9:.3f} | {issued / 1e6:,.1f} "
        f"| {of_main.registers} | {programs_of_sm(of_main) * of_main.warps} | {bytes_in_flight(of_main) / 1024:.0f} "
        f"| {1e3 * times['H100']:.3f} | {1e3 * times['H200']:.3f} | {by} |"
    )


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
        "| operation | must move, GB | asks for, GB | warp instructions, M | registers | warps an SM "
        "| in flight an SM, KB | H100 at least, ms | H200 at least, ms | bound by |"
    )
    print("|---|" + "---:|" * 8 + "---|")
    for case in CASES:
        print(line_of(case, counted[case.name]), flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
