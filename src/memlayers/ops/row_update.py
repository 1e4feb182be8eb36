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
    if table_SV.device.type == "cpu":  # where a shape that depends on the data costs nothing
        rows = rows.compact()
    for index, live_C, grad_CV in rows.chunks():
        grad_CV = grad_CV.to(exp_avg_SV.dtype)
        if scale is not None:
            grad_CV = grad_CV * scale
        steps_C = steps_S[index] + 1
        avg_CV = exp_avg_SV[index].lerp(grad_CV, 1 - beta1)
        sq_CV = (exp_avg_sq_SV[index] * beta2).addcmul_(grad_CV, grad_CV, value=1 - beta2)
        correction1_C = 1 - beta1 ** steps_C.to(avg_CV.dtype)
        correction2_C = 1 - beta2 ** steps_C.to(avg_CV.dtype)
        denominator_CV = sq_CV.sqrt().div_(correction2_C.sqrt()[:, None]).add_(eps)
        step_CV = (avg_CV / denominator_CV).mul_((lr / correction1_C)[:, None])
        new_CV = table_SV[index].to(avg_CV.dtype).sub(step_CV).to(table_SV.dtype)
        for whole, new in ((table_SV, new_CV), (exp_avg_SV, avg_CV), (exp_avg_sq_SV, sq_CV), (steps_S, steps_C)):
            if live_C is not None:
                new = torch.where(live_C.view(-1, *[1] * (new.ndim - 1)), new, whole[index])
            whole[index] = new
