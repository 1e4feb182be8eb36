"""What is watched while a model trains: `Monitor` collects on the device, and is looked at now and then.

Letters: T tokens, D model width, H heads, K rows a head reads, S slots, W tokens of the window, V value width, R rows,
P coordinates of a fingerprint.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memlayers.diagnosis.collapse import LEAST_TOKENS, first_of_alike, judge
from memlayers.diagnosis.groups import Training, is_at_zero, is_constant
from memlayers.diagnosis.output import far_off
from memlayers.diagnosis.subjects import Subject, chosen_rows, has_lost_owner
from memlayers.distributed.agreement import check_replicas, own_part
from memlayers.keys import Hits
from memlayers.layer import MemoryLayer
from memlayers.listening import Listener, input_of
from memlayers.ops import without_autocast
from memlayers.query import is_recomputation

RECENT_TOKENS, RECENT_ROWS = 1024, 2048  # of which the rows are compared before and after a step
FINGERPRINT = 32  # coordinates of a random projection of an input, to know tokens that come again


class MemoryWarning(UserWarning):
    """Something went wrong with a memory in training. Make it an error to stop there."""


class Monitor(Listener):
    """Listens to one memory in training mode. Nothing waits for the device but the methods that give an alarm.

    What hooks find out goes into tensors, in place: an attribute that is set in a compiled region that is checkpointed
    makes its recomputation another one.
    """

    def __init__(self, subject: Subject, *, window: int):
        config, device = subject.layer.config, subject.layer.keys.weight.device
        self.subject = subject
        self._slots_WHK = torch.full((window, config.heads, config.topk), -1, dtype=torch.int32, device=device)
        self._prints_WP = torch.zeros(window, FINGERPRINT, device=device)
        generator = torch.Generator().manual_seed(0)
        self._directions_DP = torch.randn(config.dim, FINGERPRINT, generator=generator).to(device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._reached = torch.zeros((), dtype=torch.int64, device=device)
        self._missed_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._squares = torch.zeros(3, dtype=torch.float64, device=device)  # of outputs, inputs, the network beside
        self._closed_looks = 0  # one after the other that found the gate at zero
        self._before: tuple[Tensor, Tensor] | None = None  # rows before a step: their slots and their contents

    def register_hooks(self) -> Iterator[RemovableHandle]:
        layer = self.subject.layer
        yield layer.keys.register_forward_hook(self._after_search)
        yield layer.register_forward_hook(self._after_layer, with_kwargs=True)
        for module in self.subject.beside if self.subject.is_parallel else ():
            yield module.register_forward_hook(self._after_beside)

    # What is collected.

    @torch.no_grad()
    def _after_search(self, keys: nn.Module, args: tuple, hits: Hits) -> None:
        if self.subject.layer.training and not is_recomputation():
            slots_THK = hits.slots.flatten(0, -3)[-len(self._slots_WHK) :]
            self._slots_WHK.index_copy_(0, self._places(len(slots_THK)), slots_THK.int())

    @torch.no_grad()
    def _after_layer(self, layer: MemoryLayer, args: tuple, kwargs: dict, output: Tensor) -> None:
        if not layer.training or is_recomputation():
            return
        x, mask_T = input_of(args, kwargs), layer.token_mask(*args, **kwargs)
        self._reached.fill_(1)
        self._add_squares(0, output, mask_T)
        self._add_squares(1, x, mask_T)
        x_TD = x.detach().flatten(0, -2)[-len(self._slots_WHK) :].float()
        place_T = self._places(len(x_TD))
        with without_autocast(x_TD):
            self._prints_WP.index_copy_(0, place_T, x_TD @ self._directions_DP)
        if mask_T is not None:
            slots_THK = torch.where(mask_T[-len(x_TD) :, None, None], self._slots_WHK[place_T], -1)
            self._slots_WHK.index_copy_(0, place_T, slots_THK)
        self._tokens.add_(len(x_TD))

    def _places(self, tokens: int) -> Tensor:
        """Where in the window the tokens of this call belong."""
        return (torch.arange(tokens, device=self._tokens.device) + self._tokens) % len(self._slots_WHK)

    def _after_beside(self, module: nn.Module, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if self.subject.layer.training and isinstance(first, Tensor) and not is_recomputation():
            self._add_squares(2, first, None)

    @torch.no_grad()
    def _add_squares(self, place: int, x: Tensor, mask_T: Tensor | None) -> None:
        x_TD = x.detach().flatten(0, -2).float()
        if mask_T is not None:
            x_TD = torch.where(mask_T[:, None], x_TD, 0)
        self._squares[place].add_(x_TD.square().sum())

    def end_step(self) -> None:
        """After each step of the optimizer."""
        self._missed_steps += 1 - self._reached
        self._reached.zero_()

    # What is wrong: (check, message), or None.

    def owner(self) -> tuple[str, str] | None:
        """Costs nothing: nothing is asked of the device."""
        if has_lost_owner(self.subject.table):
            return "owner", "its table has no owner: it is in row mode, and its row optimizer is gone"
        return None

    def replicas(self, optimizer: Any = None) -> tuple[str, str] | None:
        """Whether all processes hold the same; all look together, and find the same."""
        if names := check_replicas(self.subject.layer, optimizer):
            return "replicas", f"the processes have drifted apart, and differ in {', '.join(names)}"
        return None

    def reached(self) -> tuple[str, str] | None:
        """Since the last look."""
        missed = int(self._missed_steps)
        self._missed_steps.zero_()
        if missed:
            return "reached", f"the model did not call it in {missed} step{'s' * (missed > 1)}: it was bypassed"
        return None

    def gate(self) -> tuple[str, str] | None:
        """Whether it is closed at two looks: the first step that is made opens it."""
        gate = self.subject.gate
        self._closed_looks = self._closed_looks + 1 if gate is not None and not bool(gate.any()) else 0
        if self._closed_looks == 2:
            return "gate", "its gate is still zero: it is frozen, or no optimizer has it, and so nothing is trained"
        return None

    def output(self) -> tuple[str, str] | None:
        """Since the last look."""
        own, *beside = self._squares.tolist()
        self._squares.zero_()
        if own - own != 0:
            return "output", "its output is not finite"
        names = ("its input", "the network beside it")
        ratios = {name: (own / other) ** 0.5 for name, other in zip(names, beside, strict=True) if other > 0}
        if far_off(list(ratios.values())):
            said = " and ".join(f"{ratio:.3g} times that of {name}" for name, ratio in ratios.items())
            return "output", f"the norm of its output is far off: {said}"
        return None

    def usage(self) -> tuple[str, str] | None:
        """Over the last tokens, once there are as many as the window holds."""
        if int(self._tokens) < len(self._slots_WHK):
            return None
        config, is_real_W = self.subject.layer.config, self._slots_WHK[:, 0, 0] >= 0
        slots_THK, prints_TP = self._slots_WHK[is_real_W].long(), self._prints_WP[is_real_W]
        slots_THK = slots_THK[first_of_alike(prints_TP)]
        if len(slots_THK) < LEAST_TOKENS:
            return None
        said, has_collapsed = judge(slots_THK, config.slots, config.num_subkeys if config.keys == "product" else None)
        if has_collapsed:
            return "usage", (
                f"its query has collapsed over the last {int(is_real_W.sum()):,} tokens, {len(slots_THK):,} of them "
                f"distinct: {'; '.join(said)}"
            )
        return None

    @torch.no_grad()
    def note_rows(self, optimizer: Any = None) -> None:
        """Before a step of the optimizer: some rows that it should write, unless its schedule is at zero."""
        gate, weight = self.subject.gate, self.subject.table.weight
        groups = [] if optimizer is None else Training([optimizer]).groups(weight)
        if any(is_at_zero(group) and not is_constant(group) for group in groups):
            return
        if gate is not None and not bool(gate.any()):
            return  # nothing behind a closed gate has a gradient yet
        window, last = len(self._slots_WHK), self._tokens - 1
        recent_T = (last - torch.arange(min(RECENT_TOKENS, window), device=last.device)) % window
        slots_R = self._slots_WHK[recent_T].unique().long()
        slots_R = slots_R[slots_R >= 0]
        slots_R = slots_R[:: max(1, len(slots_R) // RECENT_ROWS)].to(weight.device)
        if len(slots_R):
            self._before = slots_R, own_part(weight.detach())[slots_R]

    def written(self, optimizer: Any = None) -> tuple[str, str] | None:
        """After that step, unless it was skipped (a scaler does so where float16 has overflowed)."""
        before, self._before = self._before, None
        if before is None or getattr(optimizer, "step_was_skipped", False):
            return None
        (slots_R, rows_RV), weight = before, self.subject.table.weight
        if (chosen := chosen_rows(self.subject.table)) is not None:  # by now, whoever chose them for this step
            is_chosen_R = torch.isin(slots_R, chosen)
            if not is_chosen_R.any():
                return None
            slots_R, rows_RV = slots_R[is_chosen_R], rows_RV[is_chosen_R]
        if torch.equal(own_part(weight.detach())[slots_R], rows_RV):
            frozen = "" if weight.requires_grad else ": its table is frozen"
            return "written", f"a step of the optimizer wrote none of {len(slots_R):,} rows that were read{frozen}"
        return None
