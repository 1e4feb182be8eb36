"""agreement: what the processes of a group tell each other, so that all of them do the same, or none does anything.

In a run of one process nothing here waits for anybody.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Bytes that `fingerprint` sums as one row.
_ROW = 8192
_is_alone: ContextVar[bool] = ContextVar("_is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """In it this process is asked and told nothing, as if there were no other: to try something that is undone."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def is_alone() -> bool:
    """Whether this is in `alone`."""
    return _is_alone.get()


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which a process holds a part."""
    return hasattr(tensor, "placements")  # its class takes long to import


def own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor: of a `DTensor` its part, the storage itself, else all of it."""
    if not is_divided(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


class Ranks:
    """The processes of a group, each of which holds a replica, or a part, of tables.

    Args:
        group: of `torch.distributed`; None is that of all processes.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("process_group must be a group that this process is in, got one of others")
        # Gloo sends what lies in RAM, NCCL what lies on a device; a group of both takes either.
        self._on_cpu = dist.get_backend(group) == "gloo"
        self._on_device = dist.get_backend(group) == "nccl"

    @classmethod
    def of(cls, group: "dist.ProcessGroup | None" = None) -> Self | None:
        """The processes of a group; None where there is but one."""
        if not dist.is_available() or not dist.is_initialized() or _is_alone.get():
            return None
        return cls(group) if dist.get_world_size(group) != 1 else None

    def place(self, device: torch.device) -> torch.device:
        """Where a tensor must lie to be sent, if it lies on a device."""
        if self._on_cpu:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device()) if self._on_device else device

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, all of one shape, on the device of this one's."""
        sent = tensor.to(self.place(tensor.device)).contiguous()
        # Not into one tensor: the function for that has another name from torch 2.13 on, and warns under the old one.
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self.group)
        return [one.to(tensor.device) for one in received]

    def gather_uneven(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """The tensors [n] of all ranks, whose lengths are known: they are filled up to the longest one."""
        filled = tensor.new_zeros(max(lengths))
        filled[: len(tensor)] = tensor
        return [one[:length] for one, length in zip(self.gather(filled), lengths, strict=True)]

    def exchange(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Sends each rank its piece; returns what each has sent to this one, whose shapes are known."""
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        sent_on = sent.to(self.place(sent.device))
        sizes = [math.prod(shape) for shape in shapes]
        received = sent_on.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent_on, sizes, [piece.numel() for piece in pieces], group=self.group)
        return [one.view(*shape) for one, shape in zip(received.to(sent.device).split(sizes), shapes, strict=True)]

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """As many whole numbers of each rank."""
        return [one.tolist() for one in self.gather(torch.tensor(numbers, dtype=torch.int64))]

    def gather_objects(self, one: Any) -> list[Any]:
        """An object of each rank: slow, for messages."""
        received: list[Any] = [None] * self.size
        dist.all_gather_object(received, one, group=self.group)
        return received

    def reduce_(self, tensor: Tensor, maximum: bool = False) -> None:
        """The sum (or the maximum) over all ranks, the same bits on each, in place."""
        sent = tensor.to(self.place(tensor.device)).contiguous()
        dist.all_reduce(sent, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=self.group)
        if sent is not tensor:
            tensor.copy_(sent)

    def broadcast_(self, tensor: Tensor) -> None:
        """That of rank 0, in place."""
        sent = tensor.to(self.place(tensor.device)).contiguous()
        dist.broadcast(sent, group_src=0, group=self.group)
        if sent is not tensor:
            tensor.copy_(sent)

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of them."""
        return any(one for (one,) in self.gather_numbers([int(flag)]))


def agreed(ranks: Ranks, fault: str | None, settings: Mapping[str, Any], numbers: Sequence[int]) -> list[list[int]]:
    """As many whole numbers of each rank, gathered where all may go on.

    Args:
        ranks: who takes part.
        fault: why this rank cannot go on. All of them raise then: one that only waited would wait for ever.
        settings: must be the same on all ranks.
        numbers: of this rank.

    Raises:
        RuntimeError: one of the ranks has a fault, which the message says.
        ValueError: settings differ; the message says which.
    """
    said = ranks.gather_numbers([int(fault is not None), zlib.crc32(repr(settings).encode()), *numbers])
    if any(one[0] for one in said):
        number, text = next(one for one in enumerate(ranks.gather_objects(fault)) if one[1] is not None)
        raise RuntimeError(fault or f"rank {number} cannot make this step, so no rank makes it: {text}")
    if any(one[1] != said[0][1] for one in said):
        everyone = ranks.gather_objects(dict(settings))
        differing = {name: [one.get(name) for one in everyone] for name in settings}
        lines = [f"{name} is {values}" for name, values in differing.items() if any(v != values[0] for v in values)]
        raise ValueError(f"replicas must step alike, but by rank {'; '.join(lines)}")
    return [one[2:] for one in said]


def take_from_first(ranks: Ranks, tensors: Mapping[str, Tensor]) -> list[str]:
    """Where tensors differ between ranks, copies those of rank 0 to all; returns their names."""
    marks = _by_number(ranks, [*fingerprints(tensors).values()])
    differing = [name for name, by_rank in zip(tensors, marks, strict=True) if len(set(by_rank)) > 1]
    for name in differing:
        ranks.broadcast_(tensors[name])
    return differing


@torch.no_grad()
def check_replicas(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rows: int | None = 1024,
    group: "dist.ProcessGroup | None" = None,
) -> list[str]:
    """The names of parameters, and of states of an optimizer, that are not the same on all ranks: none should be.

    All ranks call it together. Buffers are left out: running statistics are each rank's own by default. What is sharded
    is left out unless `group` says who holds the same part. In one process it returns an empty list.

    Args:
        model: the same on all ranks.
        optimizer: one of its optimizers, whose states are compared as well.
        rows: of a larger tensor, so many rows are compared, evenly spread; None compares all.
        group: the processes that hold replicas; None is all of them.
    """
    if (ranks := Ranks.of(group)) is None:
        return []
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter
        states = {} if optimizer is None else optimizer.state.get(parameter, {})
        tensors |= {f"{state} of {name}": value for state, value in states.items() if torch.is_tensor(value)}
    tensors = {name: own_part(one) for name, one in tensors.items() if group is not None or own_part(one) is one}
    marks = fingerprints(
        {
            name: tensor if rows is None or not tensor.ndim else tensor[:: max(1, -(-len(tensor) // rows))]
            for name, tensor in tensors.items()
        }
    )
    by_number = _by_number(ranks, [*marks.values()])
    return [name for name, by_rank in zip(tensors, by_number, strict=True) if len(set(by_rank)) > 1]


def _by_number(ranks: Ranks, numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """What all ranks have for each number. Raises `ValueError` where they have not as many."""
    if len(set(counts := [count for (count,) in ranks.gather_numbers([len(numbers)])])) > 1:
        raise ValueError(f"replicas must have as many parameters and states each, but by rank they have {counts}")
    return list(zip(*ranks.gather_numbers(numbers), strict=True))


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """That of each of some tensors."""
    return {name: fingerprint(tensor) for name, tensor in tensors.items()}


def fingerprint(tensor: Tensor) -> int:
    """A number of 64 bits of a tensor's bits and where they stand."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # words begin at multiples of their size
    whole = len(flat) // _ROW * _ROW
    rest = flat.new_zeros(_ROW)
    rest[: len(flat) - whole] = flat[whole:]
    rows = [flat[:whole].view(-1, _ROW).view(torch.int64), rest.view(1, _ROW).view(torch.int64)]
    total = len(flat)
    for bits in rows:  # sums by row and by column need no copy of the table
        for sums in (bits.sum(0), bits.sum(1)):
            places = torch.arange(1, len(sums) + 1, device=sums.device)
            mixed = (sums ^ (sums >> 29)) * (2 * places + 1)
            total = total * 31 + int((mixed ^ (mixed >> 32)).sum())
    return (total + 2**63) % 2**64 - 2**63
