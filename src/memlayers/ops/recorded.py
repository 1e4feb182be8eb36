"""recorded: the factors of one row gradient, and the sums and products that gradients take part in.

Neither factors nor lists of them are ever written to, so that copies of a gradient share them. Past the size of one
dense gradient they are merged into one, as a part that reads each row once.

Letters: T tokens, K rows a token, S slots, V width.
"""

import weakref
from collections.abc import Callable, Iterable
from copy import copy

import torch
from torch import Tensor

from memlayers.ops.precision import wide_dtype
from memlayers.ops.row_sum import Part, dense_sum


class Recorded:
    """The sum of some parts.

    Args:
        num_slots: S.
        mark: the companion of the table whose gradient it is; it is not kept alive.
        parts: what it begins with.
    """

    def __init__(self, num_slots: int, mark: Tensor, parts: Iterable[Part] = ()):
        self.num_slots = num_slots
        self._mark = weakref.ref(mark)
        self.parts = list(parts)
        self.is_merged = False  # whether the first of them is the sum of many, a dense gradient
        self.has_graph = False  # whether it was made with create_graph=True, for derivatives that it has not
        self.norm_was_asked = False  # then a product with a tensor is a clipping: see memlayers.ops.row_tensor

    def copy(self, *, empty: bool = False) -> "Recorded":
        """The same sum, or none, which goes its own way from here."""
        other = copy(self)
        other.norm_was_asked = False
        if empty:
            other.clear()
        return other

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is the companion of the table, or shares its element."""
        mark = self._mark()
        return mark is not None and tensor.data_ptr() == mark.data_ptr()

    def set(self, other: "Recorded") -> None:
        """Becomes the same sum as the other."""
        self.parts, self.is_merged, self.norm_was_asked = other.parts, other.is_merged, False
        self.has_graph = other.has_graph

    def clear(self) -> None:
        """Becomes zero."""
        self.parts, self.is_merged, self.norm_was_asked = [], False, False
        self.has_graph = False

    def add(self, other: "Recorded") -> None:
        """Adds the other."""
        first = 0 if self.is_merged or not other.is_merged else len(other.parts)
        self.parts = [*other.parts[:first], *self.parts, *other.parts[first:]]  # what is merged comes first
        self.is_merged |= other.is_merged
        self.norm_was_asked = False
        factors = self.parts[1:] if self.is_merged else self.parts
        if factors and sum(part.size for part in factors) > self.num_slots * factors[0].grad_TV.shape[1]:
            self._merge(factors)

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies by a number."""
        self.map_weights(lambda part: _wide(part.weights_TK) * factor)

    def scale_rows(self, factor_S: Tensor) -> None:
        """Multiplies each row by a number of its own; a row multiplied by zero is as one that was not read."""
        self.map_weights(lambda part: _wide(part.weights_TK) * factor_S[part.slots_TK])

    def map_weights(self, change: Callable[[Part], Tensor]) -> None:
        """Replaces the weights of each part by what the function makes of the part."""
        self.parts = [part._replace(weights_TK=change(part)) for part in self.parts]
        self.norm_was_asked = False

    def _merge(self, factors: list[Part]) -> None:
        _, live_S, grad_SV = dense_sum(factors, self.num_slots)
        assert live_S is not None
        if self.is_merged:
            before = self.parts[0]
            live_S = live_S | (before.weights_TK[:, 0] != 0)
            grad_SV.addcmul_(before.grad_TV, before.weights_TK)
        self.parts, self.is_merged = [dense_part(grad_SV, live_S)], True


def dense_part(grad_SV: Tensor, live_S: Tensor) -> Part:
    """A dense gradient as a part, of which only some rows count as read."""
    slots_S1 = torch.arange(len(grad_SV), device=grad_SV.device)[:, None]
    return Part(slots_S1, live_S[:, None].to(grad_SV.dtype), grad_SV)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))
