"""launch: what `torchrun` says of a process in its environment. Nothing here imports torch."""

import os

from memlayers.checks import require_int

_NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether this process is one of several that were started together."""
    # Some clusters number their machines in WORLD_SIZE and RANK; only a launcher of processes sets LOCAL_RANK.
    return number("WORLD_SIZE") > 1 and "LOCAL_RANK" in os.environ


def is_spoken_for() -> bool:
    """Whether another process of this machine says what all of them have to say."""
    return is_launched() and number("LOCAL_RANK") != 0


def is_first() -> bool:
    """Whether this process is the only one, or the one of rank 0."""
    return not is_launched() or number("RANK") == 0


def number(name: str) -> int:
    """A number of the environment; where it is not set, that of a process alone. Raises `ValueError` if it is none."""
    value = os.environ.get(name, "")
    least = int(name.endswith("WORLD_SIZE"))
    try:
        found: object = int(value) if value else least
    except ValueError:
        found = value
    require_int(name, found, least=least)
    return int(found)  # type: ignore[call-overload]


def require_launched() -> None:
    """Raises `ValueError` where several processes are said to be there and nobody says how they find each other."""
    missing = [name for name in _NAMES if name not in os.environ]
    if number("WORLD_SIZE") > 1 and missing:
        raise ValueError(
            f"{missing[0]} must be set where WORLD_SIZE is {number('WORLD_SIZE')}: start the command with torchrun, or "
            f"without WORLD_SIZE"
        )
