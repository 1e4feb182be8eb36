"""What one pass through a model, forward and backward, does to each memory.

Letters: T tokens, D model width, H heads, K rows a head reads, M = H * K rows a token reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memlayers.diagnosis.subjects import Subject
from memlayers.experts import InputTable
from memlayers.keys import Hits
from memlayers.layer import MemoryLayer
from memlayers.listening import Listener, input_of
from memlayers.query import is_recomputation
from memlayers.values import ValueTable


@dataclass
class Read:
    """One read of a table."""

    table: ValueTable
    slots_TM: Tensor
    weights_TM: Tensor
    mask_T: Tensor | None  # the real tokens of the memory that is being called
    live_T: Tensor | None = None  # tokens whose output has a gradient, once one arrives

    def real(self, x: Tensor) -> Tensor:
        """The real tokens of a tensor [T, ...]."""
        is_padded = self.mask_T is not None and len(self.mask_T) == len(x)
        return x[self.mask_T] if is_padded else x


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
    gate_was_zero: bool = False  # and was opened: a gate at zero hides everything behind it
    calls: int = 0
    inputs_TD: list[Tensor] = field(default_factory=list)  # of real tokens, as all that follows
    slots_THK: list[Tensor] = field(default_factory=list)  # what the search found
    weights_THK: list[Tensor] = field(default_factory=list)  # its weights, before a `read` of its own
    reads: list[Read] = field(default_factory=list)  # what arrived at its table, padding and all
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


class Watches(Listener):
    """Watches all memories of a model while attached."""

    def __init__(self, subjects: Sequence[Subject]):
        self.of = {subject.layer: Watch(subject) for subject in subjects}
        self.reads: list[Read] = []  # of all tables, recomputed ones too
        self._inside: list[tuple[Watch, Tensor, Tensor | None]] = []  # memories being called, innermost last

    def register_hooks(self) -> Iterator[RemovableHandle]:
        for layer, watch in self.of.items():
            yield layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            yield layer.register_forward_hook(self._after_layer)
            yield layer.keys.register_forward_hook(self._after_search)
            watch.beside = [Squares() for _ in watch.subject.beside]
            for squares, module in zip(watch.beside, watch.subject.beside, strict=True):
                yield module.register_forward_hook(partial(_after_beside, squares, watch.subject.wrapper))
        for table in {table: None for watch in self.of.values() for table in watch.subject.tables}:
            yield table.register_forward_hook(self._after_read, with_kwargs=True)

    def _before_layer(self, layer: MemoryLayer, args: tuple, kwargs: dict) -> None:
        self._inside.append((self.of[layer], input_of(args, kwargs), layer.token_mask(*args, **kwargs)))

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
        slots_TM = given["slots"].detach().flatten(0, -2)
        # Rows that are multiplied with an input have no weights: all of them are read.
        has_weights = not isinstance(table, InputTable)
        weights_TM = given["weights"].detach().flatten(0, -2) if has_weights else torch.ones_like(slots_TM)
        watch, _, mask_T = self._inside[-1] if self._inside else (None, None, None)
        read = Read(table, slots_TM, weights_TM, mask_T)
        self.reads.append(read)
        if output.requires_grad:
            output.register_hook(partial(_gradient_of_read, read))
        if watch is not None and table is watch.subject.table and not is_recomputation():
            watch.reads.append(read)

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


def _after_beside(squares: Squares, wrapper: Any, module: nn.Module, args: tuple, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor) and not is_recomputation():
        mask = None
        with suppress(AttributeError, ValueError):  # a wrapper that takes no masks; an output that no mask fits
            mask = wrapper.mask_for(first)
        squares.add(_real(first.detach().flatten(0, -2), None if mask is None else mask.reshape(-1)))


def _real(x: Tensor, mask_T: Tensor | None) -> Tensor:
    """The real tokens of a tensor [T, ...]."""
    return x if mask_T is None else x[mask_T]


def read_slots(reads: Sequence[Read], table: ValueTable, *, live: bool = False) -> Tensor:
    """Slots of a table that were read with a weight, ascending; `live`: only by tokens whose output has a gradient."""
    found = [torch.empty(0, dtype=torch.int64, device=table.weight.device)]
    for read in reads:
        if read.table is table:
            counts_TM = read.weights_TM != 0
            if live:
                counts_TM = counts_TM & read.live_T[:, None] if read.live_T is not None else torch.zeros_like(counts_TM)
            found.append(read.slots_TM[counts_TM].to(table.weight.device))
    return torch.cat(found).unique()
