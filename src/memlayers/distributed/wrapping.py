"""wrapping: what PyTorch's wrappers of models must know of tables in row mode, and are told.

`DistributedDataParallel` reduces the gradient of each parameter that is not in the list of those it leaves alone. A
table in row mode, or in columns, has none, nor has its companion: both are put into that list, which DDP reads when
it is built.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlayers.torch_private import leave_alone_in_ddp, left_alone_by_ddp
from memlayers.values import ValueTable


def keep_out_of_ddp(model: nn.Module) -> None:
    """Has a DDP that is built on the model from here on leave its tables in row mode alone.

    Raises `ValueError` where the model holds a DDP already, which would reduce them as dense gradients.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            known = module.parameters_to_ignore
            if not set(_in_row_mode(module.module)) <= {*known, *(f"_orig_mod.{name}" for name in known)}:
                raise ValueError(
                    "model must not be wrapped in DistributedDataParallel yet, which reduces dense gradients of the "
                    "value tables that it knows of: build the optimizer on the module first, then wrap that"
                )
    if not isinstance(left_alone_by_ddp(model), _InRowMode):
        leave_alone_in_ddp(model, _InRowMode(model, left_alone_by_ddp(model)))


class _InRowMode:
    """The names of the parameters of tables that are in row mode, or in columns, when somebody asks, and some others.

    A copy of the model has tables without an owner, and so a plain list of the others.
    """

    def __init__(self, model: nn.Module, others: Iterable[str]):
        self._model, self._others = weakref.ref(model), list(others)

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        if (model := self._model()) is not None:
            yield from _in_row_mode(model)

    def __deepcopy__(self, memo: Any) -> list[str]:
        return list(self._others)

    def __reduce__(self) -> Any:
        return list, (self._others,)


def _in_row_mode(model: nn.Module) -> Iterator[str]:
    # Also columns that nobody trains: DDP would broadcast those of rank 0 to all.
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, ValueTable):
            continue
        tensors = [*module._buffers]  # of a table of few bits: DDP would send them before each forward pass
        if module.row_gradient is not None or any(hasattr(part, "placements") for part in module.stored):
            tensors += ["weight", "companion.row_mark"]
        for tensor in tensors:
            yield f"{name}.{tensor}"
            yield f"_orig_mod.{name}.{tensor}"  # of a model that is compiled before it is wrapped
