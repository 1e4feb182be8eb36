"""row step: a rule (Adam, Adagrad, SGD) on the rows that were read, in place, from a table's factored gradient.

Every other row, and its state, stays bit-identical. The operations take the gradient as three lists, a part's factors
each (`memlayers.ops.row_sum.Part`), scale its sum down to the norm `max_norm` where it is given (clipping), and round
what is bfloat16, be it the rows or a state, to the nearest (`seed` < 0) or stochastically (`seed` >= 0, another for
each step and table). A rule is a pure function of the summed gradient of some rows and of their states, and gives what
to subtract from the rows and their new states, in float32 (float64 for float64).

The reference here runs anywhere and never waits for a device; the kernels (`memlayers.ops.cpu.rows` and
`memlayers.ops.gpu.rows`) neither store summed rows nor pass over a row twice. Where table and moments of Adam are
bfloat16, what a kernel subtracts may differ by 2**-12 of itself (`memlayers.ops.cpu.row_rules`).

Letters: T tokens, K rows a token, S slots, V width, C rows of one piece.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlayers.ops.precision import wide_dtype
from memlayers.ops.registry import operation
from memlayers.ops.rounding import round_to_bfloat16
from memlayers.ops.row_sum import Part, clipping_scale, parts_of, sum_parts


def adam(
    grad_CV: Tensor,
    avg_CV: Tensor,
    sq_CV: Tensor,
    steps_C: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """A row's moments decay, and its bias correction counts, only when it is read: at its t-th read,

        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
        row -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    which is Adam when every row is read each step.
    """
    steps_C = steps_C + 1
    avg_CV = avg_CV.lerp(grad_CV, 1 - beta1)
    sq_CV = (sq_CV * beta2).addcmul_(grad_CV, grad_CV, value=1 - beta2)
    denominator_CV = sq_CV.sqrt().div_(_correction(beta2, steps_C, sq_CV.dtype).sqrt()).add_(eps)
    step_CV = (avg_CV / denominator_CV).mul_(lr / _correction(beta1, steps_C, avg_CV.dtype))
    return step_CV, avg_CV, sq_CV, steps_C


def adagrad(grad_CV: Tensor, square_sum_CV: Tensor, *, lr: float, eps: float) -> tuple[Tensor, ...]:
    """s += g^2, row -= lr * g / (sqrt(s) + eps)."""
    square_sum_CV = torch.addcmul(square_sum_CV, grad_CV, grad_CV)
    return lr * grad_CV / (square_sum_CV.sqrt() + eps), square_sum_CV


def row_adagrad(grad_CV: Tensor, square_sum_C: Tensor, *, lr: float, eps: float) -> tuple[Tensor, ...]:
    """The same with one number a row: s += the mean of the row's g^2."""
    square_sum_C = square_sum_C + grad_CV.square().mean(1)
    return grad_CV * (lr / (square_sum_C.sqrt() + eps))[:, None], square_sum_C


def sgd(grad_CV: Tensor, *, lr: float) -> tuple[Tensor, ...]:
    """row -= lr * g."""
    return (lr * grad_CV,)


def _correction(beta: float, steps_C: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - beta^t [C, 1]; the plain difference would lose half of float32's digits at small t."""
    log = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(steps_C.to(dtype) * log)[:, None]


# The kernels know them by their place.
RULES = (adam, adagrad, row_adagrad, sgd)


class Step(NamedTuple):
    """What a row step is given: the arguments of its operation, checked, and in one form for all rules."""

    rule: Callable[..., tuple[Tensor, ...]]
    table_SV: Tensor
    states: tuple[Tensor, ...]  # [S, V] or [S]
    parts: list[Part]
    max_norm: float | None
    seed: int
    settings: dict[str, Any]  # of the rule
    # Where the table holds some columns of wider rows, the number of the first of them and the norm over all.
    first_column: int = 0
    norm: Tensor | None = None


def step_(step: Step) -> None:
    """The reference: sum, then apply the rule piece by piece."""
    _, table_SV, states, parts, max_norm, seed, _, first_column, norm = step
    dtype = wide_dtype(table_SV.dtype)
    rows = sum_parts(parts, len(table_SV))
    scale = None if max_norm is None else clipping_scale(rows.norm() if norm is None else norm, max_norm).to(dtype)
    if table_SV.device.type == "cpu":  # where a shape that depends on the data costs nothing
        rows = rows.compact()
    for index, live_C, grad_CV in rows.chunks():
        grad_CV = grad_CV.to(dtype) if scale is None else grad_CV.to(dtype) * scale
        wide = [state[index].to(dtype) if state.is_floating_point() else state[index] for state in states]
        step_CV, *new_states = step.rule(grad_CV, *wide, **step.settings)
        wholes, news = (table_SV, *states), (table_SV[index].to(dtype) - step_CV, *new_states)
        for stream, (whole, new) in enumerate(zip(wholes, news, strict=True)):
            new = _rounded(new, whole.dtype, index, seed, stream, first_column)
            if live_C is not None:
                new = torch.where(live_C.view(-1, *[1] * (new.ndim - 1)), new, whole[index])
            whole[index] = new


def _rounded(
    new: Tensor, dtype: torch.dtype, index: Tensor | slice, seed: int, stream: int, first_column: int
) -> Tensor:
    if seed < 0 or dtype != torch.bfloat16:
        return new.to(dtype)
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=new.device)
    return round_to_bfloat16(new.float().reshape(len(new), -1), index, seed, stream, first_column).view(new.shape)


def _adam_step(
    table_SV, exp_avg_SV, exp_avg_sq_SV, steps_S, slots, weights, grads, lr, beta1, beta2, eps, *how, **named
):
    settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
    states = exp_avg_SV, exp_avg_sq_SV, steps_S
    return _checked(adam, table_SV, states, (slots, weights, grads), settings, *how, **named)


def _adagrad_step(table_SV, square_sum, slots, weights, grads, lr, eps, *how, **named):
    rule = row_adagrad if square_sum.ndim == 1 else adagrad
    settings = {"lr": lr, "eps": eps}
    return _checked(rule, table_SV, (square_sum,), (slots, weights, grads), settings, *how, **named)


def _sgd_step(table_SV, slots, weights, grads, lr, *how, **named):
    return _checked(sgd, table_SV, (), (slots, weights, grads), {"lr": lr}, *how, **named)


def _checked(
    rule, table_SV, states, factors, settings, max_norm=None, seed=-1, first_column=0, norm=None
) -> tuple[Step]:
    """Raises `ValueError` where a kernel would write beside the rows, or would not know how to round."""
    if seed >= 0 and all(whole.dtype != torch.bfloat16 for whole in (table_SV, *states)):
        raise ValueError(
            f"seed must be negative (no stochastic rounding) where no state is bfloat16, nor a {table_SV.dtype} table, "
            f"got {seed}"
        )
    for state, ndim in zip(states, {adam: (2, 2, 1), adagrad: (2,), row_adagrad: (1,), sgd: ()}[rule], strict=True):
        if state.shape != table_SV.shape[:ndim]:
            raise ValueError(f"states must be {[*table_SV.shape[:ndim]]}, as the table, got {[*state.shape]}")
    parts = parts_of(*factors)
    for part in parts:
        if part.grad_TV.shape[-1:] != table_SV.shape[1:]:
            raise ValueError(f"grads must be [T, {table_SV.shape[1]}], got {[*part.grad_TV.shape]}")
    if not parts:
        new = table_SV.new_empty
        parts = [Part(new(0, 1, dtype=torch.int64), new(0, 1, dtype=torch.float32), new(0, table_SV.shape[1]))]
    return (Step(rule, table_SV, states, parts, max_norm, seed, settings, first_column, norm),)


# `adam` with moments [S, V] and counts of reads [S] (int32).
row_adam_ = operation("row_adam_", step_, lambda *_, **__: None, pack=_adam_step)
# `adagrad` where square_sum is [S, V], `row_adagrad` where it is [S].
row_adagrad_ = operation("row_adagrad_", step_, lambda *_, **__: None, pack=_adagrad_step)
# `sgd`, which has no state.
row_sgd_ = operation("row_sgd_", step_, lambda *_, **__: None, pack=_sgd_step)
