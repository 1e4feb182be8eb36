"""A file of options, in YAML or JSON, and a value as it is written in one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

MOST_LEVELS = 16


def read_options_file(file: str) -> dict[Any, Any]:
    """What the file says. Raises `ValueError`, naming the file and the place, unless it holds fields and values."""
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"config file {file} cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {file} is no text: not UTF-8 at byte {error.start}") from None
    if file.lower().endswith(".json"):
        text = text.replace("\t", " ")  # which JSON has between its words alone, and YAML nowhere
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file} is not valid YAML: {_what_and_where(error)}") from None
    except ValueError as error:
        raise ValueError(f"config file {file} is not readable: {error}") from None
    if content is None:
        raise ValueError(f"config file {file} is empty")
    if not isinstance(content, Mapping):
        raise ValueError(f"config file {file} must hold fields and their values, got {str(content)[:80]!r}")
    return dict(content)


def read_value(text: str) -> Any:
    """A value as a file of options has it; text that is no YAML stays text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text


class _Loader(yaml.SafeLoader):
    """Reads plain data: no key twice, where the last one would count without a word, and not nested without end."""

    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.levels += 1
        if self.levels > MOST_LEVELS:  # thousands of them end the process
            raise ValueError(
                f"more than {MOST_LEVELS} levels of nesting (line {self.peek_event().start_mark.line + 1})"
            )
        node = super().compose_node(parent, index)
        self.levels -= 1
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in keys:
                    raise ValueError(f"{key.value!r} is given twice (line {key.start_mark.line + 1})")
                keys.add(key.value)
        return node


# YAML 1.1 wants a dot and a sign in 1.0e+3; JSON, and people, write 1e3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
# YAML 1.1 reads 010 as eight and 1:30 as ninety. Such words stay text, which the check of a number refuses.
_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INTEGER]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INTEGER, re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$"), list("-+0123456789")
)


def _what_and_where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())
