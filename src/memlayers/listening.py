"""Listener: forward hooks that come and go together. EagerListener: those of models that may be compiled."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from memlayers.torch_private import without_compiled_graphs


class Listener(ABC):
    """Looks at what passes through modules while it is attached, or within ``with``, and changes nothing in them.

    `memlayers.doctor` runs a pass of its own, which no listener that was attached before hears.
    """

    _handles: Sequence[RemovableHandle] = ()

    @abstractmethod
    def register_hooks(self) -> Iterable[RemovableHandle]:
        """Registers the hooks of a subclass, bound methods of it, and returns their handles."""

    def attach(self) -> Self:
        """Start listening; does nothing when it listens already."""
        if not self._handles:
            self._handles = list(self.register_hooks())
        return self

    @property
    def is_listening(self) -> bool:
        """Whether it is attached."""
        return bool(self._handles)

    def detach(self) -> None:
        """Stop listening; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class EagerListener(Listener):
    """A listener whose hooks a compiled graph would pass by: while it listens, models run as they were written."""

    _eager: ExitStack | None = None

    def attach(self) -> Self:
        if self._eager is None:
            with ExitStack() as stack:
                stack.enter_context(without_compiled_graphs())
                super().attach()
                self._eager = stack.pop_all()
        return self

    def detach(self) -> None:
        super().detach()
        if self._eager is not None:
            self._eager.close()
            self._eager = None


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input x of a call of a memory, from the arguments that its hooks are given."""
    return args[0] if args else kwargs["x"]


def floating(output: Any) -> Iterator[Tensor]:
    """The floating tensors in what a module has returned, whatever holds them."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from floating(part)
