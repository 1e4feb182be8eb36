"""RowOptimizer: what the optimizers of value tables share; a subclass is a rule and its state."""

import logging
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from memlayers.checks import plain_number, require_bool, require_choice, require_number
from memlayers.distributed.agreement import Ranks, agreed, fingerprint, own_part, take_from_first
from memlayers.distributed.columns import ColumnTable
from memlayers.distributed.exchange import Held, exchange, packed, scaled
from memlayers.distributed.wrapping import keep_out_of_ddp
from memlayers.ops.row_gradient_tensor import RowTensor
from memlayers.ops.row_sum import Part
from memlayers.optim.chosen_rows import only
from memlayers.optim.table_owner import TableOwner
from memlayers.storage import MappedTable
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
            gradients (`memlayers.distributed`). None is all processes. Of tables in columns their mesh says it.
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
            if table.untrainable:
                raise ValueError(table.untrainable)
            if _is_computed(table):
                raise ValueError(_COMPUTED)
            if hasattr(table.weight, "placements") and not isinstance(table, ColumnTable):  # a DTensor
                raise ValueError(
                    "the weight of a value table must be whole, got a DTensor: keep FSDP from sharding it "
                    "(fully_shard(..., ignored_params={table.weight, table.row_mark}))"
                )
        if len({table.weight for table in tables}) < len({*tables}):
            raise ValueError(_ONE_WEIGHT)
        if any(isinstance(table, ColumnTable) for table in tables):
            _check_columns(tables, process_group, per_row=settings.get("per_row", False))
        require_row_settings(lr=lr, max_grad_norm=max_grad_norm, rounding=rounding, schedule_values=schedule_values)
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
        **how: Any,
    ) -> None:
        """One step of a table and its state, in place.

        How to clip and to round, and of which columns, is for the operations of `memlayers.ops.row_step`.
        """

    def before_step(self) -> None:
        """Has tables in files keep what a step will change, in a log on the disk; called by `step`.

        Raises `OSError`, as on a full disk, before anything has changed.
        """
        (group,) = self.param_groups
        for table in self._tables:
            if isinstance(table, MappedTable) and (parts := self._held(table).parts):
                self._state_of(table, group)
                table.before_step(parts)

    def _update(self) -> None:
        (group,) = self.param_groups
        replicas, columns = self._ranks()
        are_several = replicas is not None or columns is not None
        fault = self._fault(are_several)
        for table in self._tables:  # a gradient somebody has set asks for a state, as torch's checkpoints do
            if not _is_computed(table) and table.weight.grad is not None:
                self._state_of(table, group)
        if are_several:
            held = self._held_by_all(replicas, columns, fault, group)
        elif fault is not None:
            raise RuntimeError(fault)
        else:
            self.before_step()
            held = [self._held(table).parts for table in self._tables]
        lr = float(group["lr"] if group["schedule_values"] else group["value_lr"])
        for number, table in enumerate(self._tables):
            if table.row_gradient is None:
                continue
            parts = table.row_gradient.consume(held[number])
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
            how = {"max_norm": group["max_grad_norm"], "seed": seed}
            if isinstance(table, ColumnTable):
                how["first_column"] = table.own_bounds[0]
                if how["max_norm"] is not None:
                    how["norm"] = table.row_gradient.norm_of(parts)
            own = {name: own_part(one) for name, one in state.items()}
            self.update(own_part(table.weight), own, factors, group, lr=lr, **how)
        group["updates"] += 1

    def _state_of(self, table: ValueTable, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[table.weight]
        if not state:
            state.update(table.make_states(lambda weight_SV: self.new_state(weight_SV, group)))
        return state

    def _held(self, table: ValueTable) -> Held:
        gradient = table.row_gradient
        if gradient is None:
            return Held([], 0)
        grad = table.weight.grad
        if grad is not None and not bool(own_part(grad).any()):  # of torch's checkpoints; not to be sent
            table.weight.grad = None
        held = Held(gradient.held(), gradient.passes)
        if self.param_groups[0].get("maximize"):  # of torch's optimizers, set by hand in all groups
            uphill = [part._replace(weights_TK=-part.weights_TK) for part in held.parts]
            held = held._replace(parts=uphill)
        if (mask_S := self._chosen.get(table.weight)) is not None:  # before anything is sent
            held = held._replace(parts=only(held.parts, mask_S))
        return table.in_order(held) if isinstance(table, ColumnTable) else held

    def _fault(self, are_several: bool) -> str | None:
        """Why no step can be made."""
        for table in self._tables:
            if table.row_gradient is None:
                continue
            if _is_computed(table):
                return _COMPUTED
            if not table.row_gradient.is_of(table.weight):
                return _REPLACED
            if are_several and isinstance(table, MappedTable):
                return _IN_FILES
            grad = table.weight.grad
            if isinstance(table, ColumnTable) and grad is not None and bool(own_part(grad).any()):
                return _DENSE_IN_COLUMNS
            mark = table.row_mark.grad
            is_plain = mark is not None and (table.weight.grad is not None or not isinstance(mark, RowTensor))
            if are_several and is_plain:
                return _DENSE_TOO
            if (fault := table.row_gradient.fault()) is not None:
                return fault
        return None

    # Several processes.

    def _ranks(self) -> tuple[Ranks | None, Ranks | None]:
        """The processes that hold replicas of what this one holds, and those that hold the other columns."""
        first = next(iter(self._tables), None)
        return (
            (first.replicas, first.ranks) if isinstance(first, ColumnTable) else (Ranks.of(self._process_group), None)
        )

    def _held_by_all(
        self, replicas: Ranks | None, columns: Ranks | None, fault: str | None, group: dict[str, Any]
    ) -> list[list[Part]]:
        """The mean over ranks of what they recorded; raises on all of them what makes one of them raise."""
        weights = [own_part(table.weight) for table in self._tables]
        held = [Held([], 0) if fault is not None else self._held(table) for table in self._tables]
        settings = {
            "optimizer": type(self).__name__,
            "tables": [(*table.weight.shape, str(table.weight.dtype)) for table in self._tables],
            **{name: float(value) if torch.is_tensor(value) else value for name, value in group.items()},
            "the choice of rows": [
                fingerprint(self._chosen[table.weight]) if table.weight in self._chosen else None
                for table in self._tables
            ],
        }
        del settings["params"]
        error: Exception | None = None
        if columns is not None:
            try:
                self._require_own_columns(agreed(columns, fault, settings, [*self._checksum(held), *self._contents()]))
                self._may_differ &= replicas is not None
            except (RuntimeError, ValueError) as found:  # replicas are told first
                error, fault = found, str(found)
        if replicas is not None:
            sent = packed(held, weights)
            said = agreed(replicas, fault, settings, [int(self._may_differ), len(sent)])
            if any(may_differ for may_differ, _ in said):
                self._take_from_first(replicas, group)
            parts = exchange(replicas, held, weights, sent, [length for _, length in said])
        else:
            parts = [one.parts for one in held]
        if error is not None:
            raise error
        return parts if columns is None else [[scaled(part, columns.size) for part in one] for one in parts]

    @staticmethod
    def _require_own_columns(said: list[list[int]]) -> None:
        """Raises `RuntimeError` unless the ranks recorded the same, and hold columns that are not each other's."""
        are_merged, checksums, *contents = zip(*said, strict=True)
        if not any(are_merged) and len({*checksums}) > 1:
            raise RuntimeError(_NOT_ALIKE)
        for by_rank in contents:
            known = [one for one in by_rank if one != 0]
            if len({*known}) < len(known):
                raise RuntimeError(_SAME_COLUMNS)

    def _checksum(self, held: list[Held]) -> list[int]:
        """Whether parts were merged, and a number of what is recorded, which is the same for all columns."""
        gradients = [table.row_gradient for table in self._tables]
        is_merged = any(gradient is not None and gradient.is_merged for gradient in gradients)
        weights = [part.weights_TK.flatten() for one in held for part in one.parts]
        return [int(is_merged), fingerprint(torch.cat(weights)) if weights and not is_merged else 0]

    def _contents(self) -> list[int]:
        """By table, a number of its columns here and one of their first state, after either may have been loaded.

        0 is for what would say nothing: one number in all places, no state, and nothing that was loaded.
        """
        tensors: list[Any] = []
        for table in self._tables:
            tensors += [table.weight, next(iter(self.state.get(table.weight, {}).values()), None)]
        found = [None if one is None or not self._may_differ else own_part(one) for one in tensors]
        return [0 if one is None or bool((one == one[:1, :1]).all()) else fingerprint(one) for one in found]

    def _take_from_first(self, ranks: Ranks, group: dict[str, Any]) -> None:
        """Makes tables and states those of rank 0, as `DistributedDataParallel` does with what it knows of."""
        first_has_state, *_ = ranks.gather_numbers([int(bool(self.state.get(table.weight))) for table in self._tables])
        tensors: dict[str, Tensor] = {}
        for number, table in enumerate(self._tables):
            if not first_has_state[number]:
                self.state.pop(table.weight, None)
            else:
                self._state_of(table, group)
            tensors[f"the weight of table {number}"] = own_part(table.weight)
            tensors |= {
                f"{name} of table {number}": own_part(state) for name, state in self.state.get(table.weight, {}).items()
            }
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


def require_row_settings(
    *, lr: float, max_grad_norm: float | None, rounding: str, schedule_values: bool, prefix: str = ""
) -> None:
    """Checks what every row optimizer has; the names of its own settings begin with a prefix."""
    require_number(f"{prefix}lr", lr, least=0.0)
    if max_grad_norm is not None:
        require_number(f"{prefix}max_grad_norm", max_grad_norm, above=0.0)
    require_choice(f"{prefix}rounding", rounding, get_args(Rounding))
    require_bool("schedule_values", schedule_values)


def _is_computed(table: ValueTable) -> bool:
    """Whether the weight is no parameter, but computed of others at each call (parametrised, pruned)."""
    return "weight" not in table._parameters


def _check_columns(tables: list[ValueTable], process_group: Any, *, per_row: bool) -> None:
    if len({getattr(table.weight, "device_mesh", None) for table in tables}) > 1:
        raise ValueError("tables must all be in columns of one mesh, or none: build an optimizer for each kind")
    if process_group is not None:
        raise ValueError("process_group must be None for tables in columns, whose mesh says who takes part")
    if per_row:
        raise ValueError(
            "per_row must be False for tables in columns, of whose rows no process has all: use RowAdagrad without it, "
            "or RowAdam, or keep replicas of the tables"
        )


_REPLACED = (
    "the weight of a value table was replaced after its row optimizer was built, as by load_state_dict(assign=True), "
    "so the optimizer would not train it: build the optimizer afterwards, or load without assign"
)
_COMPUTED = (
    "the weight of a value table is computed of other parameters (torch.nn.utils.parametrize or prune), which no row "
    "optimizer trains: make it plain again (parametrize.remove_parametrizations, prune.remove), or train the table "
    "with dense gradients by an optimizer of torch, after release() of the row optimizer if it has one"
)
_ONE_WEIGHT = (
    "tables must each have a weight of their own, got two tables with one, which each step would update twice: share "
    "the table itself (values=first.values, or second.values = first.values)"
)
_IN_FILES = (
    "a value table in files is trained by one process, which alone may open them: keep the table in memory (leave out "
    "values=MappedFile(...)), or train in one process"
)
_DENSE_TOO = (
    "a value table in row mode has a dense gradient beside its row gradient, or in its place: DistributedDataParallel "
    "reduces a gradient of zeros where it does not know of the row optimizer. Build the optimizer first, on the module "
    "that is then wrapped: optimizer = MemoryAdamW(model); model = DistributedDataParallel(model)"
)
_DENSE_IN_COLUMNS = (
    "a value table in columns has a dense gradient, which nobody has reduced over the ranks: it is trained by the row "
    "gradients that backward records; call zero_grad() and leave weight.grad alone"
)
_NOT_ALIKE = (
    "the row gradient of a table in columns was not scaled alike on all ranks. Each rank holds its columns of the "
    "gradient of all ranks' tokens: scale the loss before backward, not the gradient, by what differs between ranks"
)
_SAME_COLUMNS = (
    "two ranks hold the same columns of a table, or of its state: what one rank has saved was loaded by others. Save "
    "and load by torch.distributed.checkpoint, or by save_memory and load_memory(..., mesh=mesh), on all ranks"
)
