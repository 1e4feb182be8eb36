"""Settings, the fields of configurations, each with what it takes and what it is for; and the checks of their values.

Each check raises `ValueError` naming the setting, its value and what is allowed. `CommandFailed` and `ProcessLost` are
for what no check foresees.
"""

import dataclasses
import difflib
import operator
import sys
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin, get_type_hints

LARGEST = 2**53  # integers beyond are not exact as floating point numbers, which rates and shares are made of


class CommandFailed(RuntimeError):  # noqa: N818  (the machine, the numbers or a result are at fault, not a caller)
    """Well-set work cannot go on, or its result is wrong; a command prints the message and exits with status 1."""


class ProcessLost(RuntimeError):  # noqa: N818  (as above)
    """Another process of a group ended in the middle of common work, so that this one has to end, too."""


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


def plain_number(value: Any) -> Any:
    """The number of Python's own that a scalar of NumPy or PyTorch holds; any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def require_int(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """An integer, and no truth value; at most `LARGEST` where no other bound is given."""
    given, value = value, plain_number(value)
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    if most is None and isinstance(value, int) and value > LARGEST:
        limits, most = f"from {least} to 2**53", LARGEST
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be an integer {limits}, got {given!r}")


def require_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """A number that a float can be: neither infinite nor an integer beyond the largest of them."""
    limits = {
        "of at least": (least, operator.ge),
        "above": (above, operator.gt),
        "below": (below, operator.lt),
    }
    given = {word: (limit, holds) for word, (limit, holds) in limits.items() if limit is not None}
    number = plain_number(value)
    if not (_is_number(number) and all(holds(number, limit) for limit, holds in given.values())):
        allowed = " and ".join(f"{word} {limit:g}" for word, (limit, _) in given.items())
        raise ValueError(f"{name} must be a finite number {allowed}, got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """One of a few words, or numbers."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def require_bool(name: str, value: object) -> None:
    """A truth value, and no number that could stand for one."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def require_betas(name: str, betas: object) -> None:
    """The two rates at which Adam's moments decay."""
    are_two = isinstance(betas, tuple | list) and len(betas) == 2
    if not (are_two and all(_is_number(beta) and 0 <= beta < 1 for beta in map(plain_number, betas))):  # type: ignore
        raise ValueError(f"{name} must be two numbers in [0, 1), got {betas!r}")


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
