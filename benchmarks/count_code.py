"""Lines of code by folder: without blank lines, comments and docstrings.

    python benchmarks/count_code.py [--root .] [FOLDER ...]

Without folders: the package, and the tools for developing its kernels.
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

FOLDERS = ("src/memlayers", "benchmarks/kernel_tools")
_NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


def lines_of_code(text: str) -> int:
    """The lines on which a token of code stands; those of a string that is an expression of its own do not count."""
    words: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - words)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    options = parser.parse_args(arguments)
    code: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    longest = (0, "")
    for folder in options.folders:
        for file in sorted((options.root / folder).rglob("*.py")):
            text = file.read_text()
            parts = file.relative_to(options.root / folder).parts
            name = f"{folder}/{parts[0]}/" if len(parts) > 1 else f"{folder}/*.py"
            code[name] += lines_of_code(text)
            lines[name] += len(text.splitlines())
            files[name] += 1
            longest = max(longest, (len(text.splitlines()), file.relative_to(options.root).as_posix()))
    for name in code:
        print(f"{code[name]:7,} of {lines[name]:7,} lines in {files[name]:4} files  {name}")
    print(f"{code.total():7,} of {lines.total():7,} lines in {files.total():4} files")
    print(f"the longest file has {longest[0]} lines: {longest[1]}")


if __name__ == "__main__":
    main()
