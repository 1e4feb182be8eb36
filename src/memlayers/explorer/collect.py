"""What a page about a model is made of: the text as tokens, what each memory reads of it, and how often.

Letters: B windows of a batch, T tokens, H heads, K rows a head reads, S slots, C words of the vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlayers.diagnosis.subjects import Subject, find_subjects
from memlayers.explorer.columns import Columns
from memlayers.explorer.trace import SlotTrace
from memlayers.explorer.words import Words
from memlayers.usage import UsageReport

MOST_CONTEXT = 1024  # tokens of a window, for models that would take many more
BATCH_TOKENS = 4096
TYPES = 5  # top tokens of a slot
TRACED_BYTES = 2**27  # of all reads that a trace keeps


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as windows of tokens, none of which goes over the end of a document."""

    windows: list[list[int]]
    is_cut: bool  # there was more of it

    @property
    def tokens(self) -> np.ndarray:
        """All of them, one window after the other."""
        return np.concatenate([np.array(window, np.int64) for window in self.windows])

    @property
    def starts(self) -> np.ndarray:
        """The place of the first token of each window."""
        return np.cumsum([0, *map(len, self.windows[:-1])])

    def batches(self) -> Iterator[list[list[int]]]:
        """Windows that are called together."""
        batch: list[list[int]] = []
        for window in self.windows:
            if batch and (len(batch) + 1) * max(len(window), *map(len, batch)) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(window)
        yield batch


def answering(model: nn.Module) -> list[Subject]:
    """The memories that answer (`set_active`). Raises `ValueError` for a model without."""
    subjects = [subject for subject in find_subjects(model) if subject.is_active]
    if not subjects:
        raise ValueError("model must have an active memory, got one of which none is: memlayers.models.set_active")
    return subjects


def read_text(model: nn.Module, tokenizer: Any, texts: Iterable[str], most: int) -> Text:
    """The first `most` tokens of the texts. Raises `ValueError` if there is none, or one that the model has not."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = min(getattr(text_config, "max_position_embeddings", None) or MOST_CONTEXT, MOST_CONTEXT)
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows: list[list[int]] = []
    left, is_cut = most, False
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings, got a {type(text).__name__}")
        if left <= 0:
            is_cut = True
            break
        part = text[: 32 * left]  # more characters than the tokens that are wanted have
        ids = tokenizer.encode(part, add_special_tokens=False, verbose=False)
        if not ids:
            continue
        ids = ids if mark is None else [mark, *ids]
        is_cut |= len(ids) > left or len(part) < len(text)
        ids = ids[:left]
        left -= len(ids)
        windows += [ids[first : first + context] for first in range(0, len(ids), context)]
    if not windows:
        raise ValueError("texts must have at least one token, got none")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size, last = getattr(embeddings, "num_embeddings", None), max(map(max, windows))
    if size is not None and last >= size:
        raise ValueError(f"tokenizer must be that of the model, which has {size:,} tokens, got one with token {last:,}")
    return Text(windows=windows, is_cut=is_cut)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What one model makes of a text."""

    text: Text
    subjects: list[Subject]
    shown_reads: dict[str, tuple[np.ndarray, np.ndarray]]  # of each memory, slots and weights [T, H, K]
    trace: SlotTrace  # of the whole text
    place_of: np.ndarray  # of its positions, which count padding, the place in the text
    words: Words
    loss: float | None  # a token, in nats, over what was predicted within the windows

    @cached_property
    def strongest(self) -> Columns:
        """The strongest reads of all slots."""
        return self.trace.strongest()

    @cached_property
    def types(self) -> Columns:
        """The tokens that read each slot with most weight."""
        return self.trace.top_tokens(TYPES)

    def counts_HS(self, name: str) -> np.ndarray:
        """How often each head of a memory read each slot."""
        return self.trace.usage[name].state_dict()["count_HS"].cpu().numpy()

    def usage(self, name: str) -> UsageReport:
        return self.trace.usage[name].report()


def read_memories(model: nn.Module, text: Text, *, shown: int, strongest: int) -> Findings:
    """Calls the model with a text, and returns what its memories read.

    Raises `ValueError` for a model without memories, and one that passes a memory by.
    """
    subjects = answering(model)
    device = next(model.parameters()).device
    bytes_of_token = sum(12 * subject.layer.config.heads * subject.layer.config.topk for subject in subjects)
    trace = SlotTrace(model, tokens=max(1, TRACED_BYTES // bytes_of_token), strongest=strongest)
    first = SlotTrace(model, tokens=shown + BATCH_TOKENS + MOST_CONTEXT)  # all of the windows that are shown
    modes = {module: module.training for module in model.modules()}
    losses, predicted, done = 0.0, 0, 0
    places: list[np.ndarray] = []
    model.eval()
    try:
        words = Words(model, torch.tensor([text.windows[0][:8]], device=device))
        with torch.no_grad(), trace:
            for batch in text.batches():
                ids_BT, mask_BT = (one.to(device) for one in _padded(batch))
                with first if done < shown else nullcontext():
                    output = model(input_ids=ids_BT, attention_mask=mask_BT)
                real = mask_BT.flatten().cpu().numpy() == 1
                places.append(np.where(real, done + np.cumsum(real) - 1, -1))
                done += int(real.sum())
                nll, targets = _nll(output, ids_BT, mask_BT)
                losses, predicted = losses + nll, predicted + targets
    finally:
        for module, mode in modes.items():
            module.training = mode
    for subject in subjects:
        if not trace.tokens_of(subject.name):
            raise ValueError(f"the memory {subject.name} has read nothing of the text: the model does not call it")
    place_of = np.concatenate(places)
    shown_reads, reads = {}, first.reads()
    for subject in subjects:
        heads, topk = subject.layer.config.heads, subject.layer.config.topk
        of = (reads["memory"] == subject.name) & (place_of[reads["position"]] < shown)
        shown_reads[subject.name] = tuple(reads[name][of].reshape(-1, heads, topk) for name in ("slot", "weight"))
    return Findings(
        text=text,
        subjects=subjects,
        shown_reads=shown_reads,
        trace=trace,
        place_of=place_of,
        words=words,
        loss=losses / predicted if predicted else None,
    )


def _padded(batch: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T]."""
    length = max(map(len, batch))
    ids_BT = torch.tensor([[*window, *[0] * (length - len(window))] for window in batch])
    mask_BT = torch.tensor([[1] * len(window) + [0] * (length - len(window)) for window in batch])
    return ids_BT, mask_BT


def _nll(output: Any, ids_BT: Tensor, mask_BT: Tensor) -> tuple[float, int]:
    """The negative log likelihood of a batch, and of how many tokens; zeros of a model that is no language model."""
    logits_BTC = getattr(output, "logits", None)
    if not isinstance(logits_BTC, Tensor) or logits_BTC.shape[:-1] != ids_BT.shape:
        return 0.0, 0
    targets_BT = ids_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100)
    nll = F.cross_entropy(logits_BTC[:, :-1].float().flatten(0, 1), targets_BT.flatten(), reduction="sum")
    return float(nll), int((targets_BT >= 0).sum())
