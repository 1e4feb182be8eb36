"""ValueTable: the rows that a memory reads, and who trains them. TablePlace: where they are, if not in memory.

Letters: T tokens, S slots, V value width, M rows a token reads, ... any leading shape.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memlayers.after_import import after_import
from memlayers.checks import plain_number, require_int, require_number
from memlayers.ops import exported
from memlayers.ops.read import read, read_row_mode
from memlayers.ops.row_gradient import HOOKS, RowGradient, RowHookArgument
from memlayers.torch_private import has_gradient_hooks, is_exporting

_Kind = TypeVar("_Kind", bound=nn.Module)


class Companion(nn.Module):
    """Holds the `row_mark` of a table, which is in no state_dict.

    It is a module of its own for those who move the tensors of each module that they find, and fill them from a
    state_dict (offloading by accelerate). It is never on the meta device unless it was moved there: nobody would fill
    it.
    """

    row_mark: nn.Parameter

    def __init__(self, device: torch.device, dtype: torch.dtype, *, requires_grad: bool = True):
        super().__init__()
        zero = torch.zeros(1, dtype=dtype, device="cpu" if device.type == "meta" else device)
        # Not registered: while a model is built without storage, accelerate moves to meta what is.
        self._parameters["row_mark"] = nn.Parameter(zero, requires_grad)

    def _apply(self, fn, recurse=True):
        # By its data: a swap of tensors, which torch.__future__ can ask for, leaves hooks and row gradient behind.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(False)
        try:
            return super()._apply(fn, recurse)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass


class ValueTable(nn.Module):
    """A table of S values of width V; `read` returns weighted sums of its rows (paper, section 3.1).

    Pass one table to several layers to share it. One rule says who trains it. Unless a row optimizer owns the table,
    backward gives `weight` an ordinary dense gradient. A row optimizer takes it with `own`; from then until `release`,
    `weight.grad` stays None and backward records a row gradient. A copy (deepcopy, pickle) has no owner and is dense.

    Beside `weight` there is always a second parameter, the companion `row_mark`, of one element that is zero and stays
    so: in row mode its gradient is the row gradient, so that what a loop does to the gradients of parameters (adds,
    scales, clears, clones, puts back) is done to it; `memlayers.ops.row_gradient_tensor` says what is followed, and
    what is refused. In dense mode its gradient is zero. The parameters of a model are thus the same ones in either
    mode, and a copy can be walked side by side with its original. It is in no state_dict and in no count of parameters.

    Args:
        slots: S, the number of rows.
        dim: V, the width of a row.
        device: of the rows.
        dtype: of the rows; sums of them are accumulated in at least float32.
        std: standard deviation of fresh rows. None: 1/sqrt(V). With 0 a row that was never trained adds nothing.

    Raises:
        ValueError: a size below 1; a standard deviation below 0.
    """

    # In exported programs, with dense gradients, in row mode.
    _operations: ClassVar[tuple[Callable[..., Tensor], ...]] = (exported.read, read, read_row_mode)
    is_left_out = False  # from every state_dict, where its rows are in files; see `left_out`

    def __init__(
        self,
        slots: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        std: float | None = None,
    ):
        super().__init__()
        require_int("slots", slots, least=1)
        require_int("dim", dim, least=1)
        if std is not None:
            require_number("std", std, least=0.0)
        self.std = 1 / math.sqrt(dim) if std is None else float(plain_number(std))
        self.weight = nn.Parameter(torch.empty(slots, dim, device=device, dtype=dtype))
        self.companion = Companion(self.weight.device, self.weight.dtype)
        self.row_gradient: RowGradient | None = None
        self.reset_parameters()

    @property
    def row_mark(self) -> nn.Parameter:
        """The companion parameter."""
        return self.companion.row_mark

    @property
    def shape(self) -> torch.Size:
        """[S, V]."""
        return self.weight.shape

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold the rows."""
        return (self.weight,)

    @property
    def untrainable(self) -> str:
        """Why nobody can train the rows, and what to do; empty where they can be trained."""
        return ""

    @property
    def is_trained(self) -> bool:
        """Whether the rows can be trained and something of them requires a gradient.

        The weight does not say it where hooks compute it (`prune`): in a call without gradients they leave one that
        requires none.
        """
        mine = (one for name, one in self.named_parameters() if not name.endswith("row_mark"))
        return not self.untrainable and any(one.requires_grad for one in mine)

    def operands(self) -> tuple[Any, ...] | None:
        """What `memlayers.ops.infer` is given of the table; None if the table must be called."""
        return (self.weight,) if type(self) is ValueTable else None

    def reset_parameters(self) -> None:
        """Normal with standard deviation `std`."""
        nn.init.normal_(self.weight, std=self.std)

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """The weighted sums [..., V] of rows: of slots [..., M] (int64), by weights [..., M].

        Accumulates and returns float32 (float64 for a float64 table). Raises `ValueError` when the shapes differ.
        """
        return self(slots, weights)

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        if slots.shape != weights.shape:
            raise ValueError(f"slots and weights must have one shape, got {[*slots.shape]} and {[*weights.shape]}")
        if slots.ndim == 1:  # of one token
            return self.forward(slots[None], weights[None]).squeeze(0)
        y_TV = self._compute(slots.flatten(0, -2), weights.flatten(0, -2))
        return y_TV.unflatten(0, slots.shape[:-1])

    def _compute(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        """The operation of the class."""
        in_exports, operation, in_row_mode = self._operations
        if is_exporting():
            return in_exports(self.weight, slots_TM, given)
        # Without gradients there is nothing to record, and the handle, on the CPU, would keep CUDA graphs away.
        if not torch.is_grad_enabled():
            return operation(self.weight, slots_TM, given)
        if self.row_gradient is not None and self.weight.requires_grad and self._is_owned():
            self._check_row_mode()
            return in_row_mode(self.weight, slots_TM, given, self.row_mark, self.row_gradient.handle)
        self.settle_mark()
        return operation(self.weight, slots_TM, given, None if self.weight.is_meta else self.row_mark)

    def own(self, owner: object) -> RowGradient:
        """Enters row mode: from now on `owner`, a row optimizer, trains the table.

        Raises `ValueError` for rows that nobody can train, and while another owner is alive.
        """
        if self.untrainable:
            raise ValueError(self.untrainable)
        if self.row_gradient is not None and self.row_gradient.owner() is not None:
            raise ValueError(
                "this value table already has a row optimizer; a second owner would train it twice. Call release() on "
                "the first optimizer (or table.release()) before building another"
            )
        self.settle_mark()
        row_gradient = RowGradient(owner, self.weight, self.row_mark)
        self.release()
        self.row_gradient = row_gradient
        return row_gradient

    def release(self) -> None:
        """Leaves row mode: the table has no owner and dense gradients again. Discards what was recorded."""
        if self.row_gradient is not None:
            self.row_gradient.close()
        self.row_gradient = None

    def register_row_hook(self, hook: Callable[[RowHookArgument], None]) -> RemovableHandle:
        """In row mode: calls `hook` at each step with the row gradient, before the optimizer uses it.

        The hook may look at `slots` and `norm()`, and change the gradient by `scale(factor)`, a number or one a row
        (a tensor [S]), and by `keep(rows)`, a mask [S] of the rows that may be trained. Hooks run in the order in which
        they were registered, before the table's own clipping, and end with `release`.

        Returns:
            A handle; its `remove()` takes the hook away.

        Raises:
            ValueError: the table is not in row mode.
        """
        if self.row_gradient is None:
            raise ValueError(
                "row hooks are for a table in row mode: build its row optimizer first; the gradient of a table without "
                "one is dense, and weight.register_hook changes it"
            )
        return self.row_gradient.register_hook(hook)

    # What is asked of a table; those in other places than memory answer otherwise.

    def make_states(self, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The states that an optimizer keeps for the table: what `make` returns for a tensor like the weight."""
        return make(self.weight)

    def require_whole(self) -> None:
        """Raises `ValueError` where the weight does not hold all rows, for who saves or copies them."""

    def changed_slots(self) -> Tensor | None:
        """The slots of the rows that may have changed since the last checkpoint; None: any."""
        return None

    def extra_repr(self) -> str:
        slots, dim = self.weight.shape
        return f"slots={slots}, dim={dim}" + (", row mode" if self.row_gradient is not None else "")

    def __getstate__(self) -> dict[str, Any]:
        modules = dict(self._modules)
        if self.row_gradient is not None:  # whoever shares its companion would share its row gradient
            modules["companion"] = Companion(
                self.row_mark.device, self.row_mark.dtype, requires_grad=self.row_mark.requires_grad
            )
        return {**self.__dict__, "row_gradient": None, "_modules": modules}

    def _is_owned(self) -> bool:
        """Whether the weight is the one that the row optimizer has taken, and not an input of `functional_call`."""
        assert self.row_gradient is not None
        return torch.compiler.is_compiling() or self.row_gradient.is_of(self.weight)

    def _check_row_mode(self) -> None:
        """What somebody did since the optimizer was built: froze the companion by name, or put a hook on the table."""
        if torch.compiler.is_compiling():  # backward finds the hook then
            return
        if not self.row_mark.requires_grad:
            self.row_mark.requires_grad_(True)
        if has_gradient_hooks(self.weight):
            raise RuntimeError(HOOKS)

    def settle_mark(self) -> None:
        """Puts the companion where the table is: loaders that it is unknown to leave it elsewhere."""
        mark, weight = self.row_mark, self.weight
        is_settled = weight.is_meta or (mark.device, mark.dtype) == (weight.device, weight.dtype)
        if self.row_gradient is None and not is_settled:
            zero = torch.zeros(1, device=weight.device, dtype=weight.dtype)
            self.companion._parameters["row_mark"] = nn.Parameter(zero, mark.requires_grad)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.settle_mark()
        if not self.row_mark.is_meta:
            # After `to_empty`. What was made in inference mode is written to there alone, and hides it after a cast.
            with torch.inference_mode():
                self.row_mark.zero_()
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.settle_mark()


def computed_eagerly(kind: type[_Kind]) -> type[_Kind]:
    """Leaves the operation of a class of tables out of compiled graphs: which rows it needs is known when it runs."""
    table: Any = kind

    def leave_out(_: object) -> None:
        table._compute = torch.compiler.disable(table._compute)

    after_import("torch._dynamo", leave_out)  # which takes seconds
    return kind


class TablePlace(ABC):
    """Where a table's rows are: what a `MemoryLayer` and `add_memory` take as ``values`` in place of a table."""

    @abstractmethod
    def make_table(self, slots: int, dim: int, **options: Any) -> ValueTable:
        """The table there, with the arguments of `ValueTable`: a new one, or the one that is there already."""

    @abstractmethod
    def below(self, name: str) -> "TablePlace":
        """The place of one of several tables, by its name."""


def value_tables(model: nn.Module) -> list[ValueTable]:
    """The value tables of a model, each once, in its order."""
    return list(modules_of(model, ValueTable).values())


@contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Inside, tables that are in files are in no `state_dict` of the model: for who keeps them otherwise."""
    tables = value_tables(model)
    before = [table.is_left_out for table in tables]
    try:
        for table in tables:
            table.is_left_out = True
        yield
    finally:
        for table, was in zip(tables, before, strict=True):
            table.is_left_out = was


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
