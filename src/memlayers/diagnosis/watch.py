"""What one pass through a model, forward and backward, does to each memory.

Letters: T tokens, D model width, H heads, K neighbours, V value width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.diagnosis.subjects import Subject
from memlayers.keys import Hits
from memlayers.layer import MemoryLayer
from memlayers.query import is_recomputation
from memlayers.values import ValueTable


@dataclass
class Read:
    """One read of a table."""

    table: ValueTable
    slots_TK: Tensor
    weights_TK: Tensor
    live_T: Tensor | None = None  # tokens whose output has a gradient, once one arrives


@dataclass
class Squares:
    """Sum and number of squared elements."""

    total: float = 0.0
    count: int = 0

    def add(self, x_TD: Tensor) -> None:
        self.total += float(x_TD.detach().double().square().sum())
        self.count += x_TD.numel()

    @property
    def rms(self) -> float:
        """Root of their mean."""
        return (self.total / self.count) ** 0.5 if self.count else 0.0


@dataclass
class Watch:
    """What happened to one memory. Recomputations under gradient checkpointing count as gradients only."""

    subject: Subject
    calls: int = 0
    inputs_TD: list[Tensor] = field(default_factory=list)  # of real tokens, as all that follows
    slots_THK: list[Tensor] = field(default_factory=list)  # what the search found
    weights_THK: list[Tensor] = field(default_factory=list)  # its weights, before a `read` of its own
    reads: list[Read] = field(default_factory=list)  # what arrived at its table, padding and all
    masks_T: list[Tensor | None] = field(default_factory=list)  # of these reads
    output: Squares = field(default_factory=Squares)
    beside: list[Squares] = field(default_factory=list)  # of what `Subject.beside` names
    has_gradient: bool = False  # the loss depends on its output
    can_have_gradient: bool = False

    @property
    def tokens(self) -> int:
        """Real tokens that went through."""
        return sum(map(len, self.inputs_TD))

    @property
    def reads_otherwise(self) -> bool:
        """Whether its class has a `read` of its own, which may weigh the slots once more."""
        return type(self.subject.layer).read is not MemoryLayer.read


class Watches:
    """Watches all memories of a model while `listening`."""

    def __init__(self, subjects: Sequence[Subject]):
        self.of = {subject.layer: Watch(subject) for subject in subjects}
        self.reads: list[Read] = []  # of all tables, recomputed ones too
        self._inside: list[tuple[Watch, Tensor, Tensor | None]] = []  # memories being called, innermost last

    @contextmanager
    def listening(self) -> Iterator["Watches"]:
        with ExitStack() as stack:
            for layer, watch in self.of.items():
                handles = [
                    layer.register_forward_pre_hook(self._before_layer, with_kwargs=True),
                    layer.register_forward_hook(self._after_layer),
                    layer.keys.register_forward_hook(self._after_search),
                ]
                for module in watch.subject.beside:
                    watch.beside.append(Squares())
                    handles.append(module.register_forward_hook(partial(_add_output, watch.beside[-1], layer)))
                for handle in handles:
                    stack.callback(handle.remove)
            for table in {table: None for watch in self.of.values() for table in watch.subject.tables}:
                stack.callback(table.register_forward_hook(self._after_read, with_kwargs=True).remove)
            yield self

    def _before_layer(self, layer: MemoryLayer, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["x"]
        self._inside.append((self.of[layer], x, layer.token_mask(*args, **kwargs)))

    def _after_search(self, keys: nn.Module, args: tuple, hits: Hits) -> None:
        if self._inside and not is_recomputation():
            watch, _, mask_T = self._inside[-1]
            watch.slots_THK.append(_real(hits.slots.detach().flatten(0, -3), mask_T))
            if watch.reads_otherwise:
                with torch.no_grad():
                    weights_THK = watch.subject.layer.weigh(hits.scores.detach().flatten(0, -3))
                watch.weights_THK.append(_real(weights_THK, mask_T))

    def _after_read(self, table: ValueTable, args: tuple, kwargs: dict, output: Tensor) -> None:
        given = dict(zip(("slots", "weights"), args, strict=False)) | kwargs
        slots_TK, weights_TK = (given[name].detach().flatten(0, -2) for name in ("slots", "weights"))
        read = Read(table, slots_TK, weights_TK)
        self.reads.append(read)
        if output.requires_grad:
            output.register_hook(partial(_gradient_of_read, read))
        if self._inside and not is_recomputation():
            watch, _, mask_T = self._inside[-1]
            if table is watch.subject.table:
                watch.reads.append(read)
                watch.masks_T.append(mask_T)

    def _after_layer(self, layer: MemoryLayer, args: tuple, output: Tensor) -> None:
        watch, x, mask_T = self._inside.pop()
        if output.requires_grad:
            watch.can_have_gradient = True
            output.register_hook(partial(_gradient_of_output, watch))
        if not is_recomputation():
            watch.calls += 1
            watch.inputs_TD.append(_real(x.detach().flatten(0, -2), mask_T))
            watch.output.add(_real(output.detach().flatten(0, -2), mask_T))


def _gradient_of_read(read: Read, grad: Tensor) -> None:
    read.live_T = grad.flatten(0, -2).ne(0).any(-1)


def _gradient_of_output(watch: Watch, grad: Tensor) -> None:
    watch.has_gradient |= bool(grad.ne(0).any())


def _add_output(squares: Squares, layer: MemoryLayer, module: nn.Module, args: tuple, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor) and not is_recomputation():
        x_TD = first.detach().flatten(0, -2)
        mask = layer.mask  # that a model lays on its memories for the length of a call
        squares.add(_real(x_TD, mask.reshape(-1).bool() if mask is not None and mask.numel() == len(x_TD) else None))


def _real(x: Tensor, mask_T: Tensor | None) -> Tensor:
    """The real tokens of a tensor [T, ...]."""
    return x if mask_T is None else x[mask_T]


def read_rows(reads: Sequence[Read], table: ValueTable, *, live: bool) -> Tensor:
    """Slots of a table that were read with a weight, ascending; `live`: only by tokens whose output has a gradient."""
    found = [torch.empty(0, dtype=torch.int64, device=table.weight.device)]
    for read in reads:
        if read.table is table:
            counts_TK = read.weights_TK != 0
            if live:
                counts_TK = counts_TK & read.live_T[:, None] if read.live_T is not None else torch.zeros_like(counts_TK)
            found.append(read.slots_TK[counts_TK])
    return torch.cat(found).unique()
