"""RowAdagrad: Adagrad for value tables, with one number an element or one a row, fed by their row gradients."""

from collections.abc import Iterable

import torch
from torch import nn

from memlayers.ops import wide_dtype
from memlayers.ops.row_step import row_adagrad_
from memlayers.optim.row_optimizer import Rounding, RowOptimizer, check_eps
from memlayers.values import ValueTable


class RowAdagrad(RowOptimizer):
    """Adagrad on the rows that were read (`memlayers.ops.row_step.adagrad`); the rest is as in `RowOptimizer`.

    per_row: one number a row, the sum of the means of its squared gradients, instead of one an element: a state of
    [S] beside a table of [S, V].
    """

    def __init__(
        self,
        tables: nn.Module | Iterable[ValueTable],
        *,
        lr: float = 1e-2,
        eps: float = 1e-10,
        per_row: bool = False,
        max_grad_norm: float | None = None,
        schedule_values: bool = False,
        rounding: Rounding = "stochastic",
    ):
        check_eps(eps)
        super().__init__(
            tables,
            lr=lr,
            max_grad_norm=max_grad_norm,
            schedule_values=schedule_values,
            rounding=rounding,
            eps=eps,
            per_row=per_row,
        )

    def new_state(self, weight_SV, group):
        """Sums of squares: [S, V], or [S] with ``per_row``."""
        shape = weight_SV.shape[:1] if group["per_row"] else weight_SV.shape
        return {"square_sum": torch.zeros(shape, dtype=wide_dtype(weight_SV.dtype), device=weight_SV.device)}

    def update(self, weight_SV, state, factors, group, *, lr, scale, seed):
        row_adagrad_(weight_SV, state["square_sum"], *factors, lr=lr, eps=group["eps"], scale=scale, seed=seed)
