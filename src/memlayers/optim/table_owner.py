"""TableOwner: what every optimizer that may own value tables keeps, and what it refuses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memlayers.distributed.columns import columns_of
from memlayers.storage import MappedTable
from memlayers.torch_private import is_asked_by_grad_scaler
from memlayers.values import ValueTable


class TableOwner(torch.optim.Optimizer, ABC):
    """A `torch.optim.Optimizer` whose groups with a ``value_lr`` hold value tables.

    It cannot be copied or pickled, takes no further groups, and is not stepped by a `torch.amp.GradScaler`, which
    unscales the gradients of parameters and does not see those of rows.
    """

    _is_built = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler.step call `step` whatever it found, with `found_inf` set here, so that `step` can refuse.

        Lightning asks the same flag whether it must not clip gradients, also where there is no scaler; it may.
        """
        return is_asked_by_grad_scaler() and any("value_lr" in group for group in self.param_groups)

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(groups, defaults)
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

    def _in_files(self) -> dict[torch.Tensor, MappedTable]:
        return {table.weight: table for table in self.tables if isinstance(table, MappedTable)}

    def _weights(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
        """The weights of tables by the numbers that a state dict has for them, which are in the order of the groups."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if "value_lr" in group:
                yield from zip(saved["params"], group["params"], strict=True)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, but for the states of tables in files, which stay there: ``in_files`` stands for them."""
        state_dict, in_files = super().state_dict(), self._in_files()
        for number, weight in self._weights(state_dict):
            if number in state_dict["state"] and weight in in_files:
                state_dict["state"][number] = {"in_files": 1}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that states of tables keep their own dtype, which torch would cast to a 16-bit table's.

        Of the states of a whole table, one in columns takes its columns.

        Those of tables in files stay what they are in the folder.

        Raises `ValueError` for a state with other groups, one that version 0.1.0 saved, or one of tables elsewhere.
        """
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(
                f"state_dict must have {len(self.param_groups)} parameter groups, as this optimizer, got "
                f"{len(state_dict['param_groups'])}: build the optimizer as the saved one was (selector_lr adds groups)"
            )
        for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
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
            if ("in_files" in saved) is not (weight in in_files):
                raise ValueError(_IN_FILES if "in_files" in saved else _IN_MEMORY)
        super().load_state_dict(state_dict)
        for weight, saved in saved_states.items():
            if weight in in_files:
                self.state[weight] = in_files[weight].held_states()
                continue
            saved = {name: columns_of(value, weight) for name, value in saved.items()}
            self.state[weight] = {name: value.to(weight.device, copy=True) for name, value in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer that may own value tables cannot be copied or pickled, or a table would have two owners; "
            "use state_dict()"
        )


_IN_FILES = (
    "state_dict must hold the states of this optimizer's tables, got that of an optimizer whose tables were in files "
    "and keep their states: put the model's table there (values=MappedFile(folder)), or train on with a new optimizer"
)
_IN_MEMORY = (
    "state_dict must leave out the states of tables in files, which are in the tables' folders, got some of a table in "
    "memory: keep the table in memory, or train on with a new optimizer"
)
