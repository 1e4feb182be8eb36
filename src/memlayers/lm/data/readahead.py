"""Reading that overlaps with the work on what was read."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

T = TypeVar("T")

# Lists that wait to be worked on; one more is being filled.
WAITING = 2


@contextmanager
def read_ahead(items: Generator[T | None], *, size: Callable[[T], int], limit: int) -> Iterator[Iterator[list[T]]]:
    """A thread goes through `items` and collects them in lists, each ended by the item that brings it to `limit`.

    A None among the items is left out; like every item it is a place at which the thread can stop. What the items
    raise reaches the caller in its turn, after the lists before it. The thread has ended when the context is left.
    """
    waiting: queue.Queue[list[T] | BaseException | None] = queue.Queue(WAITING)
    stop = threading.Event()

    def put(item: list[T] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                pass

    def read() -> None:
        collected: list[T] = []
        total = 0
        try:
            with closing(items):
                for item in items:
                    if stop.is_set():
                        return
                    if item is None:
                        continue
                    collected.append(item)
                    total += size(item)
                    if total >= limit:
                        put(collected)
                        collected, total = [], 0
            put(collected)
            put(None)
        except BaseException as error:
            put(collected)
            put(error)

    def lists() -> Iterator[list[T]]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=read, name="reader", daemon=True)
    thread.start()
    try:
        yield lists()
    finally:
        stop.set()
        thread.join()
