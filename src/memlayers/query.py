"""QueryNetwork: from the hidden state to one query a head, and the norms that keep queries spread out.

Letters: T tokens, D model width, H heads, Q query width of a head, F = H * Q features.
"""

import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.config import MemoryConfig
from memlayers.ops import wide_dtype, widened, without_autocast
from memlayers.torch_private import batch_norm_base, current_backward


class QueryNetwork(nn.Module):
    """A linear map or an MLP with ReLU, then a norm: [T, D] -> [T, H, Q] (paper, section 3.1).

    Args:
        config: of the layer; the fields ``dim``, ``heads`` and those that begin with ``query`` count.
        device: of parameters and buffers.
        dtype: of parameters.
    """

    def __init__(
        self, config: MemoryConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.heads = config.heads
        sizes = [config.dim, *config.query_hidden, config.heads * config.query_dim]
        self.projections = nn.ModuleList(
            nn.Linear(size, next_size, bias=config.query_bias, device=device, dtype=dtype)
            for size, next_size in itertools.pairwise(sizes)
        )
        norms: dict[str, type[MaskedBatchNorm | HeadRMSNorm | NoNorm]]
        norms = {"batch": MaskedBatchNorm, "rms": HeadRMSNorm, "none": NoNorm}
        self.norm = norms[config.query_norm](config.heads, config.query_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Linear maps as PyTorch initialises them; norms to the identity."""
        for projection in self.projections:
            cast(nn.Linear, projection).reset_parameters()
        self.norm.reset_parameters()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Raises `ValueError` for a norm of PyTorch's, which `convert_sync_batchnorm` puts in place of the query's."""
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                "query_norm 'batch' cannot become a SyncBatchNorm, which would count padding: call "
                "memlayers.distributed.sync_statistics(model), use query_norm 'rms', or convert the model before "
                "add_memory"
            )
        super().add_module(name, module)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Tensor:
        """mask_T: True for real tokens; None if all are real."""
        hidden = x_TD
        for projection in self.projections[:-1]:
            hidden = F.relu(projection(hidden))
        query_THQ = self.projections[-1](hidden).unflatten(-1, (self.heads, -1))
        return self.norm(query_THQ, mask_T)


class MaskedBatchNorm(batch_norm_base()):  # type: ignore[misc]
    """BatchNorm over the F = H * Q query features, with statistics that leave padding out.

    In training it normalises by the statistics of the call's real tokens and folds them into the running ones, which
    evaluation uses. A recomputation under gradient checkpointing does not fold them in again, and a call whose
    statistics are not finite leaves the running ones as they are. Statistics are computed and kept in at least float32,
    whatever the module is cast to.

    Code that looks for PyTorch's own finds it by its base class: `torch.optim.swa_utils.update_bn` estimates its
    statistics anew (a ``momentum`` of None is a cumulative average), FSDP keeps it in float32. Of the base it has the
    interface alone; ``num_batches_tracked`` is no buffer and in no state_dict.

    Args:
        heads: H.
        query_dim: Q, features per head.
        device: of parameters and buffers.
        dtype: of the gain and the bias.
    """

    _version = 1  # of state_dicts, which hold no `num_batches_tracked`
    running_mean: Tensor
    running_var: Tensor
    momentum: float | None = 0.1
    eps = 1e-5
    affine = True
    track_running_stats = True

    def __init__(
        self,
        heads: int,
        query_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # the base's registers what a state_dict must not hold
        self.weight = nn.Parameter(torch.empty(heads, query_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(heads, query_dim, device=device, dtype=dtype))
        stats = wide_dtype(self.weight.dtype)
        self.register_buffer("running_mean", torch.empty(heads, query_dim, device=device, dtype=stats))
        self.register_buffer("running_var", torch.empty(heads, query_dim, device=device, dtype=stats))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)
        self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="cpu")  # those of a cumulative average

    @property
    def num_features(self) -> int:
        return self.weight.numel()

    def forward(self, query_THQ: Tensor, mask_T: Tensor | None = None) -> Tensor:
        """The normalised query, of its shape and dtype.

        Raises `ValueError` in training for a single token, whose variance says nothing.
        """
        wide_TF = query_THQ.to(torch.promote_types(query_THQ.dtype, wide_dtype(self.weight.dtype))).flatten(1)
        # `torch.func.replace_all_batch_norm_modules_` takes the running statistics away.
        is_training = (self.training or self.running_mean is None) and query_THQ.shape[0] > 0
        if is_training and query_THQ.shape[0] == 1:
            raise ValueError(
                "query_norm 'batch' needs more than one token in training, got 1; use query_norm 'rms' for that"
            )
        if is_training and mask_T is not None:
            wide_TF = self._normalise_masked(wide_TF, mask_T)
        else:
            wide_TF = self._normalise(wide_TF, is_training)
        return wide_TF.view(query_THQ.shape).to(query_THQ.dtype)

    def _normalise(self, wide_TF: Tensor, is_training: bool) -> Tensor:
        # Of a weight with strides torch's operation computes another gradient of its input.
        weight_F, bias_F = (own.contiguous().view(-1).to(wide_TF.dtype) for own in (self.weight, self.bias))
        if self.running_mean is None:
            return F.batch_norm(wide_TF, None, None, weight_F, bias_F, True, 0.0, self.eps)
        # Copies: what autograd saves of them must not change with the next call.
        mean_F, var_F = self.running_mean.flatten().clone(), self.running_var.flatten().clone()
        wide_TF = F.batch_norm(wide_TF, mean_F, var_F, weight_F, bias_F, is_training, self._share(), self.eps)
        if is_training and not is_recomputation():
            self._keep(mean_F, var_F, mean_F.isfinite().all() & var_F.isfinite().all())
        return wide_TF

    def _normalise_masked(self, wide_TF: Tensor, mask_T: Tensor) -> Tensor:
        # Selected, not multiplied: NaN in padding must not come through.
        wide_TF = torch.where(mask_T[:, None], wide_TF, 0)
        count = mask_T.sum().to(wide_TF.dtype)
        share_T = mask_T.to(wide_TF.dtype) / count.clamp(min=1)
        with without_autocast(wide_TF):
            mean_F = share_T @ wide_TF
            var_F = share_T @ (wide_TF - mean_F).square()
        if self.running_mean is not None and not is_recomputation():
            self._fold_in(mean_F.detach(), var_F.detach(), count)
        scale_F = torch.rsqrt(var_F + self.eps) * self.weight.view(-1)
        return torch.addcmul(self.bias.view(-1) - mean_F * scale_F, wide_TF, scale_F)

    def _fold_in(self, mean_F: Tensor, var_F: Tensor, count: Tensor) -> None:
        # The running variance is the unbiased one, as in torch's BatchNorm. One real token or none changes nothing.
        unbiased_F = var_F * (count / (count - 1).clamp(min=1))
        says_something = (count > 1) & mean_F.isfinite().all() & unbiased_F.isfinite().all()
        mean_F, var_F = (
            running_HQ.flatten().lerp(new_F.to(running_HQ.dtype), self._share())
            for running_HQ, new_F in ((self.running_mean, mean_F), (self.running_var, unbiased_F))
        )
        self._keep(mean_F, var_F, says_something)

    def _share(self) -> float:
        """Of the next call in the running statistics."""
        return 1 / (int(self.num_batches_tracked) + 1) if self.momentum is None else self.momentum

    @torch.no_grad()
    def _keep(self, mean_F: Tensor, var_F: Tensor, says_something: Tensor) -> None:
        for running_HQ, new_F in ((self.running_mean, mean_F), (self.running_var, var_F)):
            # Selected on the device: to ask would wait for it.
            running_HQ.copy_(torch.where(says_something, new_F.view_as(running_HQ), running_HQ))
        if self.momentum is None:
            self.num_batches_tracked += int(says_something)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.weight.shape))}, eps={self.eps}, momentum={self.momentum}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        # From version 2 on the base does not ask for `num_batches_tracked`.
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *rest)
        self._widen(self.running_mean, self.running_var)  # assigned as they were saved

    def _apply(self, fn, recurse=True):
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        self._widen(*before)
        return self

    def _widen(self, mean_HQ: Tensor | None, var_HQ: Tensor | None) -> None:
        """Statistics of 16 bits become these in float32: casting a model must not round them."""
        if mean_HQ is None or var_HQ is None or torch.finfo(self.running_mean.dtype).bits >= 32:
            return
        device = self.running_mean.device
        self.running_mean, self.running_var = (stat.to(device, torch.float32) for stat in (mean_HQ, var_HQ))


class HeadRMSNorm(nn.Module):
    """RMSNorm over the Q features of each head, with one gain a feature. It keeps no statistics and needs no mask.

    Arguments are those of `MaskedBatchNorm`.
    """

    eps = 1e-6

    def __init__(
        self,
        heads: int,
        query_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, query_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, query_THQ: Tensor, mask_T: Tensor | None = None) -> Tensor:
        wide_THQ = widened(query_THQ)
        scale = torch.rsqrt(wide_THQ.square().mean(-1, keepdim=True) + self.eps)
        return (wide_THQ * scale * self.weight).to(query_THQ.dtype)


class NoNorm(nn.Module):
    """Returns the query as it is; takes the arguments of the other norms."""

    def __init__(self, heads: int, query_dim: int, **_):
        super().__init__()

    def reset_parameters(self) -> None:
        pass

    def forward(self, query_THQ: Tensor, mask_T: Tensor | None = None) -> Tensor:
        return query_THQ


def is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass: gradient checkpointing repeats what was counted already.

    Returns False under `torch.compile`, which cannot trace the question; its graphs do not repeat mutations.
    """
    return not torch.compiler.is_compiling() and current_backward() != -1
