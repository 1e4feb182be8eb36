"""A file of options, in YAML or JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader

MOST_LEVELS = 16


def read_config_file(file: str) -> Mapping[Any, Any]:
    """What the file says. Raises `ValueError`, naming the file and the place, unless it holds fields and values."""
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"config file {file} cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {file} is no text: not UTF-8 at byte {error.start}") from None
    try:
        _require_shallow(text)
        _require_unique(yaml.compose(text, Loader=yaml.SafeLoader))
        content = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file} is not valid YAML: {_what_and_where(error)}") from None
    except ValueError as error:
        raise ValueError(f"config file {file} is not readable: {error}") from None
    if not text.strip() or content is None:
        raise ValueError(f"config file {file} is empty")
    if not isinstance(content, Mapping):
        raise ValueError(f"config file {file} must hold fields and their values, got {str(content)[:80]!r}")
    return content


def _require_shallow(text: str) -> None:
    """Raises `ValueError` for nesting that no configuration has: thousands of levels end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_LEVELS:
            raise ValueError(f"more than {MOST_LEVELS} levels of nesting (line {event.start_mark.line + 1})")


def _require_unique(node: yaml.Node | None) -> None:
    """Raises `ValueError` for a key that a mapping has twice: the last one would count without a word."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise ValueError(f"{key.value!r} is given twice (line {key.start_mark.line + 1})")
                    keys.add(key.value)


def _what_and_where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())
