"""MemoryAdamW: one optimizer for a whole model, AdamW for its dense parameters and RowAdam for its value tables."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memlayers.optim.row_adam import RowAdam
from memlayers.optim.row_optimizer import (
    Moments,
    Rounding,
    check_at_least_0,
    check_betas,
    check_eps,
    check_moments,
    check_row_settings,
    refuse_grad_scaler,
    restore_row_state,
)
from memlayers.query import HeadRMSNorm, MaskedBatchNorm
from memlayers.values import ValueTable, value_tables

# Norms whose gains and biases may have more than one dimension; they are not decayed either.
_NORMS = (nn.LayerNorm, nn.RMSNorm, MaskedBatchNorm, HeadRMSNorm)


class MemoryAdamW(torch.optim.Optimizer):
    """AdamW for everything that is not a value table, `RowAdam` for the tables, as one `torch.optim.Optimizer`.

    In a plain loop, or in `transformers.Trainer`: ``Trainer(optimizers=(MemoryAdamW(model, lr=...), scheduler))`` or
    ``Trainer(optimizer_cls_and_kwargs=(MemoryAdamW, {"model": model, "lr": ...}))``.

    Parameters that need no gradient are left out. Weight decay spares vectors (biases, gains), norms and tables. A
    scheduler moves ``lr`` of the dense parameters; the values keep ``value_lr`` unless ``schedule_values``. The tables
    have ``value_max_grad_norm`` and ``value_rounding`` as in `RowOptimizer`, and ``value_moments`` as in `RowAdam`. A
    model without memories is trained by AdamW alone. Raises as `RowAdam` does, and `ValueError` when nothing is
    trainable.
    """

    _is_built = False

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        value_lr: float = 1e-3,
        value_max_grad_norm: float | None = None,
        value_rounding: Rounding = "stochastic",
        value_moments: Moments = "float32",
        schedule_values: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module (tables are found in it), got {type(model).__name__}")
        check_at_least_0("lr", lr)
        check_betas(betas)
        check_eps(eps)
        check_at_least_0("weight_decay", weight_decay)
        groups = dense_groups(model, weight_decay)
        tables = [table for table in value_tables(model) if table.weight.requires_grad]
        check_row_settings(lr=value_lr, max_grad_norm=value_max_grad_norm, rounding=value_rounding, prefix="value_")
        check_moments("value_moments", value_moments)
        if not groups and not tables:
            raise ValueError("model must have at least one parameter that requires a gradient, got none")
        self._dense = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps) if groups else None
        self._rows: RowAdam | None = None
        if tables:
            self._rows = RowAdam(
                tables,
                lr=value_lr,
                betas=betas,
                eps=eps,
                max_grad_norm=value_max_grad_norm,
                rounding=value_rounding,
                moments=value_moments,
                schedule_values=schedule_values,
            )
        # See RowAdam; without tables a GradScaler is welcome.
        self._step_supports_amp_scaling = bool(tables)
        groups = [group for part in self._parts() for group in part.param_groups]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._is_built = True
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the dense parameters and the rows that were read."""
        if self._rows is not None:
            refuse_grad_scaler(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those of rows too."""
        super().zero_grad(set_to_none)
        if self._rows is not None:
            self._rows.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused with a `ValueError` once the optimizer is built: its groups are made from the model."""
        if self._is_built:
            raise ValueError(
                "param_group cannot be added: the groups are made from the model's trainable parameters; call "
                "release() and build another optimizer"
            )
        super().add_param_group(param_group)

    def release(self) -> None:
        """Give the value tables back: they are trained by dense gradients again, and not by this optimizer."""
        if self._rows is not None:
            self._rows.release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that moments keep their own dtype: torch would cast them to a 16-bit table's."""
        super().load_state_dict(state_dict)
        if self._rows is not None:
            restore_row_state(
                self, state_dict, {weight for group in self._rows.param_groups for weight in group["params"]}
            )
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an optimizer that may own value tables cannot be copied or pickled; use state_dict()")

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [part for part in (self._dense, self._rows) if part is not None]

    def _share(self) -> None:
        """Both parts step on the groups and the state of the whole, so that schedulers and checkpoints see one."""
        first = 0
        for part in self._parts():
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last


def dense_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters outside of value tables, in a group that is decayed and one that is not."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, ValueTable):
            continue
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            is_spared = parameter.ndim < 2 or isinstance(module, _NORMS)
            (spared if is_spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
