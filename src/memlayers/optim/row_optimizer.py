"""RowOptimizer: what the optimizers of value tables share; a subclass is a rule and its state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memlayers.ops.row_sum import row_norm
from memlayers.values import ValueTable, value_tables

Rounding = Literal["nearest", "stochastic"]
Moments = Literal["float32", "bfloat16"]


class RowOptimizer(torch.optim.Optimizer, ABC):
    """Touches only the rows that were read since the last step (paper, section 3.1: sparse updates).

    tables: value tables, or a module whose value tables are all taken. It becomes their owner (`ValueTable.own`):
    their `.grad` stays None, and `release` gives them back. A table that has an owner already, or a run of more than
    one process (replicas would drift apart), is a `ValueError`; a step by `torch.amp.GradScaler` is a `RuntimeError`,
    since row gradients are not among the gradients that it unscales. (Beside another optimizer that a scaler steps, a
    plain `step` of this one would not know of the scale: do not mix the two.)

    lr is constant: it lives in the group's ``value_lr``, where no learning-rate scheduler looks, unless
    ``schedule_values``, when the group's ``lr`` counts. max_grad_norm clips the gradient of each table by its own norm.
    rounding: of bfloat16 tables and states; others are rounded to the nearest. "stochastic" keeps on average
    what is smaller than half a unit in the last place (`memlayers.ops.rounding`); to the "nearest" loses it, and with
    it most of the training at small rates (docs/log.md).
    """

    _is_built = False
    # Makes GradScaler.step call `step` whatever it found, with `found_inf` set here, so that we can refuse.
    _step_supports_amp_scaling = True

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
        tables = value_tables(tables) if isinstance(tables, nn.Module) else list(tables)
        if not tables:
            raise ValueError("tables must hold at least one ValueTable, got none")
        for table in tables:
            if not isinstance(table, ValueTable):
                raise ValueError(f"tables must be ValueTable modules, got {type(table).__name__}")
        check_row_settings(lr=lr, max_grad_norm=max_grad_norm, rounding=rounding)
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
        self._is_built = True
        try:
            for table in tables:
                table.own(self)
                self._tables.append(table)
        except ValueError:
            self.release()
            raise

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
        scale: Tensor | None,
        seed: int,
    ) -> None:
        """One step of a table and its state, in place (see `memlayers.ops.row_step`)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows read since the last step, and consume their gradients."""
        refuse_grad_scaler(self)
        _require_one_process()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        lr = group["lr"] if group["schedule_values"] else group["value_lr"]
        for number, table in enumerate(self._tables):
            parts = None if table.row_gradient is None else table.row_gradient.consume()
            if parts is None:
                continue
            slots, weights, grads = (list(factors) for factors in zip(*parts, strict=True))
            scale = None
            if group["max_grad_norm"] is not None:
                norm = row_norm(slots, weights, grads, len(table.weight))
                scale = (group["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
            state = self.state[table.weight]
            if not state:
                state.update(self.new_state(table.weight, group))
            has_bfloat16 = any(whole.dtype == torch.bfloat16 for whole in (table.weight, *state.values()))
            is_stochastic = group["rounding"] == "stochastic" and has_bfloat16
            # Another for each step and table, and the same when a run is resumed.
            seed = group["updates"] * len(self._tables) + number if is_stochastic else -1
            self.update(table.weight, state, (slots, weights, grads), group, lr=lr, scale=scale, seed=seed)
        group["updates"] += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the row gradients."""
        super().zero_grad(set_to_none)
        for table in self._tables:
            if table.row_gradient is not None:
                table.row_gradient.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused with a `ValueError` once the optimizer is built: tables are taken when it is."""
        if self._is_built:
            raise ValueError(
                "param_group cannot be added: an optimizer of value tables takes them when it is built; call release() "
                "and build another"
            )
        super().add_param_group(param_group)

    def release(self) -> None:
        """Give the tables back: they are trained by dense gradients again, and this optimizer has nothing to step."""
        for table in self._tables:
            if table.row_gradient is not None and table.row_gradient.owner() is self:
                table.release()
        self._tables = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that states keep their own dtype: torch would cast them to a 16-bit table's."""
        super().load_state_dict(state_dict)
        restore_row_state(self, state_dict, {table.weight for table in self._tables})

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a row optimizer owns its tables and cannot be copied or pickled; use state_dict()")


def restore_row_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], tables: set[Tensor]) -> None:
    """Put the state of tables back as it was saved, where torch's `load_state_dict` cast it to the table's dtype."""
    for group in optimizer.param_groups:
        if "value_lr" in group:  # saved by version 0.1.0, which had no other rounding and counted no updates
            group.setdefault("rounding", "nearest")
            group.setdefault("updates", 0)
        if "value_lr" in group and "betas" in group:  # nor another dtype of moments
            group.setdefault("moments", "float32")
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, weight in zip(numbers, weights, strict=True):
        if weight in tables and number in state_dict["state"]:
            saved = state_dict["state"][number]
            optimizer.state[weight] = {name: value.to(weight.device, copy=True) for name, value in saved.items()}


def refuse_grad_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Raises `RuntimeError` inside `GradScaler.step`, which marks the optimizer that it steps."""
    if getattr(optimizer, "found_inf", None) is not None:
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]  # the scaler will not get to it
        raise RuntimeError(
            "row gradients are not unscaled by GradScaler: train in bfloat16 (no scaler), or call release() and train "
            "the value tables with dense gradients"
        )


# Checks of settings: each raises `ValueError` naming the setting, its value and what is allowed.


def check_row_settings(*, lr: float, max_grad_norm: float | None, rounding: str, prefix: str = "") -> None:
    """What every row optimizer has; the names of its settings begin with a prefix."""
    check_at_least_0(f"{prefix}lr", lr)
    if max_grad_norm is not None and not (_is_finite(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"{prefix}max_grad_norm must be above 0 or None, got {max_grad_norm!r}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'{prefix}rounding must be "nearest" or "stochastic", got {rounding!r}')


def check_moments(name: str, moments: str) -> None:
    if moments not in ("float32", "bfloat16"):
        raise ValueError(f'{name} must be "float32" or "bfloat16", got {moments!r}')


def check_at_least_0(name: str, value: float) -> None:
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_betas(betas: tuple[float, float]) -> None:
    are_two = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not (are_two and all(_is_finite(beta) and 0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")


def check_eps(eps: float) -> None:
    if not (_is_finite(eps) and eps > 0):
        raise ValueError(f"eps must be a finite number above 0, got {eps!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _require_one_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"row gradients are not exchanged between processes, so replicas would drift apart: got a world size of "
            f"{distributed.get_world_size()}, allowed is 1; train the tables with dense gradients there"
        )
