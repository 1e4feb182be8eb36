"""RowAdagrad: Adagrad for value tables, with one number an element or one a row, fed by their row gradients."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from memlayers.checks import require_number
from memlayers.ops import wide_dtype
from memlayers.ops.row_step import row_adagrad_
from memlayers.optim.row_optimizer import Rounding, RowOptimizer
from memlayers.values import ValueTable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RowAdagrad(RowOptimizer):
    """Adagrad on the rows that were read (`memlayers.ops.row_step.adagrad`).

    Args:
        tables: as in `RowOptimizer`, and so are ``lr``, ``max_grad_norm``, ``schedule_values``, ``rounding`` and
            ``process_group``.
        eps: added to the root of the sum of squares.
        per_row: keep one number a row, the sum of the means of its squared gradients, instead of one an element: a
            state of [S] beside a table of [S, V].

    Raises:
        ValueError: as `RowOptimizer` does.
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
        process_group: "ProcessGroup | None" = None,
    ):
        require_number("eps", eps, above=0.0)
        super().__init__(
            tables,
            lr=lr,
            max_grad_norm=max_grad_norm,
            schedule_values=schedule_values,
            rounding=rounding,
            process_group=process_group,
            eps=eps,
            per_row=per_row,
        )

    def new_state(self, weight_SV, group):
        """Sums of squares: [S, V], or [S] with ``per_row``."""
        shape = weight_SV.shape[:1] if group["per_row"] else weight_SV.shape
        return {"square_sum": torch.zeros(shape, dtype=wide_dtype(weight_SV.dtype), device=weight_SV.device)}

    def update(self, weight_SV, state, factors, group, *, lr, **how):
        row_adagrad_(weight_SV, state["square_sum"], *factors, lr=lr, eps=group["eps"], **how)
