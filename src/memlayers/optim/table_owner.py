"""TableOwner: what every optimizer that may own value tables keeps, and what it refuses."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from memlayers.distributed.columns import columns_of
from memlayers.torch_private import is_asked_by_grad_scaler


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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that states of tables keep their own dtype, which torch would cast to a 16-bit table's.

        Of the states of a whole table, one in columns takes its columns.

        Raises `ValueError` for a state with other groups, or one that version 0.1.0 saved.
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
        super().load_state_dict(state_dict)
        # torch numbers parameters in the order of the groups.
        saved_groups = [group["params"] for group in state_dict["param_groups"]]
        for group, numbers in zip(self.param_groups, saved_groups, strict=True):
            for weight, number in zip(group["params"], numbers, strict=True):
                if "value_lr" in group and number in state_dict["state"]:
                    saved = state_dict["state"][number]
                    saved = {name: columns_of(value, weight) for name, value in saved.items()}
                    self.state[weight] = {name: value.to(weight.device, copy=True) for name, value in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer that may own value tables cannot be copied or pickled, or a table would have two owners; "
            "use state_dict()"
        )
