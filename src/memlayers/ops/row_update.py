"""row update: Adam on the rows that were read, and on no other (lazy moments).

Letters: S slots, V width, P summed rows, C rows of one piece.
"""

import torch
from torch import Tensor

from memlayers.ops.record import SummedRows


@torch.no_grad()
def row_adam_(
    table_SV: Tensor,
    exp_avg_SV: Tensor,
    exp_avg_sq_SV: Tensor,
    steps_S: Tensor,
    rows: SummedRows,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    max_grad_norm: float | None = None,
) -> None:
    """One Adam step on the live rows, in place; every other row and its state stay bit-identical.

    A row's moments decay, and its bias correction counts (`steps_S`, int32), only when it is read: at its t-th read,
        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
        row -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    which is Adam when every row is read each step. Computed in the dtype of the moments (float32, or float64 for a
    float64 table) and rounded once to the table's. `max_grad_norm` clips by the norm of all summed rows.
    """
    beta1, beta2 = betas
    scale = None
    if max_grad_norm is not None:
        scale = (max_grad_norm / (rows.norm() + 1e-6)).clamp(max=1.0)
    for index, live_C, grad_CV in rows.chunks():
        grad_CV = grad_CV.to(exp_avg_SV.dtype)
        if scale is not None:
            grad_CV = grad_CV * scale
        old_CV, old_avg_CV, old_sq_CV, old_steps_C = (
            table_SV[index],
            exp_avg_SV[index],
            exp_avg_sq_SV[index],
            steps_S[index],
        )
        steps_C = old_steps_C + 1
        avg_CV = old_avg_CV.lerp(grad_CV, 1 - beta1)
        sq_CV = (old_sq_CV * beta2).addcmul_(grad_CV, grad_CV, value=1 - beta2)
        correction1_C = 1 - beta1 ** steps_C.to(avg_CV.dtype)
        correction2_C = 1 - beta2 ** steps_C.to(avg_CV.dtype)
        denominator_CV = (sq_CV.sqrt() / correction2_C.sqrt()[:, None]).add_(eps)
        step_CV = (avg_CV / denominator_CV).mul_((lr / correction1_C)[:, None])
        new_CV = (old_CV.to(avg_CV.dtype) - step_CV).to(table_SV.dtype)
        live_C1 = live_C[:, None]
        table_SV[index] = torch.where(live_C1, new_CV, old_CV)
        exp_avg_SV[index] = torch.where(live_C1, avg_CV, old_avg_CV)
        exp_avg_sq_SV[index] = torch.where(live_C1, sq_CV, old_sq_CV)
        steps_S[index] = torch.where(live_C, steps_C, old_steps_C)
