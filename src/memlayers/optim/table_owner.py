"""TableOwner: what every optimizer that may own value tables keeps, and what it refuses."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memlayers.distributed.columns import columns_of
from memlayers.optim.chosen_rows import CHOSEN, masks_of
from memlayers.storage import MappedTable
from memlayers.torch_private import is_asked_by_grad_scaler
from memlayers.values import ValueTable

_LOG = logging.getLogger("memlayers")


class TableOwner(torch.optim.Optimizer, ABC):
    """A `torch.optim.Optimizer` whose groups with a ``value_lr`` hold value tables.

    It cannot be copied or pickled, takes no further groups, and is not stepped by a `torch.amp.GradScaler`, which
    unscales the gradients of parameters and does not see those of rows.
    """

    _is_built = False
    _takes_rates = False  # of rows: whether a gradient that is scaled scales the step, as it does without states

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler.step call `step` whatever it found, with `found_inf` set here, so that `step` can refuse.

        Lightning asks the same flag whether it must not clip gradients, also where there is no scaler; it may.
        """
        return is_asked_by_grad_scaler() and any("value_lr" in group for group in self.param_groups)

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(groups, defaults)
        # By the weight of a table. Not among the states: of an optimizer that has any, checkpoints think it has all.
        self._chosen: dict[Tensor, Tensor] = {}
        self._is_built = True

    @abstractmethod
    def release(self) -> None:
        """Give the value tables back: they are trained by dense gradients again, and not by this optimizer."""

    @abstractmethod
    def _update(self) -> None:
        """One step, without gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters, of a table the rows that were read since the last step, and consume row gradients."""
        if getattr(self, "found_inf", None) is not None:
            del self.found_inf, self.grad_scale  # type: ignore[attr-defined]  # the scaler will not get to it
            raise RuntimeError(
                "row gradients are not unscaled by GradScaler: train in bfloat16 (no scaler), or call release() and "
                "train the value tables with dense gradients"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused with a `ValueError` once the optimizer is built: its groups are made then."""
        if self._is_built:
            raise ValueError(
                "param_group cannot be added: an optimizer of value tables makes its groups when it is built; call "
                "release() and build another"
            )
        super().add_param_group(param_group)

    @property
    @abstractmethod
    def tables(self) -> list[ValueTable]:
        """The tables that it owns."""

    def choose_rows(self, rows: Mapping[ValueTable, Tensor | Sequence[int]] | Tensor | Sequence[int] | None) -> None:
        """Has steps move these rows only; the others, and their states, stay as they are, bit for bit.

            optimizer.choose_rows(select_slots(model, counts, batch, slots=500))

        It holds from the next step on, also for what was recorded before, until other rows are chosen: call it once for
        a whole set of texts, or before each step. Gradients of other rows are left out of ``max_grad_norm``, too. The
        choice is among the states in `state_dict`: a run that is resumed goes on with it, and a state without a choice
        leaves the one that was made. `torch.distributed.checkpoint` loads what an optimizer has and no more: choose any
        rows before it loads a choice. In several processes all choose the same rows, or the step is refused on all.

        Args:
            rows: slots [R], or a mask [S] of bool, by table, as `memlayers.select_slots` returns them; those of frozen
                tables are ignored. For an optimizer of one table also its slots alone. For `RowSGD` also rates [S] of
                floats in [0, 1], as `memlayers.slot_rates` returns them: each row moves by its share of the learning
                rate. None: all rows again.

        Raises:
            ValueError: slots that a table has not; a table of this optimizer without an entry; one of another; rates
                for another rule, which would undo them. The choice stays as it was.
        """
        if not self.tables:
            raise ValueError("rows can be chosen where this optimizer trains value tables, and it trains none")
        masks = {} if rows is None else masks_of(rows, self.tables)
        for mask_S in masks.values():
            self._require_known(mask_S)
        self._chosen.clear()
        self._chosen.update({table.weight: mask_S for table, mask_S in masks.items()})

    def _require_known(self, mask_S: Tensor) -> None:
        if mask_S.is_floating_point() and not self._takes_rates:
            raise ValueError(
                f"rates of rows are for RowSGD, got some for a {type(self).__name__}, which divides gradients by their "
                "own size and so undoes them: choose slots (select_slots)"
            )

    @property
    def chosen_rows(self) -> dict[ValueTable, Tensor] | None:
        """By table the slots that steps may move, ascending; None where all of them may."""
        held = {table: self._chosen.get(table.weight) for table in self.tables}
        return {table: mask_S.nonzero().squeeze(1) for table, mask_S in held.items() if mask_S is not None} or None

    def _in_files(self) -> dict[Tensor, MappedTable]:
        return {table.weight: table for table in self.tables if isinstance(table, MappedTable)}

    def _weights(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
        """The weights of tables by the numbers that a state dict has for them, which are in the order of the groups."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if "value_lr" in group:
                yield from zip(saved["params"], group["params"], strict=True)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, but for the states of tables in files, which stay there: ``in_files`` stands for them.

        It is the number of the table's checkpoint that has them, -1 where rows have changed since the last one.

        A choice of rows is one more state of its table.
        """
        state_dict, in_files = super().state_dict(), self._in_files()
        for number, weight in self._weights(state_dict):
            if weight in in_files and (number in state_dict["state"] or weight in self._chosen):
                state_dict["state"][number] = {"in_files": in_files[weight].unchanged_since}
            if weight in self._chosen:
                state_dict["state"][number] = {**state_dict["state"].get(number, {}), CHOSEN: self._chosen[weight]}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that states of tables keep their own dtype, which torch would cast to a 16-bit table's.

        Of the states of a whole table, one in columns takes its columns. Those of tables in files stay what they are in
        the folder; the log says so where they are of another moment. Rows that were chosen when the state was saved are
        chosen again; where none were, the choice stays.

        Raises `ValueError` for a state with other groups, one of another row optimizer, of tables of other sizes or
        elsewhere, or one that version 0.1.0 saved. Nothing is loaded then.
        """
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(
                f"state_dict must have {len(self.param_groups)} parameter groups, as this optimizer, got "
                f"{len(state_dict['param_groups'])}: build the optimizer as the saved one was (selector_lr adds groups)"
            )
        for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if _rule(ours) != _rule(saved):
                raise ValueError(
                    f"state_dict must be of {_rule(ours)}, got that of {_rule(saved)} for the same group: build the "
                    "optimizer as the saved one was, or load the weights alone, and train on with a new optimizer"
                )
            if "value_lr" in ours and len(ours["params"]) != len(saved["params"]):
                raise ValueError(
                    f"state_dict must be of {len(ours['params'])} value tables, as this optimizer's, got that of "
                    f"{len(saved['params'])}: build the model as the saved one was, or train on with a new optimizer"
                )
            if missing := [name for name in ("rounding", "moments", "updates") if name in ours and name not in saved]:
                raise ValueError(
                    f"state_dict must say {', '.join(map(repr, missing))} for its value tables: memlayers 0.1.0 saved "
                    "it, which did not. Load the weights alone, and train on with a new optimizer"
                )
        in_files = self._in_files()
        saved_states = {
            weight: state_dict["state"][number]
            for number, weight in self._weights(state_dict)
            if number in state_dict["state"]
        }
        for weight, saved in saved_states.items():
            if CHOSEN in saved:
                self._require_known(saved[CHOSEN])
            if ("in_files" in saved) is not (weight in in_files):
                raise ValueError(_IN_FILES if "in_files" in saved else _IN_MEMORY)
            for name, value in saved.items():
                if isinstance(value, Tensor) and value.shape != weight.shape[: value.ndim]:
                    raise ValueError(
                        f"state_dict must hold states of a table of {[*weight.shape]}, got {name!r} of "
                        f"{[*value.shape]}: build the model as the saved one was, or train on with a new optimizer"
                    )
        super().load_state_dict(state_dict)
        for weight, saved in saved_states.items():
            self.state[weight] = {}
            if CHOSEN in saved:  # a state that was saved without a choice takes none away
                self._chosen[weight] = saved[CHOSEN].to(weight.device, copy=True)
                saved = {name: value for name, value in saved.items() if name != CHOSEN}
            if weight in in_files:
                table = in_files[weight]
                self.state[weight] = table.held_states()
                if not 0 <= saved["in_files"] == table.unchanged_since:
                    _LOG.warning(_OTHER_MOMENT, str(table.folder))
                continue
            saved = {name: columns_of(value, weight) for name, value in saved.items()}
            self.state[weight] = {name: value.to(weight.device, copy=True) for name, value in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer that may own value tables cannot be copied or pickled, or a table would have two owners; "
            "use state_dict()"
        )


def _rule(group: dict[str, Any]) -> str:
    """What a parameter group is of, by the settings that tell it."""
    if "value_lr" not in group:
        return "dense parameters"
    return "RowAdam" if "betas" in group else "RowAdagrad" if "per_row" in group else "RowSGD"


_IN_FILES = (
    "state_dict must hold the states of this optimizer's tables, got that of an optimizer whose tables were in files "
    "and keep their states: put the model's table there (values=MappedFile(folder)), or train on with a new optimizer"
)
_OTHER_MOMENT = (
    "the moments of the table in %r are of another moment than the state that is loaded, and stay what they are in the "
    "folder: call checkpoint() on the table before state_dict(), and restore(number) before load_state_dict()"
)
_IN_MEMORY = (
    "state_dict must leave out the states of tables in files, which are in the tables' folders, got some of a table in "
    "memory: keep the table in memory, or train on with a new optimizer"
)
