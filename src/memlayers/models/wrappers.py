"""The two ways in which a memory stands in a model: in place of a module, or beside it.

Either takes the module's place under its name, so the model around it goes on calling what it called.
"""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memlayers.layer import MemoryLayer
from memlayers.models.calls import is_off, mask_for
from memlayers.models.masks import fitted
from memlayers.models.placement import MemoryPlacement, Mode

DEFAULT_NAME = "default"


class MemoryWrapper(nn.Module):
    """What stands where a module of the base model stood; its `memory` reads the same input."""

    mode: ClassVar[Mode]
    memory: MemoryLayer
    frozen_by_peft: bool = False  # and not by whoever wanted it frozen
    base_identity: object = None  # the `BaseIdentity` of the model that the memory was added to, if it is known
    givers: tuple[str, ...] = ()  # whose calls' masks the memory takes (`memlayers.models.masks`)
    tokens_first: bool = False  # whether the model's blocks work on [tokens, batch, width]
    memory_name: str = DEFAULT_NAME
    is_active: bool = True  # whether the memory answers; `memlayers.models.disable_memory` has a say, too
    placement: MemoryPlacement | None = None  # that `add_memory` was called with; None: the model's configuration says

    @property
    def original(self) -> nn.Module | None:
        """The module of the base model, or None if it was not kept."""
        return None

    def remember(self, x: Tensor) -> Tensor:
        """What the memory makes of x, which reaches a memory of another dtype than the model's in that one."""
        if self.frozen_by_peft and self.training and not torch.compiler.is_compiling():
            self._say_that_it_is_frozen()
        given, dtype = x, self.memory.keys.weight.dtype
        # Autocast has the parts cast it; sums of rows must not be cut off at the end of float16's range.
        if x.dtype != dtype and (x.dtype == torch.float16 or x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            given = x.to(dtype)
        mask = self.mask_for(x)
        return (self.memory(given) if mask is None else self.memory(given, mask=mask)).to(x.dtype)

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask of the call in progress for hidden states x; None if all are of real tokens."""
        mask_BT = mask_for(self.givers)
        return None if mask_BT is None else fitted(mask_BT.to(x.device), x.shape[:-1], tokens_first=self.tokens_first)

    def _say_that_it_is_frozen(self) -> None:
        self.frozen_by_peft = False  # once
        if not self.is_trained():
            warnings.warn(
                "a memory is trained no more: peft.get_peft_model (or add_adapter, or a trainer that was given "
                "peft_config) has frozen it. Call memlayers.models.freeze_base(model) before the optimizer is built, "
                "in a trainer on trainer.model before trainer.train(); to keep it frozen, do "
                "memory.requires_grad_(False) before",
                stacklevel=3,
            )

    def is_trained(self) -> bool:
        """Whether something of the memory requires a gradient."""
        return any(parameter.requires_grad for parameter in self.memory.parameters())


class ReplacingMemory(MemoryWrapper):
    """m(x) where a module f(x) stood (paper, section 3.3).

    A module that is `kept` for `remove_memory` is no submodule: it is in no state_dict, no optimizer and on its old
    device, whatever becomes of the model. `kept_dtype` is the one that it would have if it were a submodule.
    """

    mode = "replace"
    kept_dtype: torch.dtype | None = None  # of its first parameter of floats; None if it has none

    def __init__(self, memory: MemoryLayer, kept: nn.Module | None = None):
        super().__init__()
        self.memory = memory
        self._kept = (kept,)  # in a tuple, where nn.Module does not find it
        if kept is not None:
            self.kept_dtype = first_float_dtype(kept)

    @property
    def original(self) -> nn.Module | None:
        return self._kept[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_active or is_off(self):
            return self._answer_of_original(*args, **kwargs)
        return self.remember(_hidden(args, kwargs))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.kept_dtype is not None:  # the memory's says nothing of it: beside float16 it is another from the start
            self.kept_dtype = fn(torch.empty(0, dtype=self.kept_dtype)).dtype
        return self

    def _answer_of_original(self, *args: Any, **kwargs: Any) -> Any:
        original = self.original
        assert original is not None
        if original.training != self.training:  # no submodule: train() and eval() do not reach it
            original.train(self.training)
        return original(*args, **kwargs)


class ParallelMemory(MemoryWrapper):
    """f(x) + gate * m(x): the module f as it was, and a memory beside it (Kim and Jung 2020, arXiv 2010.03881).

    The gate, one number a feature, begins at zero: the model's outputs are then those of the base model, bit for bit.
    Where f returns a tuple, as the blocks of some models do, the memory adds to its first entry.
    """

    mode = "parallel"

    def __init__(self, base: nn.Module, memory: MemoryLayer):
        super().__init__()
        self.memory = memory
        like = next(memory.query.parameters())
        self.gate = nn.Parameter(torch.empty(memory.config.dim, device=like.device, dtype=like.dtype))
        self.reset_parameters()
        self.base = base  # last: from here on its attributes are found, too

    def is_trained(self) -> bool:
        return self.gate.requires_grad or super().is_trained()

    def reset_parameters(self) -> None:
        """The gate at zero; the memory and the base module initialise themselves."""
        nn.init.zeros_(self.gate)

    @property
    def original(self) -> nn.Module:
        return self.base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = _hidden(args, kwargs)
        output = self.base(*args, **kwargs)
        if not self.is_active or is_off(self):
            return output
        first, *others = output if isinstance(output, tuple) else (output,)
        # In the dtype of the output, which under autocast need not be that of the input, and in its shape: some
        # mixtures of experts return their tokens flattened.
        added = (self.gate * self.remember(x)).to(first.dtype)
        first = first + (added.flatten(0, -2) if first.ndim == 2 else added)
        return (first, *others) if isinstance(output, tuple) else first

    def __getattr__(self, name: str) -> Any:
        # A block is asked for more than its output, such as the kind of its attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # not there yet
                raise
            return getattr(self.base, name)


def find_wrappers(model: nn.Module, memory_name: str | None = None) -> list[tuple[str, MemoryWrapper]]:
    """The wrappers of `model`, of the memories of one name or of all, by their path in it: outer ones before inner."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, MemoryWrapper)]
    return [(path, one) for path, one in found if memory_name in (None, one.memory_name)]


def first_float_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter of floats; None if there is none."""
    return next((one.dtype for one in module.parameters() if one.is_floating_point()), None)


def base_name(model: nn.Module, path: str) -> str:
    """The name that the module at `path` has in the base, where none is compiled and no memory beside one."""
    module: nn.Module | None = model
    parts = []
    for part in path.split("."):
        is_put_around = part == "_orig_mod" or (part == "base" and isinstance(module, ParallelMemory))
        parts += [] if is_put_around else [part]
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    raise ValueError(
        f"a module with a memory must be called with the hidden states first (or as hidden_states=), got "
        f"{', '.join(kwargs) or 'nothing'}"
    )
