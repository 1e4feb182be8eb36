"""One line for what the parser does not take: the option, what was given, and what is allowed."""

import re
import types
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, get_loader

from memlayers.cli.options import Base
from memlayers.config import instead

_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def refusal(
    error: ArgumentError, command: str, parser: ArgumentParser, arguments: Sequence[str], base: Base | None
) -> str:
    """What is wrong with the arguments of a command, given what its parser said."""
    known = {option for action in parser._actions for option in action.option_strings}
    for argument in arguments:
        option = argument.partition("=")[0]
        if argument.startswith("--") and len(option) > 2 and " " not in option and option not in known:
            return f"unknown option {option}; {_advice(option, known, command)}"
    said = " ".join(str(error.message).split())
    if missing := re.search(r"arguments are required: (.*)", said):
        names = [name.rpartition(".")[2] for name in missing[1].split(", ")]
        return f"memlayers {command} needs {', '.join(_described(name, parser) for name in names)}"
    if not (named := re.match(r'Parser key "([^"]+)"', said)):
        return said
    name = named[1].removeprefix(f"{command}.")
    given = _given(f"--{name}", arguments)
    kinds = [getattr(action, "_typehint", None) or action.type for action in parser._actions if action.dest == name]
    if given is None or not kinds:
        return said
    if base is not None and name in base.fields:
        try:
            base.configuration({name: _value(given)})
        except ValueError as refused:
            if str(refused).startswith(f"{name} "):
                return str(refused)
    return f"{name} must be {expected(kinds[0])}, got {given!r}"


def expected(kind: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(expected, inner))
    if origin is tuple:
        plural = {int: "integers", float: "numbers", str: "texts"}
        what = plural.get(inner[0], "values")
        return f"a list of {what}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {what}"
    return _NAMES.get(kind, str(getattr(kind, "__name__", kind)))


def _advice(option: str, known: set[str], command: str) -> str:
    names = sorted(name.removeprefix("--") for name in known if name.startswith("--"))
    advice = instead(option.removeprefix("--"), names, spelled="--{}")
    return advice if advice.startswith("did you mean") else f"see memlayers {command} --help"


def _described(name: str, parser: ArgumentParser) -> str:
    for action in parser._actions:
        if action.dest == name:
            return f"{action.option_strings[0] if action.option_strings else name.upper()} ({action.help})"
    return name


def _given(option: str, arguments: Sequence[str]) -> str | None:
    """The text that was given for an option; the last one, as it is the one that counts."""
    for place in range(len(arguments) - 1, -1, -1):
        name, equals, value = arguments[place].partition("=")
        if name == option:
            return value if equals else (arguments[place + 1] if place + 1 < len(arguments) else None)
    return None


def _value(text: str) -> Any:
    try:
        return get_loader("yaml")(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
