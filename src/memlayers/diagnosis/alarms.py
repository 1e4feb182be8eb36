"""What is watched while a model trains: `Monitor` collects on the device, and is looked at now and then.

Letters: T tokens, D model width, H heads, K neighbours, S slots, W tokens of the window, V value width, R rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memlayers.diagnosis.collapse import complaints, spread
from memlayers.diagnosis.passing import far_off
from memlayers.diagnosis.subjects import Subject
from memlayers.keys import Hits
from memlayers.layer import MemoryLayer
from memlayers.query import is_recomputation

RECENT_TOKENS, RECENT_ROWS = 1024, 2048  # of which the rows are compared before and after a step


class MemoryWarning(UserWarning):
    """Something went wrong with a memory in training. Make it an error to stop there."""


class Monitor:
    """Listens to one memory in training mode. Nothing waits for the device but the methods that give an alarm."""

    pauses_in_doctor = True

    def __init__(self, subject: Subject, *, window: int):
        config, device = subject.layer.config, subject.layer.keys.weight.device
        self.subject = subject
        self._handles: list[RemovableHandle] = []
        self._slots_WHK = torch.full((window, config.heads, config.topk), -1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._reached = torch.zeros((), dtype=torch.int64, device=device)
        self._missed_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._squares = torch.zeros(3, dtype=torch.float64, device=device)  # of outputs, inputs, the network beside
        self._mask_T: Tensor | None = None
        self._before: tuple[Tensor, Tensor] | None = None  # rows before a step: their slots and their contents

    def attach(self) -> None:
        """Start listening."""
        layer = self.subject.layer
        self._handles = [
            layer.register_forward_pre_hook(self._before_layer, with_kwargs=True),
            layer.keys.register_forward_hook(self._after_search),
            layer.register_forward_hook(self._after_layer),
        ]
        if self.subject.is_parallel:
            self._handles += [module.register_forward_hook(self._after_base) for module in self.subject.beside]

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # What is collected.

    def _before_layer(self, layer: MemoryLayer, args: tuple, kwargs: dict) -> None:
        self._mask_T = layer.token_mask(*args, **kwargs)
        if layer.training and not is_recomputation():
            self._reached.fill_(1)
            self._add_squares(1, args[0] if args else kwargs["x"], self._mask_T)

    @torch.no_grad()
    def _after_search(self, keys: nn.Module, args: tuple, hits: Hits) -> None:
        if not self.subject.layer.training or is_recomputation():
            return
        slots_THK = hits.slots.flatten(0, -3).int()
        if self._mask_T is not None:
            slots_THK = torch.where(self._mask_T[:, None, None], slots_THK, -1)
        slots_THK = slots_THK[-len(self._slots_WHK) :]
        place_T = torch.arange(len(slots_THK), device=slots_THK.device) + self._tokens
        self._slots_WHK.index_copy_(0, place_T % len(self._slots_WHK), slots_THK)
        self._tokens += len(slots_THK)

    def _after_layer(self, layer: MemoryLayer, args: tuple, output: Tensor) -> None:
        if layer.training and not is_recomputation():
            self._add_squares(0, output, self._mask_T)
        self._mask_T = None

    def _after_base(self, base: nn.Module, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if self.subject.layer.training and isinstance(first, Tensor) and not is_recomputation():
            self._add_squares(2, first, None)

    @torch.no_grad()
    def _add_squares(self, place: int, x: Tensor, mask_T: Tensor | None) -> None:
        x_TD = x.detach().flatten(0, -2).float()
        if mask_T is not None:
            x_TD = torch.where(mask_T[:, None], x_TD, 0)
        self._squares[place] += x_TD.square().sum()

    def end_step(self) -> None:
        """After each step of the optimizer."""
        self._missed_steps += 1 - self._reached
        self._reached.zero_()

    # What is wrong: (check, message), or None.

    def owner(self) -> tuple[str, str] | None:
        """Costs nothing: nothing is asked of the device."""
        if self.subject.has_lost_owner:
            return "owner", "its table has no owner: it is in row mode, and its row optimizer is gone"
        return None

    def reached(self) -> tuple[str, str] | None:
        """Since the last look."""
        missed = int(self._missed_steps)
        self._missed_steps.zero_()
        if missed:
            return "reached", f"the model did not call it in {missed} step{'s' * (missed > 1)}: it was bypassed"
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
        slots_THK = self._slots_WHK[self._slots_WHK[:, 0, 0] >= 0].long()
        if len(slots_THK) < 2:
            return None
        said, has_collapsed = complaints(spread(slots_THK, self.subject.layer.config.slots))
        if has_collapsed:
            return "usage", f"its query has collapsed over the last {len(slots_THK):,} tokens: {'; '.join(said)}"
        return None

    @torch.no_grad()
    def note_rows(self) -> None:
        """Before a step of the optimizer: some rows that it should write."""
        gate = self.subject.gate
        if gate is not None and not bool(gate.any()):
            return  # nothing behind a closed gate has a gradient yet
        window, last = len(self._slots_WHK), self._tokens - 1
        recent_T = (last - torch.arange(min(RECENT_TOKENS, window), device=last.device)) % window
        slots_R = self._slots_WHK[recent_T].unique().long()
        slots_R = slots_R[slots_R >= 0]
        slots_R = slots_R[:: max(1, len(slots_R) // RECENT_ROWS)].to(self.subject.table.weight.device)
        if len(slots_R):
            self._before = slots_R, self.subject.table.weight.detach()[slots_R]

    def written(self) -> tuple[str, str] | None:
        """After that step."""
        before, self._before = self._before, None
        if before is None:
            return None
        slots_R, rows_RV = before
        if torch.equal(self.subject.table.weight.detach()[slots_R], rows_RV):
            frozen = "" if self.subject.table.weight.requires_grad else ": its table is frozen"
            return "written", f"a step of the optimizer wrote none of {len(slots_R):,} rows that were read{frozen}"
        return None
