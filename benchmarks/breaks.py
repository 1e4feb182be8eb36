"""Breaks the package at random places, one at a time, and says which breaks no test sees.

    python benchmarks/breaks.py --seed 0 --count 60

A break changes a constant, a comparison, an operator or a condition, drops a statement, or swaps two arguments. Places
are drawn evenly over the areas. For each the tests of its module run, then, while they are green, those of its area, in
a copy of the tree. A line of JSON a break goes to the output as it is known; the same command goes on where it was
stopped. `breaks_without_effect.txt` lists breaks that change nothing that could be tested, each with the reason.

The kernels in Triton are left out: their tests run in an interpreter, for minutes.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = Path("src/memlayers")
WITHOUT_EFFECT = Path(__file__).with_name("breaks_without_effect.txt")
CORE = ("config", "query", "keys", "values", "usage", "layer", "memory_plus", "minimal", "parameters", "inference",
        "checks", "files", "sizes", "listening")  # fmt: skip

# The tests of an area that run where those of the module are green: files and folders below tests/.
AREAS = {
    "core": ["test_config.py", "test_files.py", "test_inference.py", "test_keys.py", "test_layer.py",
             "test_layer_seam.py", "test_memory_plus.py", "test_query.py", "test_try_infer.py", "test_usage.py",
             "test_values.py", "models/test_add.py"],
    "ops": ["ops/cpu", "ops/test_read.py", "ops/test_row_gradient.py", "ops/test_rounding.py", "ops/test_row_step.py",
            "ops/test_select.py", "ops/test_gpu_dispatch.py", "test_keys.py", "test_values.py", "optim"],
    "optim": ["optim", "test_values.py", "models/test_hf_trainer.py"],
    "models": ["models"],
    "diagnosis": ["diagnosis", "cli/test_doctor.py"],
    "lm": ["lm", "test_cli.py", "cli"],
}  # fmt: skip
# The tests of modules that are tested elsewhere than at the place that mirrors their own.
TESTS = {
    "files.py": ["test_file_names.py"],
    "listening.py": ["diagnosis/test_untouched.py"],
    "parameters.py": ["models/test_summary.py"],
    "checks.py": ["test_config.py", "optim/test_row_optimizer.py"],
    "models/storage.py": ["models/test_save_memory.py", "models/test_load_memory.py"],
    "models/folder.py": ["models/test_folder.py", "models/test_save_memory.py"],
    "models/classes.py": ["models/test_carriers.py", "models/test_initialisation.py"],
    "models/identity.py": ["models/test_identity.py", "models/test_classes.py"],
    "models/modules.py": ["models/test_freeze_base.py", "models/test_peft.py"],
    "models/install.py": ["models/test_add.py", "models/test_remove.py"],
    "models/checkpoints.py": ["models/test_checkpoints.py"],
    "diagnosis/": ["diagnosis/test_findings.py", "diagnosis/test_faults.py"],
    "lm/trainer.py": ["lm/test_golden_losses.py", "lm/test_train.py", "lm/test_resume.py"],
    "lm/build.py": ["lm/test_golden_losses.py", "lm/test_train.py"],
    "lm/data/": ["lm/data"],
}

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult}


@dataclass(frozen=True)
class Break:
    """One change of one file: what stands from `start` to `end` (bytes) becomes `after`."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int


def area_of(module: str) -> str | None:
    """The area of a file of the package, given relative to it; None for those that are not broken."""
    first, _, rest = module.partition("/")
    if not rest:
        return "core" if first.removesuffix(".py") in CORE else None
    return first if first in AREAS and not module.startswith("ops/gpu/") else None


def breaks_of(file: Path) -> list[Break]:
    """Every break that could be made of one file, in the order of the source."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, kind, broken in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        after = f"({ast.unparse(broken)})" if isinstance(broken, ast.expr) else ast.unparse(broken)
        before = source[start:end].decode()
        found.append(Break(file.as_posix(), node.lineno, kind, before, after, start, end))
    return sorted(found, key=lambda each: (each.start, each.kind))


def _changes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str, ast.expr | ast.stmt]]:
    for node in _executed(tree):
        broken = copy.deepcopy(node)
        match broken:
            case ast.Constant(value=bool()):
                broken.value = not broken.value
                yield node, "constant", broken
            case ast.Constant(value=int() | float()):
                broken.value = (
                    broken.value * 2 if isinstance(broken.value, float) and broken.value else broken.value + 1
                )
                yield node, "constant", broken
            case ast.Compare(ops=[op]):
                broken.ops = [_COMPARISONS[type(op)]()]
                yield node, "comparison", broken
            case ast.BoolOp():
                broken.op = ast.Or() if isinstance(broken.op, ast.And) else ast.And()
                yield node, "boolean", broken
            case ast.UnaryOp(op=ast.Not()):
                yield node, "boolean", broken.operand
            case ast.BinOp(op=op) if type(op) in _ARITHMETIC and not _is_text(broken):
                broken.op = _ARITHMETIC[type(op)]()
                yield node, "arithmetic", broken
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
                yield node, "dropped", ast.Pass()
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield node, "dropped", ast.Pass()
            case ast.Call(args=[ast.Name(id=first), ast.Name(id=second), *_]) if first != second:
                broken.args[0], broken.args[1] = broken.args[1], broken.args[0]
                yield node, "swapped", broken


def _executed(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """The nodes below this one that run: without annotations, texts, messages of errors, `__all__` and imports."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            match child:
                case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Assert():
                    continue
                case ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    continue
                case ast.Assign(targets=[ast.Name(id="__all__")]):
                    continue
                case ast.Raise():
                    yield child
                    continue
                case ast.expr() | ast.stmt():
                    yield child
            if isinstance(child, ast.AST):
                yield from _executed(child)


def _is_text(node: ast.AST) -> bool:
    return any(isinstance(each, ast.JoinedStr) or (isinstance(each, ast.Constant) and isinstance(each.value, str))
               for each in ast.walk(node))  # fmt: skip


def draw(root: Path, seed: int, count: int) -> list[Break]:
    """`count` breaks, the same for a seed and a tree: areas in turn, kinds evenly, no line twice."""
    chance = random.Random(seed)
    by_area: dict[str, list[Break]] = {area: [] for area in AREAS}
    for file in sorted((root / PACKAGE).rglob("*.py")):
        area = area_of(file.relative_to(root / PACKAGE).as_posix())
        if area is not None:
            by_area[area] += breaks_of(file)
    drawn: list[Break] = []
    lines: set[tuple[str, int]] = set()
    while len(drawn) < count:
        area = list(AREAS)[len(drawn) % len(AREAS)]
        kind = chance.choice(sorted({each.kind for each in by_area[area]}))
        found = chance.choice([each for each in by_area[area] if each.kind == kind])
        if (found.file, found.line) not in lines:
            lines.add((found.file, found.line))
            drawn.append(found)
    return [Break(**{**asdict(each), "file": Path(each.file).relative_to(root).as_posix()}) for each in drawn]


def tests_of(root: Path, module: str) -> Iterator[list[str]]:
    """What runs for a module, one list after the other: its own tests, then those of its area."""
    mirrored = Path(module).with_name(f"test_{Path(module).name}").as_posix()
    own = [mirrored, *(test for prefix, tests in TESTS.items() if module.startswith(prefix) for test in tests)]
    own = [f"tests/{test}" for test in dict.fromkeys(own) if (root / "tests" / test).exists()]
    if own:
        yield own
    area = area_of(module)
    assert area is not None
    yield [f"tests/{test}" for test in AREAS[area] if (root / "tests" / test).exists()]


def is_seen(root: Path, change: Break, seconds: float) -> str | None:
    """The test that saw it, or that something hung or could not be imported; None if all are green."""
    file = root / change.file
    original = file.read_bytes()
    file.write_bytes(original[: change.start] + change.after.encode() + original[change.end :])
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    if "/ops/cpu/" in change.file:  # Numba would take kernels from its cache that inline what is broken
        environment["NUMBA_CACHE_DIR"] = str(root / f"numba-{change.start}")
    try:
        for tests in tests_of(root, Path(change.file).relative_to(PACKAGE).as_posix()):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
            try:
                done = subprocess.run(
                    command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds, check=False
                )
            except subprocess.TimeoutExpired:
                return f"hung for {seconds:.0f} s"
            if done.returncode:
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return failed[0] if failed else f"pytest ended with {done.returncode}"
        return None
    finally:
        file.write_bytes(original)


def reason_without_effect(change: Mapping[str, Any], text: str) -> str | None:
    """Why no test could see a break of this text; None where the list of such has no reason for it."""
    line = text.splitlines()[change["line"] - 1]
    for known in WITHOUT_EFFECT.read_text().splitlines():
        if not known.startswith("#"):
            file, words, before, after, reason = (part.strip() for part in known.split(" | "))
            if (file, before, after) == (change["file"], change["before"], change["after"]) and words in line:
                return reason
    return None


def copy_tree(root: Path, folder: Path) -> None:
    for name in ("src", "tests", "benchmarks", "docs", "examples"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for file in root.iterdir():
        if file.is_file():
            shutil.copy(file, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=900.0, help="a test run that takes longer hangs")
    parser.add_argument("--output", type=Path, help="runs/breaks-SEED.jsonl, unless given")
    parser.add_argument("--areas", nargs="+", choices=list(AREAS), default=list(AREAS), help="run those of these areas")
    options = parser.parse_args(arguments)
    output: Path = options.output or ROOT / "runs" / f"breaks-{options.seed}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    if output.exists():
        results = [json.loads(line) for line in output.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as name, open(output, "a") as stream:
        root = Path(name)
        copy_tree(ROOT, root)
        done = [(each["file"], each["before"], each["after"], each["start"]) for each in results]
        for change in draw(root, options.seed, options.count):
            module = Path(change.file).relative_to(PACKAGE).as_posix()
            if area_of(module) not in options.areas:
                continue
            if (change.file, change.before, change.after, change.start) in done:
                continue
            reason = reason_without_effect(asdict(change), (root / change.file).read_text())
            seen = None if reason else is_seen(root, change, options.seconds)
            results.append({**asdict(change), "seen": seen})
            stream.write(json.dumps(results[-1]) + "\n")
            stream.flush()
            verdict = f"red: {seen}" if seen else f"no effect: {reason}" if reason else "GREEN"
            print(f"{change.file}:{change.line}: {change.before!r} -> {change.after!r}: {verdict}", flush=True)
        counted = [each for each in results if not reason_without_effect(each, (root / each["file"]).read_text())]
    red = sum(each["seen"] is not None for each in counted)
    print(f"{red} of {len(counted)} breaks are seen, {len(results) - len(counted)} more have no effect")


if __name__ == "__main__":
    main()
