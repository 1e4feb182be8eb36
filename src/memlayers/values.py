"""ValueTable: the rows that a memory reads, and who trains them.

Letters: T tokens, S slots, V value width, M rows a token reads, ... any leading shape.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memlayers.checks import require_int
from memlayers.ops import exported
from memlayers.ops.read import read, read_row_mode
from memlayers.ops.record import RowGradient

_Kind = TypeVar("_Kind", bound=nn.Module)


def _mark(device: torch.device, *, requires_grad: bool = True) -> nn.Parameter:
    """Always float32: its gradient would round to zero in float16."""
    return nn.Parameter(torch.zeros(1, device=device, dtype=torch.float32), requires_grad=requires_grad)


class ValueTable(nn.Module):
    """A table of S values of width V; `read` returns weighted sums of its rows (paper, section 3.1).

    Pass one table to several layers to share it. One rule says who trains it. Unless a row optimizer owns the table,
    backward gives `weight` an ordinary dense gradient. A row optimizer takes it with `own`; from then until `release`,
    `weight.grad` stays None and backward records a row gradient. A copy (deepcopy, pickle) has no owner and is dense.

    In row mode the table has a second parameter, `row_mark`, of one element, whose gradient makes the row gradient
    visible to code that clears the model's gradients. It is in no state_dict. A copy keeps it, frozen, so that code
    that walks the parameters of a model and of its copy side by side (`torch.optim.swa_utils`) stays in step: make such
    copies after the optimizer.

    Args:
        slots: S, the number of rows.
        dim: V, the width of a row.
        device: of the rows.
        dtype: of the rows; sums of them are accumulated in at least float32.

    Raises:
        ValueError: a size below 1.
    """

    row_mark: nn.Parameter | None

    def __init__(
        self, slots: int, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        require_int("slots", slots, least=1)
        require_int("dim", dim, least=1)
        self.weight = nn.Parameter(torch.empty(slots, dim, device=device, dtype=dtype))
        self.register_parameter("row_mark", None)
        self.row_gradient: RowGradient | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 1/sqrt(V)."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """The weighted sums [..., V] of rows: of slots [..., M] (int64), by weights [..., M].

        Accumulates and returns float32 (float64 for a float64 table). Raises `ValueError` when the shapes differ.
        """
        return self(slots, weights)

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        if slots.shape != weights.shape:
            raise ValueError(f"slots and weights must have one shape, got {[*slots.shape]} and {[*weights.shape]}")
        slots_TM, weights_TM = slots.flatten(0, -2), weights.flatten(0, -2)
        if torch.compiler.is_exporting():
            y_TV = exported.read(self.weight, slots_TM, weights_TM)
        # Without gradients there is nothing to record, and the handle, on the CPU, would keep CUDA graphs away.
        elif self.row_gradient is not None and self.weight.requires_grad and torch.is_grad_enabled():
            assert self.row_mark is not None
            if not self.row_mark.requires_grad:  # frozen by code that names the weights to train
                self.row_mark.requires_grad_(True)
            y_TV = read_row_mode(self.weight, slots_TM, weights_TM, self.row_mark, self.row_gradient.handle)
        else:
            y_TV = read(self.weight, slots_TM, weights_TM)
        return y_TV.unflatten(0, slots.shape[:-1])

    def own(self, owner: object) -> RowGradient:
        """Enters row mode: from now on `owner`, a row optimizer, trains the table.

        Raises `ValueError` while another owner is alive.
        """
        if self.row_gradient is not None and self.row_gradient.owner() is not None:
            raise ValueError(
                "this value table already has a row optimizer; a second owner would train it twice. Call release() on "
                "the first optimizer (or table.release()) before building another"
            )
        self.row_mark = _mark(self.weight.device)
        self.row_gradient = RowGradient(owner, self.row_mark, self.weight.shape[0])
        return self.row_gradient

    def release(self) -> None:
        """Leaves row mode: the table has no owner and dense gradients again. Discards what was recorded."""
        self.row_gradient = None
        self.row_mark = None

    def extra_repr(self) -> str:
        slots, dim = self.weight.shape
        return f"slots={slots}, dim={dim}" + (", row mode" if self.row_gradient is not None else "")

    def __getstate__(self) -> dict[str, Any]:
        parameters = dict(self._parameters)
        if self.row_mark is not None:
            parameters["row_mark"] = _mark(self.row_mark.device, requires_grad=False)
        return {**self.__dict__, "row_gradient": None, "_parameters": parameters}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.row_mark is not None and self.row_mark.dtype != torch.float32:
            self.row_mark.data = self.row_mark.data.float()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "row_mark", None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if prefix + "row_mark" in missing_keys:
            missing_keys.remove(prefix + "row_mark")


def value_tables(model: nn.Module) -> list[ValueTable]:
    """The value tables of a model, each once, in its order."""
    return list(modules_of(model, ValueTable).values())


def modules_of(model: nn.Module, kind: type[_Kind]) -> dict[str, _Kind]:
    """The modules of a class by their first name in the model, in its order.

    PEFT's ``modules_to_save`` keeps the original of a module beside the copy that it trains and calls: that one is left
    out.
    """
    found: dict[_Kind, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind) and "original_module" not in name.split("."):
            found.setdefault(module, name)
    return {name: module for module, name in found.items()}
