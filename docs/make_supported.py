"""The page docs/supported.md: `python docs/make_supported.py` writes it again, from the tests' own marks.

A test with ``@pytest.mark.promise(topic, what, answer, how)`` stands for one row. Tests are read, not run.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "supported.md"

TOPICS = (
    "Threads and servers",
    "Derivatives",
    "Averages and copies",
    "Gradients by hand",
    "Heads and classes",
    "Trainers",
    "Several processes",
    "Checkpoints of PyTorch",
    "Quantised models",
    "Tables in files",
    "Tables on the host",
    "Adapters",
    "Masks",
    "Saving and loading",
    "Export and counting",
    "Command line and files",
)
ANSWERS = ("supported", "refused", "changed")

HEAD = """\
# Supported, refused, changed

What people do with a model that has memories, and what happens: it is right ("supported"), or an error names the remedy
("refused"), or it does something else than it did in earlier versions ("changed"). Each row is held by a test, which is
named. `python docs/make_supported.py` writes this page from the marks of the tests.
"""


class Promise(NamedTuple):
    """A row: what people do, the answer, how (or the remedy), and the test that holds it."""

    topic: str
    what: str
    answer: str
    how: str
    test: str


def promises(tests: Path = ROOT / "tests") -> list[Promise]:
    """The rows, by topic, then in the order of files and of tests in them. Raises `ValueError` for a bad mark."""
    found: list[Promise] = []
    for path in sorted(tests.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.promise" in text:
            found += _of_file(ast.parse(text), path.relative_to(tests.parent).as_posix())
    return sorted(found, key=lambda promise: TOPICS.index(promise.topic))


def _of_file(tree: ast.Module, path: str) -> Iterator[Promise]:
    for statement in tree.body:
        test = f"{path}::{statement.name}" if isinstance(statement, ast.FunctionDef) else path
        marks = (node for node in ast.walk(statement) if isinstance(node, ast.Call) and _is_promise(node.func))
        for mark in sorted(marks, key=lambda node: node.lineno):
            try:
                topic, what, answer, how = (ast.literal_eval(argument) for argument in mark.args)
            except ValueError:
                raise ValueError(f"{path}, line {mark.lineno}: a promise must be four literal texts") from None
            if topic not in TOPICS or answer not in ANSWERS or any("\n" in text for text in (what, how)):
                raise ValueError(
                    f"{path}, line {mark.lineno}: a promise must have a topic of {TOPICS}, an answer of {ANSWERS} and "
                    f"texts of one line, got {(topic, what, answer, how)}"
                )
            yield Promise(topic, what, answer, how, test)


def _is_promise(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == "promise"


def page(rows: list[Promise]) -> str:
    """The whole page, as Markdown."""
    parts = [HEAD]
    for topic in TOPICS:
        lines = [
            f"| {_cell(row.what)} | {row.answer} | {_cell(row.how)} | `{row.test.removeprefix('tests/')}` |"
            for row in rows
            if row.topic == topic
        ]
        if lines:
            head = "| what people do | | how, or the remedy | held by |\n|---|---|---|---|"
            parts.append("\n".join((f"## {topic}\n", head, *lines, "")))
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    rows = promises()
    PAGE.write_text(page(rows), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(rows)} rows")
