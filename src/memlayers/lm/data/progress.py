"""Progress on stderr for work that is counted in bytes."""

from typing import Any


def progress_bar(what: str, total: int | None, shown: bool, *, initial: int = 0) -> Any:
    """A bar in bytes, with their rate, on stderr; `total` None: unknown."""
    if not shown:
        return _NoBar()
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(desc=what, total=total, initial=initial, unit="B", unit_scale=True, mininterval=0.5)


class _NoBar:
    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass
