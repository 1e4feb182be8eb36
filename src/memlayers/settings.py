"""Settings: the fields of configurations, each with what it takes and what it is for. One check for all."""

import dataclasses
import difflib
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from memlayers.checks import plain_number, require_bool, require_choice, require_int, require_number


class Setting(NamedTuple):
    """One field of a configuration."""

    kind: Any  # its type, as annotated
    help: str
    default: Any  # `dataclasses.MISSING` where it must be given
    limits: Mapping[str, Any]  # keywords of `require_int` or `require_number`; of the elements of a list

    @property
    def has_default(self) -> bool:
        """Whether it may be left out."""
        return self.default is not dataclasses.MISSING


def setting(default: Any, help: str, **limits: float) -> Any:
    """A field of a dataclass with its default (``...``: none), what it is for, and its limits.

    Limits are the keywords of `require_int` for an integer and of `require_number` for a float; those of a tuple are of
    its elements.
    """
    given = {} if default is ... else {"default": default}
    return dataclasses.field(**given, metadata={"help": help, "limits": limits})


def settings_of(config: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, in order; fields that were not made by `setting` are left out."""
    kinds = get_type_hints(config)
    return {
        field.name: Setting(kinds[field.name], field.metadata["help"], field.default, field.metadata["limits"])
        for field in dataclasses.fields(config)
        if "help" in field.metadata
    }


def check_settings(config: Any, section: str = "") -> None:
    """Raises `ValueError` naming the first setting with a wrong value; lists, as JSON and YAML have, become tuples, and
    scalars of NumPy numbers.

    `section` is the part of a larger configuration that this one is: its names begin with it.
    """
    for name, found in settings_of(type(config)).items():
        value = getattr(config, name)
        require(f"{section}.{name}" if section else name, value, found.kind, found.limits)
        # A tuple keeps the configuration hashable, a number of Python's own can be written as JSON.
        plain = tuple(map(plain_number, value)) if isinstance(value, list | tuple) else plain_number(value)
        object.__setattr__(config, name, plain)


def require(name: str, value: object, kind: Any, limits: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the value is of the type and within the limits."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):  # with None
        if value is not None:
            require(name, value, inner[0], limits)
    elif get_origin(kind) is Literal:
        require_choice(name, value, inner)
    elif get_origin(kind) is tuple:
        length = None if inner[-1] is Ellipsis else len(inner)
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            raise ValueError(f"{name} must be {in_words(kind)}, got {value!r}")
        for element in value:
            require(name, element, inner[0], limits)
    elif kind is int:
        require_int(name, value, **limits)
    elif kind is float:
        require_number(name, value, **limits)
    elif kind is bool:
        require_bool(name, value)
    elif not isinstance(value, kind):
        raise ValueError(f"{name} must be {in_words(kind)}, got {value!r}")


def in_words(kind: Any) -> str:
    """A type in words: an integer or null, a list of numbers."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(in_words, inner))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if get_origin(kind) is tuple:
        what = {int: "integers", float: "numbers", str: "texts"}[inner[0]]
        return f"a list of {what}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {what}"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}[kind]


def instead(name: object, known: Collection[str], *, spelled: str = "{!r}") -> str:
    """The end of an error about an unknown name: the known ones that it resembles, else those of its section.

    Names may be dotted. One that lacks its section, or has a wrong one, is known by its last part.
    """
    section, _, last = str(name).rpartition(".")
    parts: dict[str, list[str]] = {}
    siblings: dict[str, str] = {}
    for other in known:
        other_section, _, other_last = other.rpartition(".")
        parts.setdefault(other_last, []).append(other)
        if other_section == section:
            siblings[other_last] = other
    close = [siblings[part] for part in difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)]
    close = close or [
        other for part in difflib.get_close_matches(last, parts, n=1, cutoff=0.8) for other in parts[part]
    ]
    if close:
        return f"did you mean {' or '.join(map(spelled.format, close))}?"
    return f"allowed: {', '.join(siblings.values() or known)}"
