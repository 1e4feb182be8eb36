"""Checks of a configuration's fields. Each raises `ValueError` naming the field, its value and what is allowed.

`CommandFailed` is for what no check of fields foresees.
"""

import sys

LARGEST = 2**53  # integers beyond are not exact as floating point numbers, which rates and shares are made of


class CommandFailed(RuntimeError):  # noqa: N818  (the machine, the numbers or a result are at fault, not a caller)
    """Well-set work cannot go on, or its result is wrong; a command prints the message and exits with status 1."""


def require_int(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """An integer, and no truth value; at most `LARGEST` where no other bound is given."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    if most is None and isinstance(value, int) and value > LARGEST:
        limits, most = f"from {least} to 2**53", LARGEST
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be an integer {limits}, got {value!r}")


def require_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """A number that a float can be: neither infinite nor an integer beyond the largest of them."""
    limits = [("at least", least), ("above", above), ("below", below)]
    fits = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max
    if fits:
        assert isinstance(value, int | float)
        fits = (
            (least is None or value >= least) and (above is None or value > above) and (below is None or value < below)
        )
    if not fits:
        allowed = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        raise ValueError(f"{name} must be a finite number {allowed}, got {value!r}")


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
