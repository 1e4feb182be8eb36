"""RowAdam: Adam with lazy moments for value tables, fed by their row gradients."""

from collections.abc import Iterable

import torch
from torch import nn

from memlayers.ops.row_step import row_adam_
from memlayers.optim.row_optimizer import Rounding, RowOptimizer, check_betas, check_eps, state_dtype
from memlayers.values import ValueTable


class RowAdam(RowOptimizer):
    """Adam on the rows that were read (`memlayers.ops.row_step.adam`); the rest is as in `RowOptimizer`."""

    def __init__(
        self,
        tables: nn.Module | Iterable[ValueTable],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        schedule_values: bool = False,
        rounding: Rounding = "stochastic",
    ):
        check_betas(betas)
        check_eps(eps)
        super().__init__(
            tables,
            lr=lr,
            max_grad_norm=max_grad_norm,
            schedule_values=schedule_values,
            rounding=rounding,
            betas=betas,
            eps=eps,
        )

    def new_state(self, weight_SV, group):
        """Two moments [S, V], and counts of reads [S]."""
        return {
            "exp_avg": torch.zeros_like(weight_SV, dtype=state_dtype(weight_SV)),
            "exp_avg_sq": torch.zeros_like(weight_SV, dtype=state_dtype(weight_SV)),
            "steps": torch.zeros(len(weight_SV), dtype=torch.int32, device=weight_SV.device),
        }

    def update(self, weight_SV, state, factors, group, *, lr, scale, seed):
        moments = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        row_adam_(
            weight_SV,
            *moments,
            state["steps"],
            *factors,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            scale=scale,
            seed=seed,
        )
