"""What base model a memory belongs to: enough to know it again in another precision, and to tell it from any other.

A memory beside a base that it was not trained in computes nonsense without an error. So a few values of every tensor of
the base are kept with it, rounded to bfloat16: a base that is loaded in float32 or in bfloat16 has the same. As long as
the model lives, sums over all bits of its tensors are kept, too, which any training changes.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlayers.distributed.agreement import fingerprints, is_divided
from memlayers.models.modules import packed_shapes
from memlayers.models.wrappers import MemoryWrapper, ParallelMemory, base_name, find_wrappers
from memlayers.torch_private import is_wrapper_subclass

VALUES = 16  # values of a tensor that are kept, and rows at its end of which one is
_PLAIN = (Tensor, nn.Parameter)  # these wrap nothing


class TensorIdentity(NamedTuple):
    """One tensor of a base."""

    shape: tuple[int, ...]
    dtype: str
    values: str  # hexadecimal bits of bfloat16 values at fixed places; empty for weights that are not here (meta)
    rows: str = ""  # the same of one value of each of the last rows, where new tokens are; empty in old folders


def require_fields(where: str, content: object, **kinds: Any) -> None:
    """Raises `ValueError` unless `content` is a dictionary of exactly these fields, of these kinds."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a dictionary, got {content!r:.80}")
    if odd := kinds.keys() ^ content.keys():
        raise ValueError(f"{where} must have the keys {', '.join(kinds)}, got {', '.join(content)}, not {min(odd)}")
    for key, kind in kinds.items():
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            raise ValueError(f"{where}.{key} must be a {getattr(kind, '__name__', kind)}, got {content[key]!r:.80}")


@dataclass(frozen=True)
class BaseIdentity:
    """A base model, with the tensors that a memory leaves in place: those of replaced modules do not count."""

    name_or_path: str  # where `transformers` loaded it from; empty if it did not
    class_name: str
    model_type: str | None
    dtype: str
    tensors: dict[str, TensorIdentity]
    # Of all bits of each tensor, in the process that has the model; in no file.
    digests: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name_or_path or 'without a name'} ({self.class_name} in {self.dtype})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal identity back."""
        tensors = {name: {**known._asdict(), "shape": list(known.shape)} for name, known in self.tensors.items()}
        content = {**vars(self), "tensors": tensors}
        del content["digests"]
        return content

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> "BaseIdentity":
        """The inverse of `to_dict`. Raises `ValueError` for what that did not write."""
        require_fields(
            "base", section, name_or_path=str, class_name=str, model_type=str | None, dtype=str, tensors=dict
        )
        tensors = {}
        for name, known in section["tensors"].items():
            where = f"base.tensors of {name!r}"
            require_fields(where, {"rows": "", **known} if isinstance(known, dict) else known,
                           shape=list, dtype=str, values=str, rows=str)  # fmt: skip
            if not all(isinstance(size, int) for size in known["shape"]):
                raise ValueError(f"{where} must have a shape of integers, got {known['shape']!r}")
            if not re.fullmatch("([0-9a-f]{4})*", known["values"] + known.get("rows", "")):
                raise ValueError(f"{where} must have values in hexadecimal, got {known['values']!r}")
            tensors[name] = TensorIdentity(**{**known, "shape": tuple(known["shape"])})
        return cls(**{**section, "tensors": tensors})

    def differing(self, other: "BaseIdentity") -> list[str]:
        """The tensors of this base that `other` does not have, or has in another shape or with other values.

        What both have a digest of must be the same to the bit, unless it was cast.
        """
        return [
            name
            for name, known in self.tensors.items()
            if not _same(known, other.tensors.get(name)) or self._differs_in_bits(other, name)
        ]

    def _differs_in_bits(self, other: "BaseIdentity", name: str) -> bool:
        known = name in self.digests and name in other.digests
        is_cast = self.tensors[name].dtype != other.tensors[name].dtype
        return known and not is_cast and self.digests[name] != other.digests[name]


def identity_of(model: nn.Module, without: Collection[str] = (), *, exact: bool = False) -> BaseIdentity:
    """The identity of `model`, which was unwrapped, before or after memories came into it.

    `without`: modules that do not count, as they will be replaced. What adapters (PEFT) and `torch.compile` put around
    its modules does not count either. `exact`: with digests, for which all of the base is read once.
    """
    named = dict(_base_tensors(model, {base_name(model, path) for path in without}))
    # Adapters that are merged and unmerged, as for generation in the middle of a training, leave them rounded.
    adapted = {
        tensor
        for module in model.modules()
        if type(module).__module__.startswith("peft.") and isinstance(inside := _inside(module), nn.Module)
        for tensor in inside.parameters()
    }
    dtypes = (tensor.dtype for tensor in named.values() if tensor.is_floating_point())
    # A model with memories has a class of its own, and may have come from a folder that is no base.
    plain: Any = getattr(type(model), "plain_class", type(model))
    name, model_type = "", None
    if isinstance(model, PreTrainedModel) and plain is type(model):
        name = str(model.name_or_path or "")
        if os.path.isdir(name):  # a relative path means something else elsewhere
            name = os.path.abspath(name)
    elif (before := recorded_base(wrapper for _, wrapper in find_wrappers(model))) is not None:
        name = before.name_or_path
    if isinstance(model, PreTrainedModel):
        model_type = plain.config_class.model_type
    return BaseIdentity(
        name_or_path=name,
        class_name=plain.__name__,
        model_type=model_type,
        dtype=_word(next(dtypes, torch.get_default_dtype())),
        tensors={
            name: TensorIdentity(
                tuple(tensor.shape), _word(tensor.dtype), _values(tensor, _spread), _values(tensor, _last)
            )
            for name, tensor in named.items()
        },
        digests=fingerprints(
            {
                name: tensor.detach().as_subclass(Tensor)
                for name, tensor in named.items()
                if exact and _has_values(tensor) and tensor not in adapted
            }
        ),
    )


def base_buffers(model: nn.Module) -> set[str]:
    """The tensors of the base of `model` that are no parameters, by the names that they have in its identity."""
    return {name for name, tensor in _base_tensors(model) if not isinstance(tensor, nn.Parameter)}


def divided_parameters(model: nn.Module, *, trained: bool) -> list[str]:
    """The parameters of the base of `model` that are divided among ranks, so that nobody sees their values.

    `trained`: those that require a gradient alone.
    """
    named = [(name, tensor) for name, tensor in _base_tensors(model) if isinstance(tensor, nn.Parameter)]
    return [name for name, one in named if is_divided(one) and (one.requires_grad or not trained)]


def recorded_base(wrappers: Iterable[MemoryWrapper]) -> BaseIdentity | None:
    """The base that memories were added to; None where there are none, or for a model that was loaded whole."""
    bases = [wrapper.base_identity for wrapper in wrappers if isinstance(wrapper.base_identity, BaseIdentity)]
    return bases[0] if bases else None


def _base_tensors(model: nn.Module, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under the names that they have in the base; shared ones under each name."""
    return _tensors_inside(model, "", without, packed_shapes(model))


def _tensors_inside(
    module: nn.Module, prefix: str, without: Collection[str], packed: Mapping[nn.Module, tuple[int, int]]
) -> Iterator[tuple[str, Tensor]]:
    while (inside := _inside(module)) is not None:
        module = inside
    if isinstance(module, MemoryWrapper):  # in place of a module that is gone
        return
    own = [*module._parameters.items(), *module._buffers.items()]
    if module in packed:  # by shape alone; whatever it is packed as may change (on a CPU)
        own = [
            ("weight", torch.empty(packed[module], dtype=torch.uint8, device="meta")),
            *(i for i in own if i[0] == "bias"),
        ]
    for name, tensor in own:
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None and prefix + name not in without:
            yield from _tensors_inside(child, f"{prefix}{name}.", without, packed)


def _inside(module: nn.Module) -> nn.Module | None:
    """The module of the base that something was put around; None: nothing was."""
    if isinstance(module, ParallelMemory):
        return module.base
    names = ["_orig_mod"]  # torch.compile
    if type(module).__module__.startswith("peft."):
        names += ["base_layer", "original_module", "token_adapter"]
        if "adaption_prompt" in module._parameters:
            names.append("model")
    return next((found for name in names if (found := module._modules.get(name)) is not None), None)


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or tensor.is_complex() or (type(tensor) not in _PLAIN and is_wrapper_subclass(tensor)))


@torch.no_grad()
def _values(tensor: Tensor, places: Callable[[Tensor], list[int]]) -> str:
    if not _has_values(tensor) or not tensor.numel():
        return ""
    tensor = tensor.detach().as_subclass(Tensor)
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    index = torch.unravel_index(torch.tensor(places(tensor), dtype=torch.int64, device=tensor.device), tensor.shape)
    sample = tensor[index].float().bfloat16()
    return sample.cpu().view(torch.int16).numpy().astype(">i2").tobytes().hex()


def _spread(tensor: Tensor) -> list[int]:
    """The centres of equal parts."""
    count = min(VALUES, tensor.numel())
    return [(2 * i + 1) * tensor.numel() // (2 * count) for i in range(count)]


def _last(tensor: Tensor) -> list[int]:
    """A place in each of the last rows, one further in each."""
    rows, width = len(tensor), tensor.numel() // len(tensor)
    return [row * width + row % width for row in range(max(0, rows - VALUES), rows)]


def _same(known: TensorIdentity, other: TensorIdentity | None) -> bool:
    if other is None:
        return False
    if known.shape != other.shape:  # one that is packed may stand for the transposed one (GPT-2)
        return not (known.values and other.values) and sorted(known.shape) == sorted(other.shape)
    is_rounded = "float16" in (known.dtype, other.dtype)
    pairs = ((known.values, other.values), (known.rows, other.rows))
    return all(
        ours == theirs or not ours or not theirs or (is_rounded and _close(ours, theirs)) for ours, theirs in pairs
    )


def _close(known: str, other: str) -> bool:
    # Rounded to float16 first, then to bfloat16: at most a neighbour of what one rounding gives, or what is lost where
    # float16 has no more digits.
    ours, theirs = _bits(known), _bits(other)
    is_neighbour = (_ordered(ours) - _ordered(theirs)).abs() <= 1
    is_tiny = (ours.view(torch.bfloat16).float() - theirs.view(torch.bfloat16).float()).abs() <= 2.0**-24
    return bool((is_neighbour | is_tiny).all())


def _bits(values: str) -> Tensor:
    bits = [int(values[i : i + 4], 16) for i in range(0, len(values), 4)]
    return torch.tensor(bits, dtype=torch.int32, device="cpu").to(torch.int16)


def _ordered(bits: Tensor) -> Tensor:
    """Integers in the order of the numbers that the bits are, neighbours one apart."""
    magnitude = bits.int() & 0x7FFF
    return torch.where(bits < 0, -magnitude, magnitude)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
