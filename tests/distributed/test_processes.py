"""Processes that do one piece of work: what one raises all raise, and what one does the others wait for."""

import pytest
import torch

from memlayers.checks import ProcessLost
from memlayers.distributed.processes import Processes, explain_loss, joined_processes


class Odd(Exception):  # noqa: N818
    """An error that comes back from pickle as another one."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def raised_together(rank, at):
    """What each raises where the processes of some ranks raise."""
    with joined_processes() as processes:
        try:
            with processes.together():
                if rank in at:
                    raise (Odd(rank, "more") if at == [0] else ValueError(f"of {rank}"))
        except Exception as error:
            return f"{type(error).__name__}: {error}", getattr(error, "__notes__", [])
    return None


def test_what_one_raises_all_raise(pair):
    assert pair(raised_together, []) == [None, None]
    assert pair(raised_together, [1]) == [("ValueError: of 1", ["rank 1 says so"]), ("ValueError: of 1", [])]
    assert pair(raised_together, [0, 1]) == [("ValueError: of 0", []), ("ValueError: of 1", [])]
    # One that cannot be sent is told of.
    assert pair(raised_together, [0]) == [("Odd: 0 and more", []), ("RuntimeError: Odd: 0 and more", [])]


def shared(rank):
    with joined_processes() as processes:
        total = torch.tensor([float(rank + 1)])
        processes.sum_([total])
        return (
            (processes.size, processes.rank, processes.is_first),
            processes.first(lambda: f"of {rank}"),
            [one.item() for one in processes.gather(torch.tensor(rank))],
            processes.gather_objects(rank),
            total.item(),
            (processes.any(rank == 1), processes.any(False)),
            processes.largest(5 - rank),
        )


def test_what_processes_share(pair):
    one, other = pair(shared)
    assert one == ((2, 0, True), "of 0", [0, 1], [0, 1], 3.0, (True, False), 5)
    assert other == ((2, 1, False), *one[1:])
    assert shared(0) == ((1, 0, True), "of 0", [0], [0], 1.0, (False, False), 5)


def alone_in_work(rank):
    """What the first does by itself may ask for ranks, and finds none."""
    from memlayers.distributed.agreement import Ranks

    with joined_processes() as processes:
        return processes.first(lambda: Ranks.of() is None)


def test_the_work_of_the_first_waits_for_nobody(pair):
    assert pair(alone_in_work) == [True, True]


def test_a_process_that_is_lost_is_told_from_other_errors():
    sign = "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:38806: Connection reset by peer. This is typical"
    message = r"^another process ended, which this one needs \(.*reset by peer\)$"
    with pytest.raises(ProcessLost, match=message), joined_processes():
        raise RuntimeError(sign)
    assert explain_loss(ProcessLost(sign)) is None
    assert explain_loss(RuntimeError("no memory")) is None
    with pytest.raises(RuntimeError, match="^no memory$"), joined_processes():
        raise RuntimeError("no memory")
    assert Processes().size == 1
