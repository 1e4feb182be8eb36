"""Checks of settings. Each raises `ValueError` naming the setting, its value and what is allowed.

`CommandFailed` and `ProcessLost` are for what no check of fields foresees.
"""

import operator
import sys
from typing import Any, TypeGuard

LARGEST = 2**53  # integers beyond are not exact as floating point numbers, which rates and shares are made of


class CommandFailed(RuntimeError):  # noqa: N818  (the machine, the numbers or a result are at fault, not a caller)
    """Well-set work cannot go on, or its result is wrong; a command prints the message and exits with status 1."""


class ProcessLost(RuntimeError):  # noqa: N818  (as above)
    """Another process of a group ended in the middle of common work, so that this one has to end, too."""


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


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
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
