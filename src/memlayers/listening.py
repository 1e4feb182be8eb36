"""Listener: forward hooks that come and go together."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle


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


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input x of a call of a memory, from the arguments that its hooks are given."""
    return args[0] if args else kwargs["x"]
