"""RowOptimizer: what the optimizers of value tables share; a subclass is a rule and its state."""

import logging
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from memlayers.checks import plain_number, require_choice, require_number
from memlayers.distributed.agreement import Ranks, agreed, take_from_first
from memlayers.distributed.exchange import Held, exchange, packed
from memlayers.distributed.wrapping import keep_out_of_ddp
from memlayers.ops.row_gradient_tensor import RowTensor
from memlayers.ops.row_sum import Part
from memlayers.optim.table_owner import TableOwner
from memlayers.values import Companion, ValueTable, value_tables

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Rounding = Literal["nearest", "stochastic"]
_LOG = logging.getLogger("memlayers")


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
        process_group: of `torch.distributed`, the processes that hold replicas of the tables (the data-parallel ones):
            each takes part in each step, whatever it has recorded, and all make the same one, on the mean of their row
            gradients (`memlayers.distributed`). None is all processes.
        settings: of the subclass, which has checked them.

    Raises:
        ValueError: a bad setting; no table, or one that has an owner. No table is taken then. From `step`, on all
            ranks, settings that differ between them.
        RuntimeError: from `step`, when a `torch.amp.GradScaler` calls it; in several processes on all ranks, when one
            cannot make the step; nothing is changed.
    """

    def __init__(
        self,
        tables: nn.Module | Iterable[ValueTable],
        *,
        lr: float,
        max_grad_norm: float | None,
        schedule_values: bool,
        rounding: Rounding,
        process_group: "ProcessGroup | None" = None,
        **settings: Any,
    ):
        model = tables if isinstance(tables, nn.Module) else None
        if isinstance(tables, nn.Module):
            tables = value_tables(tables)
        tables = [table for table in tables if not isinstance(table, Companion)]  # a part of each
        if not tables:
            raise ValueError("tables must hold at least one ValueTable, got none")
        for table in tables:
            if not isinstance(table, ValueTable):
                raise ValueError(f"tables must be ValueTable modules, got {type(table).__name__}")
            if hasattr(table.weight, "placements"):  # a DTensor, whose class takes long to import
                raise ValueError(
                    "the weight of a value table must be whole, got a DTensor: keep FSDP from sharding it "
                    "(fully_shard(..., ignored_params={table.weight, table.row_mark}))"
                )
        require_row_settings(lr=lr, max_grad_norm=max_grad_norm, rounding=rounding)
        lr, max_grad_norm = plain_number(lr), plain_number(max_grad_norm)
        settings = {name: plain_number(value) for name, value in settings.items()}
        self._process_group = process_group
        self._may_differ = True  # from another process's replica: the weights, or what was loaded
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
            if model is not None:
                keep_out_of_ddp(model)
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
        (group,) = self.param_groups
        ranks = Ranks.of(self._process_group)
        fault = self._fault(ranks)
        for table in self._tables:  # a gradient somebody has set asks for a state, as torch's checkpoints do
            if table.weight.grad is not None:
                self._state_of(table, group)
        if ranks is None:
            if fault is not None:
                raise RuntimeError(fault)
            held = [self._held(table).parts for table in self._tables]
        else:
            held = self._held_by_all(ranks, fault, group)
        lr = float(group["lr"] if group["schedule_values"] else group["value_lr"])
        for number, table in enumerate(self._tables):
            parts = None if table.row_gradient is None else table.row_gradient.consume(held[number])
            held[number] = []
            if parts is None:
                continue
            slots, weights, grads = (list(factors) for factors in zip(*parts, strict=True))
            state = self._state_of(table, group)
            has_bfloat16 = any(whole.dtype == torch.bfloat16 for whole in (table.weight, *state.values()))
            is_stochastic = group["rounding"] == "stochastic" and has_bfloat16
            # Another for each step and table, and the same when a run is resumed.
            seed = group["updates"] * len(self._tables) + number if is_stochastic else -1
            factors = slots, weights, grads
            self.update(table.weight, state, factors, group, lr=lr, max_norm=group["max_grad_norm"], seed=seed)
        group["updates"] += 1

    def _state_of(self, table: ValueTable, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[table.weight]
        if not state:
            state.update(self.new_state(table.weight, group))
        return state

    def _held(self, table: ValueTable) -> Held:
        gradient = table.row_gradient
        return Held([], 0) if gradient is None else Held(gradient.held(), gradient.passes)

    def _fault(self, ranks: Ranks | None) -> str | None:
        """Why no step can be made."""
        for table in self._tables:
            if table.row_gradient is None:
                continue
            if not table.row_gradient.is_of(table.weight):
                return _REPLACED
            mark = table.row_mark.grad
            is_plain = mark is not None and (table.weight.grad is not None or not isinstance(mark, RowTensor))
            if ranks is not None and is_plain:
                return _DENSE_TOO
            if (fault := table.row_gradient.fault()) is not None:
                return fault
        return None

    # Several processes.

    def _held_by_all(self, ranks: Ranks, fault: str | None, group: dict[str, Any]) -> list[list[Part]]:
        """The mean over ranks of what they recorded; raises on all of them what makes one of them raise."""
        weights = [table.weight for table in self._tables]
        held = [Held([], 0) if fault is not None else self._held(table) for table in self._tables]
        sent = packed(held, weights)
        settings = {
            "optimizer": type(self).__name__,
            "tables": [(*weight.shape, str(weight.dtype)) for weight in weights],
            **{name: float(value) if torch.is_tensor(value) else value for name, value in group.items()},
        }
        del settings["params"]
        said = agreed(ranks, fault, settings, [int(self._may_differ), len(sent)])
        if any(may_differ for may_differ, _ in said):
            self._take_from_first(ranks, group)
        return exchange(ranks, held, weights, sent, [length for _, length in said])

    def _take_from_first(self, ranks: Ranks, group: dict[str, Any]) -> None:
        """Makes tables and states those of rank 0, as `DistributedDataParallel` does with what it knows of."""
        with_state = ranks.gather_numbers([int(bool(self.state.get(table.weight))) for table in self._tables])
        tensors: dict[str, Tensor] = {}
        for number, table in enumerate(self._tables):
            if not with_state[0][number]:
                self.state.pop(table.weight, None)
            elif any(not one[number] for one in with_state):
                self._state_of(table, group)
            tensors[f"the weight of table {number}"] = table.weight
            tensors |= {f"{name} of table {number}": state for name, state in self.state.get(table.weight, {}).items()}
        if differing := take_from_first(ranks, tensors):
            _LOG.warning("replicas differed and are as rank 0's from here on: %s", ", ".join(differing))
        self._may_differ = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the row gradients."""
        super().zero_grad(set_to_none)
        for table in self._tables:
            if table.row_gradient is not None:
                table.row_gradient.discard()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.compare_replicas()

    def compare_replicas(self) -> None:
        """Has the next step compare tables and states between processes, and take rank 0's where they differ."""
        self._may_differ = True

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


_REPLACED = (
    "the weight of a value table was replaced after its row optimizer was built, as by load_state_dict(assign=True), "
    "so the optimizer would not train it: build the optimizer afterwards, or load without assign"
)
_DENSE_TOO = (
    "a value table in row mode has a dense gradient beside its row gradient, or in its place: DistributedDataParallel "
    "reduces a gradient of zeros where it does not know of the row optimizer. Build the optimizer first, on the module "
    "that is then wrapped: optimizer = MemoryAdamW(model); model = DistributedDataParallel(model)"
)
