"""RowSGD: stochastic gradient descent for value tables, without any state, fed by their row gradients."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from memlayers.ops.row_step import row_sgd_
from memlayers.optim.row_optimizer import Rounding, RowOptimizer
from memlayers.values import ValueTable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RowSGD(RowOptimizer):
    """row -= lr * gradient for the rows that were read; arguments and errors are those of `RowOptimizer`."""

    _takes_rates = True

    def __init__(
        self,
        tables: nn.Module | Iterable[ValueTable],
        *,
        lr: float = 1e-3,
        max_grad_norm: float | None = None,
        schedule_values: bool = False,
        rounding: Rounding = "stochastic",
        process_group: "ProcessGroup | None" = None,
    ):
        super().__init__(
            tables,
            lr=lr,
            max_grad_norm=max_grad_norm,
            schedule_values=schedule_values,
            rounding=rounding,
            process_group=process_group,
        )

    def new_state(self, weight_SV, group):
        """None."""
        return {}

    def update(self, weight_SV, state, factors, group, *, lr, **how):
        row_sgd_(weight_SV, *factors, lr=lr, **how)
