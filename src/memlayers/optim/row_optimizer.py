"""RowOptimizer: what the optimizers of value tables share; a subclass is a rule and its state."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from memlayers.checks import plain_number, require_choice, require_number
from memlayers.optim.table_owner import TableOwner
from memlayers.values import Companion, ValueTable, value_tables

Rounding = Literal["nearest", "stochastic"]


class RowOptimizer(TableOwner):
    """Touches only the rows that were read since the last step (paper, section 3.1: sparse updates).

    It becomes the owner of its tables (`ValueTable.own`): their `.grad` stays None until `release` gives them back.
    Beside another optimizer that a `torch.amp.GradScaler` steps, a plain `step` of this one would not know of the
    scale: do not mix the two.

    Args:
        tables: value tables, or a module whose value tables are all taken.
        lr: the learning rate; a tensor is read once. It is constant: it lives in the group's ``value_lr``, where no
            scheduler looks.
        max_grad_norm: clips the gradient of each table by its own norm; None clips nothing.
        schedule_values: follow schedulers, which move the group's ``lr``.
        rounding: of bfloat16 tables and states; others are rounded to the nearest. "stochastic" keeps on average what
            is smaller than half a unit in the last place (`memlayers.ops.rounding`); "nearest" loses it, and with it
            most of the training at small rates (docs/log.md).
        settings: of the subclass, which has checked them.

    Raises:
        ValueError: a bad setting; no table, or one that has an owner; more than one process, whose replicas would drift
            apart. No table is taken then.
        RuntimeError: from `step`, when a `torch.amp.GradScaler` calls it; nothing is changed.
    """

    def __init__(
        self,
        tables: nn.Module | Iterable[ValueTable],
        *,
        lr: float,
        max_grad_norm: float | None,
        schedule_values: bool,
        rounding: Rounding,
        **settings: Any,
    ):
        if isinstance(tables, nn.Module):
            tables = value_tables(tables)
        tables = [table for table in tables if not isinstance(table, Companion)]  # a part of each
        if not tables:
            raise ValueError("tables must hold at least one ValueTable, got none")
        for table in tables:
            if not isinstance(table, ValueTable):
                raise ValueError(f"tables must be ValueTable modules, got {type(table).__name__}")
        require_row_settings(lr=lr, max_grad_norm=max_grad_norm, rounding=rounding)
        lr, max_grad_norm = plain_number(lr), plain_number(max_grad_norm)
        settings = {name: plain_number(value) for name, value in settings.items()}
        _require_one_process()
        self._tables: list[ValueTable] = []
        group = {
            "params": [table.weight for table in tables],
            "lr": lr,
            "value_lr": lr,
            "max_grad_norm": max_grad_norm,
            "schedule_values": schedule_values,
            "rounding": rounding,
            "updates": 0,
            **settings,
        }
        super().__init__([group], {"lr": lr, **settings})
        try:
            for table in tables:
                table.own(self)
                self._tables.append(table)
        except ValueError:
            self.release()
            raise

    @property
    def tables(self) -> list[ValueTable]:
        """The tables that it owns."""
        return list(self._tables)

    @abstractmethod
    def new_state(self, weight_SV: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a table before its first step."""

    @abstractmethod
    def update(
        self,
        weight_SV: Tensor,
        state: dict[str, Tensor],
        factors: tuple[list[Tensor], list[Tensor], list[Tensor]],
        group: dict[str, Any],
        *,
        lr: float,
        max_norm: float | None,
        seed: int,
    ) -> None:
        """One step of a table and its state, in place (see `memlayers.ops.row_step`)."""

    def _update(self) -> None:
        _require_one_process()
        (group,) = self.param_groups
        lr = float(group["lr"] if group["schedule_values"] else group["value_lr"])
        if any(table.row_gradient is not None and not table.row_gradient.is_of(table.weight) for table in self._tables):
            raise RuntimeError(
                "the weight of a value table was replaced after its row optimizer was built, as by "
                "load_state_dict(assign=True), so the optimizer would not train it: build the optimizer afterwards, or "
                "load without assign"
            )
        for number, table in enumerate(self._tables):
            parts = None if table.row_gradient is None else table.row_gradient.consume()
            if parts is None:
                continue
            slots, weights, grads = (list(factors) for factors in zip(*parts, strict=True))
            state = self.state[table.weight]
            if not state:
                state.update(self.new_state(table.weight, group))
            has_bfloat16 = any(whole.dtype == torch.bfloat16 for whole in (table.weight, *state.values()))
            is_stochastic = group["rounding"] == "stochastic" and has_bfloat16
            # Another for each step and table, and the same when a run is resumed.
            seed = group["updates"] * len(self._tables) + number if is_stochastic else -1
            factors = slots, weights, grads
            self.update(table.weight, state, factors, group, lr=lr, max_norm=group["max_grad_norm"], seed=seed)
        group["updates"] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the row gradients."""
        super().zero_grad(set_to_none)
        for table in self._tables:
            if table.row_gradient is not None:
                table.row_gradient.discard()

    def release(self) -> None:
        for table in self._tables:
            if table.row_gradient is not None and table.row_gradient.owner() is self:
                table.release()
        self._tables = []


def require_row_settings(*, lr: float, max_grad_norm: float | None, rounding: str, prefix: str = "") -> None:
    """Checks what every row optimizer has; the names of its settings begin with a prefix."""
    require_number(f"{prefix}lr", lr, least=0.0)
    if max_grad_norm is not None:
        require_number(f"{prefix}max_grad_norm", max_grad_norm, above=0.0)
    require_choice(f"{prefix}rounding", rounding, get_args(Rounding))


def _require_one_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"row gradients are not exchanged between processes, so replicas would drift apart: got a world size of "
            f"{distributed.get_world_size()}, allowed is 1; train the tables with dense gradients there"
        )
