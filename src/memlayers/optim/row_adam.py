"""RowAdam: Adam with lazy moments for value tables, fed by their row gradients."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn

from memlayers.checks import plain_number, require_betas, require_choice, require_number
from memlayers.ops import wide_dtype
from memlayers.ops.row_step import row_adam_
from memlayers.optim.row_optimizer import Rounding, RowOptimizer
from memlayers.values import ValueTable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Moments = Literal["float32", "bfloat16"]


class RowAdam(RowOptimizer):
    """Adam on the rows that were read (`memlayers.ops.row_step.adam`).

    Args:
        tables: as in `RowOptimizer`, and so are ``lr``, ``max_grad_norm``, ``schedule_values``, ``rounding`` and
            ``process_group``.
        betas: decay rates of the two moments, at each read of a row.
        eps: added to the root of the second moment.
        moments: "float32" (float64 beside a float64 table), or "bfloat16", which takes 4 bytes an element of the table
            instead of 8: of a float32 row of width 1,024 and its moments, 8 KB instead of 12. They are rounded as
            ``rounding`` says: to the "nearest", a second moment would never decay, since 0.1 % of it is below half a
            unit in its last place.

    Raises:
        ValueError: as `RowOptimizer` does.
    """

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
        moments: Moments = "float32",
        process_group: "ProcessGroup | None" = None,
    ):
        require_betas("betas", betas)
        require_number("eps", eps, above=0.0)
        require_choice("moments", moments, get_args(Moments))
        super().__init__(
            tables,
            lr=lr,
            max_grad_norm=max_grad_norm,
            schedule_values=schedule_values,
            rounding=rounding,
            process_group=process_group,
            betas=tuple(map(plain_number, betas)),
            eps=eps,
            moments=moments,
        )

    def new_state(self, weight_SV, group):
        """Two moments [S, V], and counts of reads [S]."""
        dtype = torch.bfloat16 if group["moments"] == "bfloat16" else wide_dtype(weight_SV.dtype)
        return {
            "exp_avg": torch.zeros_like(weight_SV, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(weight_SV, dtype=dtype),
            "steps": torch.zeros(len(weight_SV), dtype=torch.int32, device=weight_SV.device),
        }

    def update(self, weight_SV, state, factors, group, *, lr, **how):
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
            **how,
        )
