"""UsageMeter: which slots a memory uses, and how evenly, from the hits of its search.

Letters: T tokens, H heads, K rows a head reads, S slots.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from memlayers.keys import Hits
from memlayers.layer import MemoryLayer
from memlayers.listening import Listener, input_of
from memlayers.ops.registry import is_transformed
from memlayers.query import is_recomputation


@dataclass(frozen=True)
class UsageFigures:
    """How the slots are used (paper, section 4.1). z is the weight that each slot received, normalised to sum 1."""

    usage: float  # share of slots with z > 0, in %
    kl: float  # ln S + sum of z ln z: divergence from uniform, natural log; 0 is uniform, ln S is one slot only
    top1_usage: float  # share of slots that were ever the best of a head, in %
    gini: float  # 0 is uniform, towards 1 is a few slots only
    slots_50: int  # fewest slots that hold 50 % of the weight
    slots_90: int
    slots_99: int
    # The same from z of counts: how often each slot was among the K, whatever its weight.
    count_usage: float
    count_kl: float
    count_gini: float
    count_slots_50: int
    count_slots_90: int
    count_slots_99: int


@dataclass(frozen=True)
class UsageReport:
    """Figures over all heads and for each head. They depend on the number of tokens: state both together."""

    tokens: int
    slots: int
    overall: UsageFigures
    heads: tuple[UsageFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


# By meter, the mask of the call in progress in this thread, between the hook of the layer and that of its keys.
_in_thread = threading.local()
# Two threads that add to one tensor lose some of it.
_adding = threading.Lock()


def _masks() -> dict[int, Tensor | None]:
    return getattr(_in_thread, "masks", {})


class UsageMeter(Listener):
    """Counts the hits of one layer, exactly; skips padding and recomputations.

        with UsageMeter(layer) as meter:
            model(input_ids, attention_mask=mask)
        meter.report().overall.usage

    It listens through forward hooks and leaves nothing in the layer. Several threads may call the layer meanwhile.
    Under `torch.compile`, attach it before the first call, and let one thread at a time call. It holds 20 bytes for
    each slot and head, and a mask of 1 MB.

    Args:
        layer: the memory to listen to, also one of a model.
    """

    MOST_TOKENS = 2**20  # of a compiled call; the mask of others grows

    def __init__(self, layer: MemoryLayer):
        self.layer, self._slots = layer, layer.config.slots
        # The real tokens of a compiled call in progress, written in place: setting an attribute in a compiled region
        # that is checkpointed would make its recomputation differ.
        self._real_T = torch.ones(self.MOST_TOKENS, dtype=torch.bool, device=layer.keys.weight.device)
        self.reset()

    def reset(self) -> None:
        """Forgets all hits."""
        self._slots = self.layer.config.slots
        shape = (self.layer.config.heads, self._slots)
        device = self.layer.keys.weight.device
        self._weight_HS = torch.zeros(shape, dtype=torch.float64, device=device)
        self._count_HS = torch.zeros(shape, dtype=torch.int64, device=device)
        self._top1_HS = torch.zeros(shape, dtype=torch.int32, device=device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)

    def register_hooks(self) -> Iterator[RemovableHandle]:
        yield self.layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
        yield self.layer.keys.register_forward_hook(self._after_search)

    @torch.no_grad()
    def _before_layer(self, layer: MemoryLayer, args: tuple, kwargs: dict) -> None:
        if layer.config.slots != self._slots:
            raise ValueError(
                f"what counts reads must be made after grow_table, got a meter for {self._slots:,} slots of a memory "
                f"that has {layer.config.slots:,} now: make another"
            )
        if is_transformed():
            raise ValueError(
                "what counts reads must not be attached in a transform of torch.func (grad, vmap, jacrev, ...), which "
                "hides from it what it adds: detach() it, or leave its `with` block, before"
            )
        mask_T = layer.token_mask(*args, **kwargs)
        if not torch.compiler.is_compiling():
            _in_thread.masks = {**_masks(), id(self): mask_T}
            return
        x = input_of(args, kwargs)
        tokens = x.shape[:-1].numel()
        if tokens > len(self._real_T) or self._real_T.device != x.device:
            self._real_T = self._real_T.new_ones(max(tokens, len(self._real_T)), device=x.device)
        if mask_T is None:
            self._real_T[:tokens].fill_(True)
        else:
            self._real_T[:tokens].copy_(mask_T)

    def _after_search(self, keys: torch.nn.Module, args: tuple, hits: Hits) -> None:
        if not torch.compiler.is_compiling():
            mask_T = _masks().pop(id(self), None)  # None also for a search that no call of the layer makes
            if not is_recomputation():
                with _adding:
                    self.add(hits, mask_T)
        else:
            real_T = self._real_T[: hits.slots.shape[:-2].numel()]
            self.add(hits, real_T)
            with torch.no_grad():
                real_T.fill_(True)  # for a search that no call of the layer makes

    @torch.no_grad()
    def add(self, hits: Hits, mask_T: Tensor | None = None) -> None:
        """Counts hits of shape [..., H, K]; skips tokens where mask_T is False."""
        scores_THK, slots_THK = (found.reshape(-1, *found.shape[-2:]) for found in hits)
        if self._tokens.device != slots_THK.device:  # the layer was moved since
            for name, total in self.state_dict().items():
                setattr(self, f"_{name}", total.to(slots_THK.device))
        weights_THK = self.layer.weigh(scores_THK.double())
        # A masked token adds zero: selecting the others would wait for the device.
        real_T = torch.ones(len(slots_THK), dtype=torch.bool, device=slots_THK.device) if mask_T is None else mask_T
        weights_THK = torch.where(real_T[:, None, None], weights_THK, 0)
        real_HT = real_T.expand(slots_THK.shape[1], -1)
        slots_HTK = slots_THK.transpose(0, 1)
        self._weight_HS.scatter_add_(1, slots_HTK.flatten(1), weights_THK.transpose(0, 1).flatten(1))
        self._count_HS.scatter_add_(1, slots_HTK.flatten(1), real_HT[..., None].expand_as(slots_HTK).flatten(1).long())
        self._top1_HS.scatter_add_(1, slots_HTK[..., 0], real_HT.int())
        self._tokens.add_(real_T.sum())

    def state_dict(self) -> dict[str, Tensor]:
        """The totals, for `load_state_dict` of another meter."""
        return {
            "weight_HS": self._weight_HS,
            "count_HS": self._count_HS,
            "top1_HS": self._top1_HS,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the totals. Raises `ValueError` for those of a memory of another shape."""
        for name, held in self.state_dict().items():
            shape = [*state[name].shape] if name in state else None
            if shape != [*held.shape]:
                raise ValueError(f"usage must hold {name} of shape {[*held.shape]}, got {shape}")
            held.copy_(state[name])

    def report(self) -> UsageReport:
        """The figures so far. Raises `ValueError` if no token was counted."""
        return report_of(self.state_dict())


def report_of(totals: Mapping[str, Tensor]) -> UsageReport:
    """The figures of `UsageMeter.state_dict`. Raises `ValueError` if no token was counted."""
    weight_HS, count_HS, top1_HS = (totals[name] for name in ("weight_HS", "count_HS", "top1_HS"))
    tokens = int(totals["tokens"])
    if tokens == 0:
        raise ValueError("usage needs at least one measured token, got 0: call the layer while the meter listens")
    heads, slots = weight_HS.shape
    return UsageReport(
        tokens=tokens,
        slots=slots,
        overall=_figures(weight_HS.sum(0), count_HS.sum(0), top1_HS.sum(0)),
        heads=tuple(_figures(weight_HS[h], count_HS[h], top1_HS[h]) for h in range(heads)),
    )


def _figures(weight_S: Tensor, count_S: Tensor, top1_S: Tensor) -> UsageFigures:
    by_count = {f"count_{name}": value for name, value in _spread(count_S.double()).items()}
    top1_usage = 100.0 * float((top1_S > 0).double().mean())
    return UsageFigures(top1_usage=top1_usage, **_spread(weight_S), **by_count)


def _spread(mass_S: Tensor) -> dict[str, Any]:
    slots = len(mass_S)
    share_S = (mass_S / mass_S.sum()).sort(descending=True).values
    held_S = share_S.cumsum(0)
    # The area between the Lorenz curve and the diagonal, from shares in descending order.
    rank_S = torch.arange(1, slots + 1, dtype=torch.float64, device=mass_S.device)
    gini = (slots + 1 - 2 * float((rank_S * share_S).sum())) / slots
    needed = {
        f"slots_{percent}": min(slots, int((held_S < percent / 100 - 1e-12).sum()) + 1) for percent in (50, 90, 99)
    }
    return {
        "usage": 100.0 * float((mass_S > 0).double().mean()),
        "kl": math.log(slots) + float(torch.special.xlogy(share_S, share_S).sum()),
        "gini": gini,
        **needed,
    }
