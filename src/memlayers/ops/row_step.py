"""row step: a rule (Adam, Adagrad, SGD) on the rows that were read, in place, from a table's factored gradient.

Every other row, and its state, stays bit-identical. The operations take the gradient as three lists, a part's factors
each (`memlayers.ops.row_sum.Part`), multiply its sum by `scale` where given (clipping), and round what is bfloat16, be
it the rows or a state, to the nearest (`seed` < 0) or stochastically (`seed` >= 0, another for each step and table). A
rule is a pure function of the summed gradient of some rows and of their states, and gives what to subtract from the
rows and their new states, in float32 (float64 for float64).

The reference here runs anywhere and never waits for a device; the kernels (`memlayers.ops.cpu.rows`, which takes no
bfloat16 states, and `memlayers.ops.gpu.rows`) neither store summed rows nor pass over a row twice.

Letters: T tokens, K rows a token, S slots, V width, C rows of one piece.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memlayers.ops import cpu, gpu
from memlayers.ops.precision import wide_dtype
from memlayers.ops.rounding import round_to_bfloat16
from memlayers.ops.row_sum import Part, kernel_part, sum_parts


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


@torch.library.custom_op("memlayers::row_adam_", mutates_args=("table_SV", "exp_avg_SV", "exp_avg_sq_SV", "steps_S"))
def row_adam_(
    table_SV: Tensor,
    exp_avg_SV: Tensor,
    exp_avg_sq_SV: Tensor,
    steps_S: Tensor,
    slots: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    scale: Tensor | None = None,
    seed: int = -1,
) -> None:
    """`adam` with moments [S, V] and counts of reads [S] (int32)."""
    states = exp_avg_SV, exp_avg_sq_SV, steps_S
    step_(adam, table_SV, states, (slots, weights, grads), scale, seed, lr=lr, beta1=beta1, beta2=beta2, eps=eps)


@row_adam_.register_kernel("cpu")
def _(table_SV, exp_avg_SV, exp_avg_sq_SV, steps_S, slots, weights, grads, lr, beta1, beta2, eps, scale=None, seed=-1):
    states = exp_avg_SV, exp_avg_sq_SV, steps_S
    _step_on_cpu_(
        adam, table_SV, states, (slots, weights, grads), scale, seed, lr=lr, beta1=beta1, beta2=beta2, eps=eps
    )


@row_adam_.register_kernel("cuda")
def row_adam_on_gpu_(
    table_SV, exp_avg_SV, exp_avg_sq_SV, steps_S, slots, weights, grads, lr, beta1, beta2, eps, scale=None, seed=-1
):
    """By the kernel where it knows the dtypes."""
    states = exp_avg_SV, exp_avg_sq_SV, steps_S
    _step_on_gpu_(
        adam, table_SV, states, (slots, weights, grads), scale, seed, lr=lr, beta1=beta1, beta2=beta2, eps=eps
    )


@torch.library.custom_op("memlayers::row_adagrad_", mutates_args=("table_SV", "square_sum"))
def row_adagrad_(
    table_SV: Tensor,
    square_sum: Tensor,
    slots: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float,
    eps: float,
    scale: Tensor | None = None,
    seed: int = -1,
) -> None:
    """`adagrad` where square_sum is [S, V], `row_adagrad` where it is [S]."""
    rule = row_adagrad if square_sum.ndim == 1 else adagrad
    step_(rule, table_SV, (square_sum,), (slots, weights, grads), scale, seed, lr=lr, eps=eps)


@row_adagrad_.register_kernel("cpu")
def _(table_SV, square_sum, slots, weights, grads, lr, eps, scale=None, seed=-1):
    rule = row_adagrad if square_sum.ndim == 1 else adagrad
    _step_on_cpu_(rule, table_SV, (square_sum,), (slots, weights, grads), scale, seed, lr=lr, eps=eps)


@row_adagrad_.register_kernel("cuda")
def row_adagrad_on_gpu_(table_SV, square_sum, slots, weights, grads, lr, eps, scale=None, seed=-1):
    """By the kernel where it knows the dtypes."""
    rule = row_adagrad if square_sum.ndim == 1 else adagrad
    _step_on_gpu_(rule, table_SV, (square_sum,), (slots, weights, grads), scale, seed, lr=lr, eps=eps)


@torch.library.custom_op("memlayers::row_sgd_", mutates_args=("table_SV",))
def row_sgd_(
    table_SV: Tensor,
    slots: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float,
    scale: Tensor | None = None,
    seed: int = -1,
) -> None:
    """`sgd`, which has no state."""
    step_(sgd, table_SV, (), (slots, weights, grads), scale, seed, lr=lr)


@row_sgd_.register_kernel("cpu")
def _(table_SV, slots, weights, grads, lr, scale=None, seed=-1):
    _step_on_cpu_(sgd, table_SV, (), (slots, weights, grads), scale, seed, lr=lr)


@row_sgd_.register_kernel("cuda")
def row_sgd_on_gpu_(table_SV, slots, weights, grads, lr, scale=None, seed=-1):
    """By the kernel where it knows the dtypes."""
    _step_on_gpu_(sgd, table_SV, (), (slots, weights, grads), scale, seed, lr=lr)


for _operation in (row_adam_, row_adagrad_, row_sgd_):
    _operation.register_fake(lambda *_, **__: None)


def step_(
    rule: Callable[..., tuple[Tensor, ...]],
    table_SV: Tensor,
    states: Sequence[Tensor],
    factors: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    scale: Tensor | None,
    seed: int,
    **settings: float,
) -> None:
    """The reference: sum, then apply the rule piece by piece."""
    parts = _checked_parts(rule, table_SV, states, factors, seed)
    if not parts:
        return
    dtype = wide_dtype(table_SV.dtype)
    rows = sum_parts(parts, len(table_SV))
    if table_SV.device.type == "cpu":  # where a shape that depends on the data costs nothing
        rows = rows.compact()
    for index, live_C, grad_CV in rows.chunks():
        grad_CV = grad_CV.to(dtype)
        if scale is not None:
            grad_CV = grad_CV * scale.to(dtype)
        wide = [state[index].to(dtype) if state.is_floating_point() else state[index] for state in states]
        step_CV, *new_states = rule(grad_CV, *wide, **settings)
        wholes, news = (table_SV, *states), (table_SV[index].to(dtype) - step_CV, *new_states)
        for stream, (whole, new) in enumerate(zip(wholes, news, strict=True)):
            new = _rounded(new, whole.dtype, index, seed, stream)
            if live_C is not None:
                new = torch.where(live_C.view(-1, *[1] * (new.ndim - 1)), new, whole[index])
            whole[index] = new


def _rounded(new: Tensor, dtype: torch.dtype, index: Tensor | slice, seed: int, stream: int) -> Tensor:
    if seed < 0 or dtype != torch.bfloat16:
        return new.to(dtype)
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=new.device)
    return round_to_bfloat16(new.reshape(len(new), -1), index, seed, stream).view(new.shape)


def _step_on_cpu_(rule, table_SV, states, factors, scale, seed, **settings) -> None:
    kernels = cpu.kernels("rows")
    are_narrow = table_SV.dtype in (torch.float32, torch.bfloat16) and all(
        state.dtype == (torch.int32 if rule is adam and state.ndim == 1 else torch.float32) for state in states
    )
    if kernels is None or not (are_narrow and all(whole.is_contiguous() for whole in (table_SV, *states))):
        step_(rule, table_SV, states, factors, scale, seed, **settings)
        return
    parts = _checked_parts(rule, table_SV, states, factors, seed)
    if not parts:
        return
    rules = {adam: kernels.ADAM, adagrad: kernels.ADAGRAD, row_adagrad: kernels.ROW_ADAGRAD, sgd: kernels.SGD}
    entries = kernels.SortedEntries([kernel_part(part) for part in parts], len(table_SV))
    first, second, steps = (*states, None, None, None)[:3]
    scale = 1.0 if scale is None else float(scale)
    kernels.step_(rules[rule], entries, table_SV, first, second, steps, scale=scale, seed=seed, **settings)


def _step_on_gpu_(rule, table_SV, states, factors, scale, seed, **settings) -> None:
    kernels = gpu.kernels("rows")
    if kernels is None or not kernels.takes(table_SV, states, factors[2]):
        step_(rule, table_SV, states, factors, scale, seed, **settings)
        return
    parts = _checked_parts(rule, table_SV, states, factors, seed)
    if not parts:
        return
    rules = {adam: kernels.ADAM, adagrad: kernels.ADAGRAD, row_adagrad: kernels.ROW_ADAGRAD, sgd: kernels.SGD}
    entries = kernels.SortedEntries(parts, len(table_SV))
    first, second, steps = (*states, None, None, None)[:3]
    kernels.step_(rules[rule], entries, table_SV, first, second, steps, scale=scale, seed=seed, **settings)


def _checked_parts(rule, table_SV: Tensor, states: Sequence[Tensor], factors, seed: int) -> list[Part]:
    """Raises `ValueError` where the kernel would write beside the rows, or would not know how to round."""
    if seed >= 0 and all(whole.dtype != torch.bfloat16 for whole in (table_SV, *states)):
        raise ValueError(
            f"seed must be negative (no stochastic rounding) where no state is bfloat16, nor a {table_SV.dtype} table, "
            f"got {seed}"
        )
    for state, ndim in zip(states, {adam: (2, 2, 1), adagrad: (2,), row_adagrad: (1,), sgd: ()}[rule], strict=True):
        if state.shape != table_SV.shape[:ndim]:
            raise ValueError(f"states must be {[*table_SV.shape[:ndim]]}, as the table, got {[*state.shape]}")
    parts = [Part(*part) for part in zip(*factors, strict=True)]
    for part in parts:
        if part.grad_TV.shape[-1:] != table_SV.shape[1:]:
            raise ValueError(f"grads must be [T, {table_SV.shape[1]}], got {[*part.grad_TV.shape]}")
    return parts
