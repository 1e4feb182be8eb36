"""statistics: those of the query's BatchNorm over the real tokens of all ranks.

By default each rank normalises by its own tokens and keeps running statistics of them, as under
`DistributedDataParallel`. `sync_statistics` has all ranks use the same ones; `merge_statistics` merges running ones
that went their own ways, before an evaluation or a checkpoint.

Each rank sends the count n of its tokens, their mean and the sum M2 of their squared deviations, and merges those of
all in the order of ranks (Chan et al. 1979), so that all have the same bits:

    n = n1 + n2    d = mean2 - mean1    mean = mean1 + d n2 / n    M2 = M2_1 + M2_2 + d^2 n1 n2 / n

Letters: T tokens, F features.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memlayers.distributed.agreement import Ranks
from memlayers.ops.precision import wide_dtype
from memlayers.query import MaskedBatchNorm, is_recomputation
from memlayers.values import modules_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sync_statistics(model: nn.Module, group: "ProcessGroup | None" = None) -> nn.Module:
    """Has the query's BatchNorms normalise by the statistics of all ranks' real tokens; returns the model.

    From then on every rank of the group must take part in each forward and backward pass of training, if with no token.
    Evaluation uses the running statistics, which are the same on all ranks. In one process nothing changes. Parameters
    stay the same objects: call it before or after the optimizer and `DistributedDataParallel` are built.

    Args:
        model: with memories whose ``query_norm`` is "batch".
        group: the processes; None is all of them.

    Raises:
        ValueError: the model has no such memory.
    """
    norms = modules_of(model, MaskedBatchNorm)
    if not norms:
        raise ValueError("model must have a memory with query_norm 'batch' (others keep no statistics), got none")
    for norm in norms.values():
        norm.__class__ = SyncedBatchNorm
        norm.held_group = _Group(group)
    return model


@torch.no_grad()
def merge_statistics(model: nn.Module, group: "ProcessGroup | None" = None) -> None:
    """Makes the running statistics of the query's BatchNorms the same on all ranks: those of the mixture.

    The mean is the mean of means, the variance the mean of variances and the variance of means. In one process nothing
    changes.

    Args:
        model: on all ranks, which call this together.
        group: the processes; None is all of them.
    """
    if (ranks := Ranks.of(group)) is None:
        return
    for norm in modules_of(model, MaskedBatchNorm).values():
        means, variances = (torch.stack(ranks.gather(one)) for one in (norm.running_mean, norm.running_var))
        norm.running_mean.copy_(means.mean(0))
        norm.running_var.copy_(variances.mean(0) + (means - means.mean(0)).square().mean(0))


class _Group:
    """A process group on a module, which can be copied, and pickled as that of all processes."""

    def __init__(self, group: "ProcessGroup | None"):
        self.group = group

    def __deepcopy__(self, memo: Any) -> "_Group":
        return self

    def __reduce__(self) -> Any:
        return _Group, (None,)


class SyncedBatchNorm(MaskedBatchNorm):
    """`MaskedBatchNorm` with the statistics of all ranks in training; `sync_statistics` makes it of one."""

    held_group: _Group

    def forward(self, query_THQ: Tensor, mask_T: Tensor | None = None) -> Tensor:
        ranks = Ranks.of(self.held_group.group)
        if ranks is None or not self.training:
            return super().forward(query_THQ, mask_T)
        wide_TF = query_THQ.to(torch.promote_types(query_THQ.dtype, wide_dtype(self.weight.dtype))).flatten(1)
        if mask_T is not None:
            # Selected, not multiplied: NaN in padding must not come through.
            wide_TF = torch.where(mask_T[:, None], wide_TF, 0)
        mean_F, var_F, count = _Statistics.apply(wide_TF, mask_T, ranks)
        if not is_recomputation():
            self._fold_in(mean_F.detach(), var_F.detach(), count)
        scale_F = torch.rsqrt(var_F + self.eps) * self.weight.view(-1)
        wide_TF = torch.addcmul(self.bias.view(-1) - mean_F * scale_F, wide_TF, scale_F)
        return wide_TF.view(query_THQ.shape).to(query_THQ.dtype)


class _Statistics(torch.autograd.Function):
    """Mean, variance and count over the real tokens of all ranks; its gradient sums those of all ranks."""

    @staticmethod
    def forward(ctx: Any, wide_TF: Tensor, mask_T: Tensor | None, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        real_T1 = wide_TF.new_ones(len(wide_TF), 1) if mask_T is None else mask_T[:, None].to(wide_TF.dtype)
        count = real_T1.sum()
        mean_F = (real_T1 * wide_TF).sum(0) / count.clamp(min=1)
        m2_F = (real_T1 * (wide_TF - mean_F).square()).sum(0)
        count, mean_F, m2_F = _merged(ranks.gather(torch.cat([count[None], mean_F, m2_F])))
        ctx.save_for_backward(wide_TF, real_T1, mean_F, count)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(count)
        return mean_F, m2_F / count.clamp(min=1), count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        wide_TF, real_T1, mean_F, count = ctx.saved_tensors
        of_mean_F, of_var_F = torch.stack(ctx.ranks.gather(torch.stack(grads[:2]))).sum(0)
        # dmean/dx = 1/n, dvar/dx = 2 (x - mean)/n.
        return real_T1 * (of_mean_F + 2 * (wide_TF - mean_F) * of_var_F) / count.clamp(min=1), None, None


def _merged(by_rank: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    features = (len(by_rank[0]) - 1) // 2
    (count,), mean_F, m2_F = by_rank[0].split([1, features, features])
    for other in by_rank[1:]:
        (its_count,), its_mean_F, its_m2_F = other.split([1, features, features])
        whole = (count + its_count).clamp(min=1)
        apart_F = its_mean_F - mean_F
        mean_F = mean_F + apart_F * (its_count / whole)
        m2_F = m2_F + its_m2_F + apart_F.square() * (count * its_count / whole)
        count = count + its_count
    return count, mean_F, m2_F
