"""SlotCounts: how often texts read each slot of the memories of a model.

Letters: T tokens, S slots.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memlayers.files import file_aside
from memlayers.finetuning.names import layers_by_table
from memlayers.keys import Hits
from memlayers.layer import MemoryLayer
from memlayers.listening import EagerListener
from memlayers.usage import UsageMeter

_FORMAT = "memlayers slot counts 1"


class SlotCounts(EagerListener):
    """Counts, over the batches that a model is called with, how often each slot was read, and in how many of them.

        with SlotCounts(model) as counts, torch.no_grad():
            for batch in batches:
                model(**batch)  # one call, one batch
        counts.save("counts.safetensors")

    The heads of a memory read one table, and so do memories that share it: it is counted once. Padding and the
    recomputations of gradient checkpointing are left out. A batch is a call of the model that is given; batches of a
    size like that of the texts to be learned tell most. A model that is compiled runs as it was written while this
    listens; let one thread at a time call it. Each call waits for the device.

    Args:
        model: any module with memories, as it will be called; a memory alone.

    Attributes:
        batches: the batches so far in which a slot was read.
        reads: by table, the reads of each slot [S].
        batches_with: by table, the batches that read each slot [S].

    Raises:
        ValueError: a model without memories.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._layers = layers_by_table(model)
        self.batches = 0
        self.reads, self.batches_with, self._new = (self._zeros(dtype) for dtype in (torch.int64, torch.int32, None))
        self._meters = [_Reads(layer, self._new[name]) for name, layers in self._layers.items() for layer in layers]

    def _zeros(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: torch.zeros(layer.config.slots, dtype=dtype or torch.int64, device=layer.keys.weight.device)
            for name, (layer, *_) in self._layers.items()
        }

    def reset(self) -> None:
        """Forgets all batches."""
        self.batches = 0
        for tensors in (self.reads, self.batches_with, self._new):
            for tensor in tensors.values():
                tensor.zero_()

    def register_hooks(self) -> Iterator[RemovableHandle]:
        yield self._model.register_forward_hook(self._after_model, always_call=True)
        for meter in self._meters:
            yield from meter.register_hooks()

    def _after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        if output is not None and any(bool(new_S.any()) for new_S in self._new.values()):
            self.batches += 1
            for name, new_S in self._new.items():
                self.reads[name] += new_S
                self.batches_with[name] += new_S > 0
        for new_S in self._new.values():  # also those of a call that raised an error
            new_S.zero_()

    def merge(self, other: "SlotCounts") -> Self:
        """Adds the batches of another, as if they had been counted here; returns itself.

        Raises `ValueError` where the other is of other tables.
        """
        self._add(other.batches, other.reads, other.batches_with, "other")
        return self

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes a file in safetensors: 8 bytes a slot, 12 where a slot was read over 2 ** 31 times.

        Its folder is made if it is not there.
        """
        from safetensors.torch import save_file  # optional

        tensors: dict[str, Tensor] = {}
        for name, reads_S in self.reads.items():
            narrow = reads_S.to(torch.int32) if int(reads_S.max()) < 2**31 else reads_S
            tensors |= {f"reads {name}": narrow.cpu(), f"batches {name}": self.batches_with[name].cpu()}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with file_aside(Path(file)) as aside:
            save_file(tensors, aside, {"format": _FORMAT, "batches": str(self.batches)})

    def load(self, file: str | os.PathLike[str]) -> Self:
        """Takes the counts that `save` wrote in place of its own; returns itself.

        Raises `ValueError` for another file, or the counts of other tables.
        """
        from safetensors import SafetensorError, safe_open  # optional

        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"file must be one of SlotCounts.save, {str(file)!r} cannot be read: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"file must be one of SlotCounts.save, got another: {str(file)!r}")
        reads, batches_with = (
            {name.removeprefix(kind): one for name, one in tensors.items() if name.startswith(kind)}
            for kind in ("reads ", "batches ")
        )
        self._require_alike(reads, f"the file {str(file)!r}")
        batches, shapes = metadata.get("batches", ""), {name: one.shape for name, one in reads.items()}
        is_whole = batches.isdecimal() and shapes == {name: one.shape for name, one in batches_with.items()}
        if not is_whole or any(one.is_floating_point() for one in tensors.values()):
            raise ValueError(f"file must be one of SlotCounts.save, {str(file)!r} is damaged")
        self.reset()
        self._add(int(batches), reads, batches_with, f"the file {str(file)!r}")
        return self

    def _add(self, batches: int, reads: Mapping[str, Tensor], batches_with: Mapping[str, Tensor], what: str) -> None:
        self._require_alike(reads, what)
        self.batches += batches
        for mine, others in ((self.reads, reads), (self.batches_with, batches_with)):
            for name, count_S in mine.items():
                count_S += others[name].to(count_S.device)

    def _require_alike(self, reads: Mapping[str, Tensor], what: str) -> None:
        mine, others = ({name: len(one) for name, one in each.items()} for each in (self.reads, reads))
        if mine != others:
            raise ValueError(f"{what} must count the slots of {sizes_text(mine)}, got those of {sizes_text(others)}")


class _Reads(UsageMeter):
    """The reads of one memory, added to a count [S]."""

    def __init__(self, layer: MemoryLayer, count_S: Tensor):
        self._count_S = count_S
        super().__init__(layer)

    def reset(self) -> None:
        self._count_S.zero_()

    @torch.no_grad()
    def add(self, hits: Hits, mask_T: Tensor | None = None) -> None:
        slots_TM = hits.slots.reshape(-1, hits.slots.shape[-2:].numel())
        real_TM = slots_TM.new_ones(slots_TM.shape)
        if mask_T is not None:
            real_TM *= mask_T[:, None]
        self._count_S.scatter_add_(0, slots_TM.flatten(), real_TM.flatten())


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Tables by name, with their slots."""
    return ", ".join(f"{name} ({slots:,})" for name, slots in sizes.items()) or "no table"
