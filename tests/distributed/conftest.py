"""Processes that live as long as the tests of this folder: to start them takes longer than all that they do."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")


def answer(connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):  # the process is gone
        return True, "gone"


@contextmanager
def ranks(folder: Path, size: int) -> Iterator[Callable[..., list[Any]]]:
    """Calls ``function(rank, *arguments)`` of a test's module in each of `size` processes, and returns the results."""
    with Listener(str(folder / "socket")) as listener:
        commands = [
            [sys.executable, str(WORKER), str(folder / "socket"), str(folder / "store"), str(rank), str(size)]
            for rank in range(size)
        ]
        processes = [subprocess.Popen(command) for command in commands]
        accepted = [listener.accept() for _ in range(size)]  # in any order
        connections = [one for _, one in sorted((pickle.loads(one.recv_bytes()), one) for one in accepted)]

        def call(function: Callable[..., Any], *arguments: Any) -> list[Any]:
            order = pickle.dumps((function.__code__.co_filename, function.__name__, arguments))
            for connection in connections:
                connection.send_bytes(order)
            for connection in connections:
                assert connection.poll(500), "a rank does not answer"
            answers = [answer(connection) for connection in connections]
            if failed := [text for is_good, text in answers if not is_good]:
                pytest.fail("\n".join(failed), pytrace=False)
            return [result for _, result in answers]

        try:
            yield call
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


@pytest.fixture(scope="session")
def start_ranks() -> Any:
    return ranks


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    with ranks(tmp_path_factory.mktemp("pair"), 2) as call:
        yield call
