"""What is said while something works: neither a message nor a bar can end the work that it tells of.

Whoever reads standard error may be gone, as a terminal or a pipe is.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


class Unbreakable:
    """A stream whose errors of writing are ignored."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = cast(TextIO, io.TextIOBase()) if stream is None else stream  # None: it was closed at the start

    def write(self, text: str) -> int:
        """Write, if that can be done."""
        with suppress(OSError, ValueError):  # the latter is of a stream that was closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that can be done."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def messages() -> TextIO:
    """Standard error, as an `Unbreakable`."""
    return cast(TextIO, Unbreakable(sys.stderr))


def tell(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=messages(), flush=True)


def announce(line: str) -> None:
    """Print a line on standard error, and who says it."""
    tell(f"memlayers: {line}")


def keep_silent(line: str) -> None:
    """Print nothing: what the others of several processes say."""


def show(text: str) -> None:
    """Print the end of work whose results are on the disk: it is done, whether anybody reads this or not."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        discard_output()


def discard_output() -> None:
    """Send what is left for standard output nowhere, else the end of the process would fail on it."""
    with suppress(OSError, ValueError, AttributeError):  # of a stream that is none of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Open those of the three that are closed: else the next file would be opened in their place and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free


def bar(**settings: Any) -> Any:
    """A bar of `tqdm` on standard error."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # what needs no bar does without

    return tqdm(file=messages(), mininterval=0.5, unit_scale=True, **settings)
