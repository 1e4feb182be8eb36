"""A run of the bench: check what was asked for, open the gate, run the cases, write what came out."""

import dataclasses
import itertools
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memlayers.bench import cases, gate, report
from memlayers.bench.cases import DTYPES
from memlayers.bench.machine import (
    commit,
    device_of,
    full_precision,
    gpu_of,
    kernels_on,
    quiet_collector,
    threads,
)
from memlayers.bench.result import Result
from memlayers.bench.shapes import AXES, SHAPES, Axis, Shape, shape
from memlayers.bench.sweeps import sweep_axis
from memlayers.bench.timing import Stopwatch
from memlayers.checks import check_settings, setting
from memlayers.files import new_folder, write_json, write_text
from memlayers.hardware import hardware, versions

_BARS = ("512x512", "1024x1024")  # the shapes of the published figures
_GPU_TOKENS = 2**14


@dataclass(frozen=True)
class Case:
    """One entry of the list of cases."""

    name: str
    run: cases.Run
    shapes: tuple[str, ...] = _BARS  # where it is measured unless shapes are named; a sweep starts from each
    tables: float = 0.0  # float32 tables that it cannot run without; 0 where that is the contenders' affair
    gpu_tokens: int | None = None  # tokens on a GPU, unless they are given, where those of the shape do not fill it


def _sweep(axis: Axis) -> cases.Run:
    return lambda bench, base: sweep_axis(bench, axis, base)


def registry() -> tuple[Case, ...]:
    """All cases, in the order in which they run."""
    return (
        Case("machine", cases.machine, tables=3),
        Case("select", cases.select, gpu_tokens=_GPU_TOKENS),
        Case("read", cases.read, tables=1.5, gpu_tokens=_GPU_TOKENS),
        Case("update", cases.update, tables=3.5),
        Case("forward", cases.forward, tables=1),
        Case("train", cases.train),
        Case("memory", cases.memory, (*_BARS, "2048x2048")),
        Case("decode", cases.decode, tables=1),
        *(Case(axis, _sweep(axis), _BARS[:1]) for axis in AXES),
    )


def case_names() -> tuple[str, ...]:
    """Their names."""
    return tuple(case.name for case in registry())


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure, and how long.

    Raises `ValueError` naming the field, its value and what is allowed.
    """

    cases: tuple[str, ...] = setting(case_names(), f"what to measure, of {', '.join(case_names())}")
    shapes: tuple[str, ...] = setting(
        (), f"at which shapes, of {', '.join(SHAPES)}; none: those of the published figures"
    )
    tokens: tuple[int, ...] = setting(
        (), "tokens of a batch, one or more; none: those of the shape, on a GPU 16384 for select and read", least=1
    )
    dtypes: tuple[str, ...] = setting(
        (),
        f"in which, of {', '.join(DTYPES)} (float32 weights under it); none: both tables for read and update, "
        "float32 for the rest; other cases than these, forward, train and decode know no other",
    )
    device: str = setting("auto", "auto, cpu or cuda; auto: the GPU if there is one")
    threads: int | None = setting(None, "CPU threads; null: as many as PyTorch uses", least=1)
    repeats: int = setting(11, "rounds of a case that are counted", least=1)
    budget: float = setting(
        20.0, "seconds of a case after which no further round begins, once there were three", above=0
    )
    output: str | None = setting(None, "folder for results.json, table.md and plots; it must not exist yet")

    def __post_init__(self) -> None:
        if isinstance(self.tokens, int | None):  # one number, as it was before there could be several
            object.__setattr__(self, "tokens", () if self.tokens is None else (self.tokens,))
        check_settings(self)
        known = case_names()
        for case in self.cases or [""]:
            if case not in known:
                raise ValueError(f"cases must be some of {', '.join(known)}, got {case!r}")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtypes must be some of {', '.join(DTYPES)}, got {dtype!r}")
        device_of(self.device)
        for _ in self.pairs():  # names of shapes, and numbers of tokens
            pass
        if 1 in self.tokens and {"train", "memory"} & set(self.cases):
            raise ValueError("tokens must be at least 2 where BatchNorm is trained (train, memory), got 1")
        if self.output is not None:
            _check_output(Path(self.output))

    def pairs(self) -> Iterator[tuple[Case, Shape]]:
        """The cases that are asked for, each with each of its shapes."""
        is_gpu = device_of(self.device).type == "cuda"
        for case in registry():
            given = self.tokens or (case.gpu_tokens if is_gpu else None,)
            for name, tokens in itertools.product(self.shapes or case.shapes, given):
                one = shape(name)
                if case.name in self.cases:
                    yield case, one if tokens is None else dataclasses.replace(one, tokens=tokens)


def run(config: BenchConfig, *, say: Callable[[str], None], command: str | None = None) -> str:
    """Run the bench; returns the table.

    say: takes lines about the progress. command: what was typed, for the record. Raises `gate.GateError` if a result is
    wrong: before anything is timed, unless it is wrong at full size only.
    """
    device = device_of(config.device)
    results: list[Result] = []
    with threads(config.threads), full_precision(), quiet_collector():
        content: dict[str, Any] = {
            "command": command or shlex.join(sys.argv),
            "config": dataclasses.asdict(config),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "device": str(device),
            "gpu": gpu_of(device) if device.type == "cuda" else None,
            "kernels": kernels_on(device),
        }
        _open_gate(config, device, say)
        bench = cases.Bench.on(Stopwatch(device=device, repeats=config.repeats, budget=config.budget), config.dtypes)
        for case, one in config.pairs():
            say(f"{case.name}: {one.name}, {one.describe()}")
            torch.manual_seed(0)
            for result in _results(case, bench, one):
                for line in report.lines(result):
                    say(f"  {line}")
                results.append(result)
    table = report.markdown(content, results)
    if config.output is not None:
        with new_folder(Path(config.output)) as folder:
            write_json(folder / "results.json", {**content, "results": [result.to_dict() for result in results]})
            write_text(folder / "table.md", table)
            for axis in AXES:
                report.plot(axis, [result for result in results if result.case == axis], folder / f"{axis}.png")
    return table


def _open_gate(config: BenchConfig, device: torch.device, say: Callable[[str], None]) -> None:
    checked: list[Shape] = []
    for _, one in config.pairs():
        for smaller in gate.smaller_shapes(one):
            if not any(smaller == dataclasses.replace(other, name=smaller.name) for other in checked):
                say(f"gate: for {smaller.name}, {smaller.describe()}")
                gate.check(smaller, device)
                checked.append(smaller)


def _results(case: Case, bench: cases.Bench, one: Shape) -> Iterator[Result]:
    lack = bench.lacks(int(case.tables * one.table_bytes) + one.workspace_bytes)
    if lack:
        yield Result(case=case.name, shape=one, notes=(f"skipped: {lack}",))
        return
    try:
        yield from case.run(bench, one)
        return
    except torch.OutOfMemoryError as error:  # of a GPU; what was measured before it stays, and other cases follow
        lack = " ".join(str(error).split())[:200]
    yield Result(case=case.name, shape=one, notes=(f"stopped: {lack}",))


def _check_output(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"output must be a folder that does not exist yet, got {str(folder)!r}")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    try:  # in earnest: access rights do not say all
        os.rmdir(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise ValueError(f"output must be in a folder that can be written to, got {str(folder)!r} ({error})") from None
