"""row gradient tensor: a row gradient as a tensor, at `.grad` of the table's companion, so that loops reach it.

What a loop does to the gradients of parameters, it does to this one: a sum of two is the sum of what they recorded, a
product with a number scales it, a clone goes its own way, `zero_` clears it, detached and `.data` are the same one.

What is contracted:

- Scaling is followed: `grad.div_(n)`, `grad *= x`, `torch._foreach_mul_(grads, x)`, by a number or a tensor without
  dimensions. One of the companion's shape would be a mask of elements, made for another parameter than the table.
- Clipping is not, since tables have a limit of their own (``max_grad_norm`` of their optimizer): a gradient whose norm
  was asked for, and is then multiplied by a tensor, as `torch.nn.utils.clip_grad_norm_` does, stays as it is; so do
  clamped ones. This is said once in the log.
- Whoever reads it (a norm, a mean, a histogram, a comparison) reads zeros of the companion's shape.
- What cannot be followed is refused: noise and other plain tensors that are added, writing to elements, sums kept in a
  plain buffer, `out=`, products of two gradients, a division by the norm (it reads as zero), and moving the companion
  along its gradient, unless downhill and in place, as an optimizer does that holds it beside the table's own.

Letters: T tokens, K rows a token, S slots, V width.
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from memlayers.ops.precision import wide_dtype
from memlayers.ops.row_sum import Part, dense_sum
from memlayers.torch_private import WrapperTensor, take_in_lists

_LOG = logging.getLogger("memlayers")
_said: set[str] = set()

REMEDY = (
    "row gradients can be added to each other, scaled, cleared, cloned and put back. For more, change them in a hook "
    "(ValueTable.register_row_hook), or call release() on the row optimizer and train the table with dense gradients. "
    "Another optimizer that asks for more, or keeps them in its states, is built on parameters without row_mark"
)


class Recorded:
    """The factors of one row gradient: a sum of parts, and the sums and products that it takes part in.

    Neither factors nor lists of them are ever written to, so that copies of a gradient share them. Past the size of one
    dense gradient they are merged into one, as a part that reads each row once.

    Args:
        num_slots: S.
        mark: the companion of the table whose gradient it is; it is not kept alive.
        parts: what it begins with.
    """

    def __init__(self, num_slots: int, mark: Tensor, parts: Iterable[Part] = ()):
        self.num_slots = num_slots
        self._mark = weakref.ref(mark)
        self.parts = list(parts)
        self.passes = 0  # backward passes whose sum it is
        self.is_merged = False  # whether the first of them is the sum of many, a dense gradient
        self.has_graph = False  # whether it was made with create_graph=True, for derivatives that it has not
        self.norm_was_asked = False  # then a product with a tensor is a clipping: see the module

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
        self.passes, self.has_graph = other.passes, other.has_graph

    def clear(self) -> None:
        """Becomes zero."""
        self.parts, self.is_merged, self.norm_was_asked = [], False, False
        self.passes, self.has_graph = 0, False

    def add(self, other: "Recorded") -> None:
        """Adds the other."""
        first = 0 if self.is_merged or not other.is_merged else len(other.parts)
        self.parts = [*other.parts[:first], *self.parts, *other.parts[first:]]  # what is merged comes first
        self.is_merged |= other.is_merged
        self.passes += other.passes
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


class RowTensor(WrapperTensor):
    """A row gradient that looks like the gradient of the companion, a tensor of one element.

    Args:
        like: the companion, or its gradient.
        recorded: what it holds, and shares with whoever has been given the same.
    """

    def __init__(self, like: Tensor, recorded: Recorded):
        self.recorded = recorded

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        name = func.overloadpacket.__name__
        if _has_row((kwargs or {}).get("out")):
            raise _refused(f"{name} cannot be written to")
        if name.startswith("_foreach_") and name.removeprefix("_foreach_") in _RULES:
            return _each(name.removeprefix("_foreach_"), func, args, kwargs or {})
        return _RULES.get(name, _read)(func, *args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Becomes the other gradient: by hand, or where a module is moved to another dtype."""
        if not isinstance(value, RowTensor):
            raise _refused("a plain tensor cannot take the place of")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.recorded = value.recorded

    def share_memory_(self) -> "RowTensor":
        return self  # it has none

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowTensor":
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refused("a file or another process cannot take")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RowTensor({len(self.recorded.parts)} parts of a row gradient)"

    # What torch refuses to say of a subclass without elements.

    def numpy(self, *, force: bool = False) -> Any:
        return _zeros(self).numpy(force=force)

    def tolist(self) -> Any:
        return _zeros(self).tolist()


def _zeros(tensor: Any) -> Any:
    """What a reader sees: zeros in place of row gradients, also of those in a list."""
    if isinstance(tensor, list | tuple):
        return type(tensor)(_zeros(one) for one in tensor)
    if isinstance(tensor, RowTensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor


def _refused(what: str) -> RuntimeError:
    return RuntimeError(f"{what} a row gradient: {REMEDY}")


def _like(tensor: Any, recorded: Recorded) -> RowTensor:
    return RowTensor(tensor, recorded)


# The rules, by the name of the operation.


def _read(func: Any, *args: Any, **kwargs: Any) -> Any:
    """All that is not below: it may look, and must not write."""
    if torch.is_grad_enabled() and _any_with_graph(args):
        raise _refused("no second derivative can be taken through")
    is_fused = func.overloadpacket.__name__.startswith("_fused_")  # an optimizer, which names gradients as written to
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and not is_fused and _has_row(value):
            raise _refused(f"{func.overloadpacket.__name__} cannot be applied to")
    return func(*_zeros(args), **{name: _zeros(value) for name, value in kwargs.items()})


def _any_with_graph(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_any_with_graph, value))
    return isinstance(value, RowTensor) and value.recorded.has_graph


def _has_row(value: Any) -> bool:
    return isinstance(value, RowTensor) or (isinstance(value, list | tuple) and any(map(_has_row, value)))


def _same(func: Any, grad: RowTensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same gradient: detached, or under another shape."""
    seen = func(_zeros(grad), *args, **kwargs)
    if seen.dtype != grad.dtype:  # its bytes
        return seen
    if seen.numel() != grad.numel():
        raise _refused("some elements cannot be taken of")
    return _like(seen, grad.recorded)


def _copied(func: Any, grad: RowTensor, *args: Any, **kwargs: Any) -> Tensor:
    """A clone, or one in another dtype or on another device."""
    seen, copied = func(_zeros(grad), *args, **kwargs), grad.recorded.copy()
    if seen.device != grad.device:
        copied.parts = [type(part)(*(factor.to(seen.device) for factor in part)) for part in copied.parts]
    return _like(seen, copied)


def _nothing(func: Any, grad: RowTensor, *args: Any, **kwargs: Any) -> Tensor:
    """A gradient of zero, to be added to."""
    return _like(func(_zeros(grad), *args, **kwargs), grad.recorded.copy(empty=True))


def _set(func: Any, grad: Any, source: Any, *args: Any) -> Tensor:
    if not (isinstance(grad, RowTensor) and isinstance(source, RowTensor)):
        raise _refused("values cannot be copied between a plain tensor and")
    grad.recorded.set(source.recorded)
    return grad


def _clear(func: Any, grad: RowTensor, *args: Any) -> Tensor:
    if any(args):
        raise _refused("values cannot be filled into")
    grad.recorded.clear()
    return grad


def _sum(sign: int) -> Callable[..., Tensor]:
    def rule(func: Any, grad: Any, other: Any, *, alpha: Any = 1) -> Tensor:
        in_place = func.overloadpacket.__name__.endswith("_")
        if not isinstance(grad, RowTensor):
            if sign * alpha > 0 if in_place else other.recorded.is_of(grad):
                raise _refused("a table cannot be moved by hand (SAM, inner loops) along")
            if in_place:
                return _step(grad, other)
            if torch.is_tensor(grad) and bool(grad.any()):  # a sum may begin with zeros
                raise _refused("a plain tensor cannot be added to")
            result = _like(other, other.recorded.copy())
            result.recorded.scale(sign * alpha)
            return result
        result = grad if in_place else _like(grad, grad.recorded.copy())
        if isinstance(other, RowTensor):
            added = other.recorded.copy()
            if sign * alpha != 1:
                added.scale(sign * alpha)
            result.recorded.add(added)
        elif torch.is_tensor(other):
            # The decay of an optimizer that holds the companion, which is zero; by hand it was meant for the table.
            if in_place or not grad.recorded.is_of(other):
                raise _refused("a plain tensor cannot be added to")
        elif other != 0:
            raise _refused("a number cannot be added to")
        return result

    return rule


def _step(plain: Tensor, grad: RowTensor) -> Tensor:
    """An optimizer that holds the companion leaves it where it is; no other plain tensor can take a row gradient."""
    if not grad.recorded.is_of(plain):
        raise _refused("a plain tensor (make it by zeros_like or clone of the gradient) cannot take the sum with")
    return plain


def _negative(func: Any, grad: RowTensor) -> Tensor:
    aten = torch.ops.aten
    return _product(aten.mul_.Tensor if func.overloadpacket.__name__.endswith("_") else aten.mul.Tensor, grad, -1)


def _dot(func: Any, *grads: Any) -> Tensor:
    if all(isinstance(grad, RowTensor) for grad in grads):
        raise _refused("another gradient cannot be multiplied with")
    return _read(func, *grads)


def _product(func: Any, grad: Any, factor: Any, **kwargs: Any) -> Tensor:
    in_place = func.overloadpacket.__name__.endswith("_")
    if not isinstance(grad, RowTensor) and not in_place and "mul" in func.overloadpacket.__name__:
        grad, factor = factor, grad
    if "out" in kwargs:
        raise _refused(
            "a buffer (of DistributedDataParallel: build the optimizer before it, on the module that it then wraps) "
            "cannot take"
        )
    is_number = not torch.is_tensor(factor) or (not isinstance(factor, RowTensor) and factor.ndim == 0)
    if kwargs or not (isinstance(grad, RowTensor) and is_number):
        raise _refused("anything but a number (a mask, another gradient, rounding) cannot be multiplied with")
    if "div" in func.overloadpacket.__name__:
        factor = 1 / factor if torch.is_tensor(factor) or factor else math.inf
    if grad.recorded.norm_was_asked and _is_huge(factor):
        raise _refused("the norm reads as zero, which cannot divide")
    result = grad if in_place else _like(grad, grad.recorded.copy())
    if torch.is_tensor(factor):
        if grad.recorded.norm_was_asked:
            grad.recorded.norm_was_asked = False
            return _left_alone(result, factor)
        factor = factor.detach()
    result.recorded.scale(factor)
    return result


def _is_huge(factor: Any) -> bool:
    """Whether something was divided by zero or by the small number that was added to it; a device is not asked."""
    return (not torch.is_tensor(factor) or factor.device.type == "cpu") and bool(abs(factor) >= 1e4)  # NaN is not


def _left_alone(result: RowTensor, factor: Tensor | None = None) -> RowTensor:
    if "clipping" not in _said and (factor is None or factor.device.type != "cpu" or bool(factor != 1)):
        _said.add("clipping")
        _LOG.warning(
            "clipping leaves the row gradients of value tables as they are; a table is clipped by its own norm where "
            "its optimizer has a limit for it (value_max_grad_norm of MemoryAdamW, max_grad_norm of the others)"
        )
    return result


def _clamped(func: Any, grad: RowTensor, *args: Any, **kwargs: Any) -> Tensor:
    in_place = func.overloadpacket.__name__.endswith("_")
    return _left_alone(grad if in_place else _like(grad, grad.recorded.copy()))


def _norm(func: Any, grad: RowTensor, *args: Any, **kwargs: Any) -> Tensor:
    grad.recorded.norm_was_asked = True
    return _read(func, grad, *args, **kwargs)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("detach", "alias", "view", "_unsafe_view", "_reshape_alias", "slice", "select"), _same),
    **dict.fromkeys(("unsqueeze", "squeeze", "expand", "as_strided", "t", "view_as", "lift_fresh"), _same),
    **dict.fromkeys(("clone", "_to_copy"), _copied),
    **dict.fromkeys(("new_empty_strided", "zeros_like", "empty_like"), _nothing),
    "copy_": _set,
    **dict.fromkeys(("zero_", "fill_"), _clear),
    **dict.fromkeys(("add", "add_"), _sum(1)),
    **dict.fromkeys(("sub", "sub_"), _sum(-1)),
    **dict.fromkeys(("neg", "neg_"), _negative),
    **dict.fromkeys(("dot", "vdot", "mm"), _dot),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _product),
    **dict.fromkeys(("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"), _clamped),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
}


def _each(name: str, func: Any, args: Any, kwargs: Any) -> list[Any] | None:
    """An operation on lists: those without row gradients at once, each of the others by itself."""
    length = len(args[0])
    rows = [place for place in range(length) if any(_has_row(one) for one in _at(args, place, length))]
    rest = [place for place in range(length) if place not in rows]
    results: list[Any] = [None] * length
    if rest:
        those = [
            [one[place] for place in rest] if isinstance(one, list | tuple) and len(one) == length else one
            for one in args
        ]
        for place, result in zip(rest, func(*those, **kwargs) or [None] * len(rest), strict=True):
            results[place] = result
    for place in rows:
        results[place] = getattr(torch.ops.aten, name)(*_at(args, place, length), **kwargs)
    return None if name.endswith("_") else results


def _at(args: Any, place: int, length: int) -> list[Any]:
    return [one[place] if isinstance(one, list | tuple) and len(one) == length else one for one in args]


take_in_lists(RowTensor)  # clipping goes on to take the gradients of the rest of a model as one list
