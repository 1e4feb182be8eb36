"""Imports run downwards: the modules stand in layers, no module is imported by one below it, and there is no circle.

An import counts wherever it stands: at the top of a module, inside a function, or for the type checker alone. Each one
inside a function says why in a comment.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "memlayers"

# From the bottom to the top, as docs/contributing.md shows it. The root, `memlayers` itself, is above all of them.
LAYERS = {
    "base": (
        "version after_import checks launch files sizes extras console signals available torch_private listening "
        "hardware presentation"
    ),
    "operations": "ops",
    "layer": "config query keys values usage usage_metric layer memory_plus experts minimal parameters",
    "inference": "inference",
    "tables": "storage",
    "processes": "distributed",
    "optimizers": "optim",
    "models": "models",
    "diagnosis": "diagnosis",
    "finetuning": "finetuning",
    "looking inside": "explorer",
    "language models": "lm",
    "experiments": "experiments",
    "bench": "bench",
    "command line": "info cli __main__",
}
HEIGHT = {module: height for height, modules in enumerate(LAYERS.values()) for module in modules.split()}

# What may be imported inside a function: what is optional, slow to import, or not on every system ...
LATE = {
    "accelerate", "datasets", "fcntl", "huggingface_hub", "jinja2", "jsonargparse", "matplotlib", "numba", "numpy",
    "pandas", "pyarrow", "resource", "safetensors", "tensorboard", "tokenizers", "torch", "tqdm", "transformers",
    "triton", "zstandard",
}  # fmt: skip
# ... and who may import the package's own modules there: public names that need transformers, and commands.
LATE_HERE = (
    "memlayers",
    "memlayers.models",
    "memlayers.diagnosis",
    "memlayers.finetuning",
    "memlayers.lm.run",
    "memlayers.cli",
    "memlayers.cli.*",
)


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    late: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported} (line {self.line})"


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}


def imports(name: str) -> Iterator[Import]:
    """Every import of a module: the modules of ours that it names, the other packages by their first name."""
    for node, is_late in statements(TREES[name]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: write the whole name of the module"
            assert node.module is not None
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.partition(".")[0] != "memlayers":
                imported = target.partition(".")[0]
            else:
                imported = target if target in FILES else target.rpartition(".")[0]
            yield Import(name, imported, node.lineno, is_late)


def statements(node: ast.AST, is_late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All statements below a node, each with whether it stands inside a function."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(node, field, ()):
            yield inner, is_late
            yield from statements(inner, is_late or isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef))


ALL = [found for name in FILES for found in imports(name)]
OURS = [found for found in ALL if found.imported.partition(".")[0] == "memlayers" and found.importer != "memlayers"]


def height(module: str) -> int:
    return HEIGHT[module.split(".")[1]]


def test_every_module_has_its_layer_and_every_layer_its_modules():
    inside = {name.split(".")[1] for name in FILES if name != "memlayers"}
    assert sorted(inside ^ HEIGHT.keys()) == []


def test_the_page_for_contributors_shows_the_layers():
    page = (Path(__file__).parent.parent / "docs" / "contributing.md").read_text()
    (shown,) = re.findall(r"```\n(base .*?)```", page, re.DOTALL)
    assert [re.split(r" {2,}", line, maxsplit=1) for line in shown.splitlines()] == [
        [layer, ", ".join(modules.split())] for layer, modules in LAYERS.items()
    ]


def test_the_tests_have_the_folders_of_the_package():
    tests, source = (folders(root) for root in (Path(__file__).parent, SOURCE))
    assert sorted(tests - source) == ["benchmarks"]
    assert sorted(source - tests) == []


def folders(root: Path) -> set[str]:
    return {file.parent.relative_to(root).as_posix() for file in root.rglob("*.py")}


def test_nothing_inside_the_package_imports_its_root():
    assert [str(found) for found in OURS if found.imported == "memlayers"] == []


def test_imports_run_downwards():
    assert [str(found) for found in OURS if height(found.imported) > height(found.importer)] == []


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that can all be reached from each other (Tarjan's components of more than one)."""
    found: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        path.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in path:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            circle = path[path.index(node) :]
            del path[path.index(node) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}}, [["b", "c"], ["d", "e"]]),
    ],
)
def test_circles_are_found(edges, expected):
    assert circles(edges) == expected


def test_no_modules_import_each_other_in_a_circle():
    edges: dict[str, set[str]] = {}
    for found in OURS:
        edges.setdefault(found.importer, set()).add(found.imported)
    assert circles(edges) == []


def test_an_import_inside_a_function_is_one_of_a_few_and_says_why():
    wrong = []
    for found in ALL:
        if not found.late:
            continue
        if not (matches(found.importer, LATE_HERE) if found.imported in FILES else found.imported in LATE):
            wrong.append(f"{found}: it belongs to the top of the module")
        elif not has_reason(FILES[found.importer].read_text().splitlines(), found.line):
            wrong.append(f"{found}: no comment says why it stands inside a function")
    assert wrong == []


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def has_reason(lines: list[str], line: int) -> bool:
    """Whether a comment stands on this line, above it, or on one of the imports just above that it stands with."""
    for text in reversed(lines[:line]):
        code, mark, _ = text.partition("#")
        if mark:
            return not code.strip() or code.split()[0] in ("import", "from")
        if code.split()[:1] not in (["import"], ["from"]):
            return False
    return False


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ("import a  # slow", True),
        ("# slow\nimport a", True),
        ("# slow\nimport b\nimport a", True),
        ("import b  # slow\nimport a", True),
        ("import a", False),
        ("# far\nx = 1\nimport a", False),
        ("x = 1  # another matter\nimport a", False),
    ],
)
def test_a_reason_is_a_comment_at_the_import(above, expected):
    lines = above.splitlines()
    assert has_reason(lines, len(lines)) is expected
