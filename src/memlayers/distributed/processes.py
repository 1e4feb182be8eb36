"""processes: those that do one piece of work together, one of which writes.

`joined_processes` makes a group of those that `torchrun` started. What one of them raises where they act `together`
all raise; where one is killed, the collective that the others wait in raises, and they end.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from memlayers.checks import ProcessLost
from memlayers.distributed.agreement import Ranks, alone
from memlayers.launch import number, require_launched

_Result = TypeVar("_Result")
# Rank 0 may prepare a text while the others wait. One that is killed is noticed at once, whatever this is.
_TIMEOUT = timedelta(hours=24)


class Processes:
    """The processes that share work; one alone sends nothing.

    Args:
        ranks: None is one process.
    """

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = ranks
        self.size, self.rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises on all what one of them raises in the block, in which nothing is sent."""
        if self.ranks is None:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        if not self.ranks.any(own is not None):
            return
        errors = self.ranks.gather_objects(_sendable(own))
        if own is not None:
            raise own
        rank, first = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        if rank > 0:
            first.add_note(f"rank {rank} says so")
        raise first

    def first(self, work: Callable[[], _Result]) -> _Result:
        """What rank 0 gets when it alone does the work, on all; they raise what it raises."""
        if self.ranks is None:
            return work()
        with self.together(), alone():
            result = work() if self.is_first else None
        return self.gather_objects(result)[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each, all of one shape."""
        return [tensor] if self.ranks is None else self.ranks.gather(tensor)

    def gather_objects(self, one: Any) -> list[Any]:
        """An object of each: slow."""
        return [one] if self.ranks is None else self.ranks.gather_objects(one)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """The sums over all, in place."""
        if self.ranks is not None:
            for tensor in tensors:
                self.ranks.reduce_(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of them."""
        return flag if self.ranks is None else self.ranks.any(flag)

    def largest(self, number: int) -> int:
        """The largest number of one of them."""
        return number if self.ranks is None else max(one for (one,) in self.ranks.gather_numbers([number]))


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes that `torchrun` started, as a group of `torch.distributed` until the end of the block.

    A group that is there already is taken as it is, and stays. Without one, and where `torchrun` started no other
    process, it is this process alone.

    Raises:
        ValueError: the environment says that there are several, and not how they find each other; or there are more
            on this machine than it has GPUs.
        ProcessLost: another process ended in the middle of the work.
    """
    require_launched()
    try:
        if (dist.is_available() and dist.is_initialized()) or number("WORLD_SIZE") == 1:
            yield Processes(Ranks.of())
            return
        if torch.cuda.is_available():
            gpus, here = torch.cuda.device_count(), number("LOCAL_WORLD_SIZE")
            if here > gpus:
                raise ValueError(f"--nproc-per-node must be at most {gpus}, the GPUs of this machine, got {here}")
            torch.cuda.set_device(number("LOCAL_RANK"))
        # Small messages go over gloo, for which nobody waits for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
        try:
            yield Processes(Ranks.of())
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        if (lost := explain_loss(error)) is None:
            raise
        raise ProcessLost(lost) from error


def explain_loss(error: BaseException) -> str | None:
    """What to say where a collective found its other end gone; None for any other error."""
    if not dist.is_available():
        return None
    # An error of gloo has no class of its own.
    if not isinstance(error, dist.DistError) and not (type(error) is RuntimeError and "gloo" in str(error)):
        return None
    first_sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"another process ended, which this one needs ({first_sentence})"


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))  # some can be pickled and not be read back
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
