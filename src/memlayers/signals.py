"""Signals that ask a process to end: what a cluster sends before it takes a machine away, a terminal that is closed."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows lacks the latter


class Stopped(SystemExit):
    """A signal asked the process to end; where nothing catches this it ends with the status 128 + signal."""

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        return f"ended by {self.name}"


class _Handler:
    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act
        self.number: int | None = None  # of the signal that came

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for other in ENDING:
            if signal.getsignal(other) is self:
                signal.signal(other, signal.SIG_DFL)
        self.act(number)


_handlers: list[_Handler] = []  # of the blocks that stand now


def obey_missed() -> None:
    """Raise `Stopped` if a signal came whose `stop` went unheard: in a finalizer, or in code that catches everything.

    For work that begins, for loops, and at the end.
    """
    for handler in _handlers:
        if handler.number is not None and handler.act is stop:
            raise Stopped(handler.number)


@contextmanager
def on_ending_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Have `act` called with the first signal that asks the process to end; a second one ends it at once.

    A signal that is ignored (`nohup`) or that somebody else handles stays so. Python delivers signals to the main
    thread: in another one this does nothing.
    """
    handler = _Handler(act)
    taken = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            before = signal.getsignal(number)
            if before is signal.SIG_DFL or isinstance(before, _Handler):
                taken[number] = before
                signal.signal(number, handler)
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.remove(handler)
        if handler.number is None:
            for number, before in taken.items():
                signal.signal(number, before)


def stop(number: int) -> None:
    """Raise `Stopped`: for work that may end anywhere, as by Ctrl-C."""
    raise Stopped(number)


class StopRequest:
    """Whether a signal asked for the end, for work that ends where it is good to."""

    number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def obey(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.number is not None:
            raise Stopped(self.number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Give a `StopRequest`; one that nobody obeyed by the end is obeyed there."""
    obey_missed()
    request = StopRequest()
    with on_ending_signal(lambda number: setattr(request, "number", number)):
        yield request
    request.obey()
