"""SlotTrace: which tokens read which slots of a model's memories, and with which weights.

Letters: T tokens of a call, H heads, K rows a head reads, S slots, N tokens of the sample, R reads that are kept of a
slot, E reads.
"""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memlayers.checks import require_int
from memlayers.diagnosis.subjects import Subject, find_subjects
from memlayers.explorer.columns import Columns
from memlayers.keys import Hits
from memlayers.layer import MemoryLayer
from memlayers.listening import EagerListener, input_of
from memlayers.query import is_recomputation
from memlayers.usage import UsageMeter

NO_TOKEN = -1  # where the model was not called with ids


class SlotTrace(EagerListener):
    """Listens to all memories of a model, and keeps of what they read as much as was asked for, however long it runs.

        with SlotTrace(model) as trace, torch.no_grad():
            for batch in batches:
                model(**batch)
        trace.top_tokens().to_pandas()     # of each slot, the tokens that read it most
        trace.strongest(slot=17)           # the strongest reads of one slot, over all tokens
        trace.reads().to_parquet("reads.parquet")

    Of all tokens it keeps the usage of each memory (`usage`), and of each slot the ``strongest`` reads. Of ``tokens``
    of them, which are drawn evenly and are the same ones in all memories, it keeps every read. A memory takes, and no
    more (`nbytes`), ``12 * H * K + 16`` bytes a token of the sample and ``22 * strongest + 20 * H`` bytes a slot.

    A token's ``position`` is its place among all that went through since the trace was made: row by row, call by call,
    padding counted but left out. Its ``token`` is its id where the model is called with ``input_ids``, or ids as its
    first argument, and -1 elsewhere. The weight is that of the slot among the K of its head.

    Recomputations under gradient checkpointing are left out. A model that is compiled runs as it was written while the
    trace listens. Each call waits for the device.

    Args:
        model: any module with memories, as it will be called; a memory alone.
        tokens: N, of which every read is kept.
        strongest: R, reads that are kept of each slot.

    Raises:
        ValueError: a model without memories, or a number below 1.
    """

    def __init__(self, model: nn.Module, *, tokens: int = 10_000, strongest: int = 4):
        require_int("tokens", tokens, least=1)
        require_int("strongest", strongest, least=1)
        self._model = model
        self._subjects = find_subjects(model)
        self.size, self.strongest_of_each = tokens, strongest
        self._in_thread = threading.local()  # the call in progress
        self._adding = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next token has position 0."""
        self.usage = {subject.name: UsageMeter(subject.layer) for subject in self._subjects}
        self._of = {
            subject.name: _Reads(subject.layer, self.size, self.strongest_of_each) for subject in self._subjects
        }
        self._passed = 0
        if self._handles:  # those of the meters that were there before
            self.detach()
            self.attach()

    def register_hooks(self) -> Iterator[RemovableHandle]:
        yield self._model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        yield self._model.register_forward_hook(self._after_model, always_call=True)
        for subject in self._subjects:
            yield subject.layer.register_forward_pre_hook(partial(self._before_layer, subject), with_kwargs=True)
            yield subject.layer.keys.register_forward_hook(partial(self._after_search, subject.name))
            yield from self.usage[subject.name].register_hooks()

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", next(iter(args), None))
        is_known = isinstance(ids, Tensor) and not ids.is_floating_point() and "decoder_input_ids" not in kwargs
        self._in_thread.ids, self._in_thread.first = (ids if is_known else None), None

    def _after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        vars(self._in_thread).clear()

    def _before_layer(self, subject: Subject, layer: MemoryLayer, args: tuple, kwargs: dict) -> None:
        call, x = self._in_thread, input_of(args, kwargs)
        tokens = x.shape[:-1].numel()
        first = getattr(call, "first", None)
        if first is None:
            with self._adding:
                first, self._passed = self._passed, self._passed + tokens
        if hasattr(call, "ids"):  # in a call of the model, whose memories see the same tokens
            call.first = first
        ids = getattr(call, "ids", None)
        if ids is not None and getattr(subject.wrapper, "tokens_first", False):
            ids = ids.T
        ids_T = ids.reshape(-1) if ids is not None and ids.numel() == tokens else torch.full((tokens,), NO_TOKEN)
        call.layer = first, ids_T, layer.token_mask(*args, **kwargs)

    @torch.no_grad()
    def _after_search(self, name: str, keys: nn.Module, args: tuple, hits: Hits) -> None:
        first, ids_T, mask_T = self._in_thread.__dict__.pop("layer", (0, None, None))
        if ids_T is None or is_recomputation():  # None: no call of the layer makes this search
            return
        scores_THK, slots_THK = (found.reshape(-1, *found.shape[-2:]) for found in hits)
        reads = self._of[name]
        weights_THK = reads.layer.weigh(scores_THK).float()
        real_T = np.arange(len(slots_THK)) if mask_T is None else mask_T.cpu().numpy().nonzero()[0]
        tokens_T, slots, weights = (found.cpu().numpy() for found in (ids_T, slots_THK, weights_THK))
        with self._adding:
            reads.add(first + real_T, tokens_T[real_T], slots[real_T], weights[real_T])

    @property
    def tokens(self) -> int:
        """Real tokens so far, of the memory that saw most."""
        return max(map(self.tokens_of, self._of))

    def tokens_of(self, name: str) -> int:
        """Real tokens so far, of one memory."""
        return self._of[name].tokens

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        meters = (one for meter in self.usage.values() for one in meter.state_dict().values())
        return sum(reads.nbytes for reads in self._of.values()) + sum(one.nbytes for one in meters)

    def reads(self) -> Columns:
        """Every read of the sampled tokens: memory, position, token, head, rank among its K, slot, weight."""
        return Columns.stacked({name: reads.all() for name, reads in self._of.items()})

    def strongest(self, slot: int | None = None) -> Columns:
        """The strongest reads of each slot, or of one, of all tokens: memory, slot, head, position, token, weight."""
        if slot is not None:
            require_int("slot", slot, least=0, most=max(reads.slots for reads in self._of.values()) - 1)
        return Columns.stacked({name: reads.strongest(slot) for name, reads in self._of.items()})

    def top_tokens(self, most: int = 8, *, by_head: bool = False) -> Columns:
        """Of each slot, the tokens of the sample whose reads of it weigh most: memory, slot, token, reads, weight.

        With `by_head`, of each head and slot: with a column head.
        """
        return self._top(["slot"], "token", most, by_head)

    def top_slots(self, most: int = 8, *, by_head: bool = False) -> Columns:
        """Of each token of the sample, the slots that it reads with most weight: memory, token, slot, reads, weight.

        With `by_head`, for each head: with a column head.
        """
        return self._top(["token"], "slot", most, by_head)

    def _top(self, of: list[str], what: str, most: int, by_head: bool) -> Columns:
        require_int("most", most, least=1)
        of = ["head", *of] if by_head else of
        return Columns.stacked({name: reads.all().top(of, what, most) for name, reads in self._of.items()})


class _Reads:
    """What is kept of one memory."""

    def __init__(self, layer: MemoryLayer, size: int, strongest: int):
        config = layer.config
        self.layer, self.size, self.tokens = layer, size, 0
        shape = (0, config.heads, config.topk)
        # Of the sample: positions [N], tokens [N], slots [N, H, K], weights [N, H, K].
        self._sample = [np.empty(0, np.int64) for _ in range(2)] + [np.empty(shape, np.int64), np.empty(shape, "f4")]
        # Of the strongest reads [S, R]: weights, below 0 where there is none yet; positions, tokens, heads.
        kinds = (np.float32, np.int64, np.int64, np.int16)
        self._strongest = [np.full((config.slots, strongest), -1, kind) for kind in kinds]

    @property
    def slots(self) -> int:
        return len(self._strongest[0])

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (*self._sample, *self._strongest))

    def add(
        self, positions_T: np.ndarray, tokens_T: np.ndarray, slots_THK: np.ndarray, weights_THK: np.ndarray
    ) -> None:
        self.tokens += len(positions_T)
        if not len(positions_T):
            return
        self._keep_strongest(positions_T, tokens_T, slots_THK, weights_THK)
        is_full = len(self._sample[0]) == self.size
        drawn = _lot(positions_T) <= _lot(self._sample[0]).max() if is_full else slice(None)
        new = [one[drawn] for one in (positions_T, tokens_T, slots_THK, weights_THK)]
        self._sample = [np.concatenate([held, more]) for held, more in zip(self._sample, new, strict=True)]
        if len(self._sample[0]) > self.size:
            kept = np.argsort(_lot(self._sample[0]), kind="stable")[: self.size]
            self._sample = [one[kept] for one in self._sample]

    def _keep_strongest(self, positions_T, tokens_T, slots_THK, weights_THK) -> None:
        strongest = self._strongest[0].shape[1]
        stronger_THK = weights_THK > self._strongest[0][slots_THK, -1]  # than the last that is kept of the slot
        places_E, heads_E, _ = stronger_THK.nonzero()
        touched, group_E = np.unique(slots_THK[stronger_THK], return_inverse=True)
        # Those that were kept, then the new ones: sorted by slot, then by weight; of equal ones the earlier first.
        group = np.concatenate([np.repeat(np.arange(len(touched)), strongest), group_E])
        new = (weights_THK[stronger_THK], positions_T[places_E], tokens_T[places_E], heads_E)
        pairs = zip(self._strongest, new, strict=True)
        columns = [np.concatenate([held[touched].ravel(), more]) for held, more in pairs]
        order = np.lexsort((columns[3], columns[1], -columns[0], group))
        rank = np.arange(len(order)) - np.searchsorted(group[order], np.arange(len(touched)))[group[order]]
        order, rank = order[rank < strongest], rank[rank < strongest]
        for held, column in zip(self._strongest, columns, strict=True):
            held[touched[group[order]], rank] = column[order]

    def all(self) -> Columns:
        order = np.argsort(self._sample[0], kind="stable")
        positions_N, tokens_N, slots_NHK, weights_NHK = (one[order] for one in self._sample)
        tokens, heads, ranks = (one.ravel() for one in np.indices(slots_NHK.shape))
        return Columns(
            position=positions_N[tokens],
            token=tokens_N[tokens],
            head=heads,
            rank=ranks,
            slot=slots_NHK.ravel(),
            weight=weights_NHK.ravel(),
        )

    def strongest(self, slot: int | None) -> Columns:
        rows = np.arange(self.slots) if slot is None else np.arange(slot, min(slot + 1, self.slots))
        slots, ranks = (self._strongest[0][rows] >= 0).nonzero()
        weights, positions, tokens, heads = (held[rows[slots], ranks] for held in self._strongest)
        return Columns(slot=rows[slots], head=heads.astype(np.int64), position=positions, token=tokens, weight=weights)


def _lot(positions: np.ndarray) -> np.ndarray:
    """A number that is as good as random for each position, and always the same: the tokens with the lowest are kept.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    x = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
