"""What a page holds: findings as arrays of few bytes, cut to what fits, with a word about each cut.

Letters: T tokens, H heads, K rows a head reads, S slots, D slots with details, R reads that are kept of a slot.
"""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memlayers.diagnosis.subjects import Subject
from memlayers.explorer.collect import TYPES, Findings
from memlayers.explorer.words import values_of
from memlayers.usage import UsageFigures

WORDS = 8  # nearest words of a slot
MOST_USED = 64  # slots that have details whatever the text reads
WORD_FLOPS = 2e12  # of logits of values: what a large vocabulary may cost
NONE = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much a page may hold of each kind; all memories share it."""

    reads: int  # bytes of the tokens' reads
    details: int  # bytes of the slots' details
    cells: int  # of all maps

    def half(self) -> "Room":
        return Room(reads=self.reads // 2, details=self.details // 2, cells=self.cells // 2)


class Strings:
    """The texts of the tokens that a page names, each once."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._place: dict[int, int] = {}
        self.all: list[str] = []

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where the texts of ids stand; `NONE` for ids below 0."""
        known = np.unique(ids[ids >= 0])
        for token in known.tolist():
            if token not in self._place:
                self._place[token] = len(self.all)
                self.all.append(self._text(token))
        place = np.array([self._place[token] for token in known.tolist()] or [0], np.int64)
        found = place[np.searchsorted(known, ids).clip(max=len(place) - 1)]
        return np.where(ids < 0, NONE, found)

    def _text(self, token: int) -> str:
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = self._tokenizer.convert_ids_to_tokens(token)
        # SentencePiece marks the space before a word, which a single token loses when it is decoded.
        is_spaced = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
        return f" {text}" if is_spaced else text


def pack(found: Findings, other: Findings | None, strings: Strings, room: Room) -> dict[str, Any]:
    """The text and all memories, as JSON types."""
    share = Room(
        reads=room.reads // len(found.subjects),
        details=room.details // len(found.subjects),
        cells=room.cells // len(found.subjects),
    )
    shown = min(_shown(subject, share)[0] for subject in found.subjects)
    text = found.text
    shown = min(shown, len(text.tokens), *(len(slots) for slots, _ in found.shown_reads.values()))
    return {
        "tokens": base64_of(strings.places(text.tokens), "u4"),
        "starts": base64_of(text.starts, "u4"),
        "shown": shown,
        "memories": [_memory(found, subject, other, strings, share, shown) for subject in found.subjects],
    }


def most_shown(subjects: list[Subject], room: Room) -> int:
    """How many tokens can be shown with what they read, at most."""
    share = Room(reads=room.reads // len(subjects), details=0, cells=0)
    return min(_shown(subject, share)[0] for subject in subjects)


def _shown(subject: Subject, room: Room) -> tuple[int, int]:
    """Tokens, and reads of each of their heads: all K, or the best ones where that leaves too few tokens."""
    heads, topk = subject.layer.config.heads, subject.layer.config.topk
    reads = topk
    while room.reads // (6 * heads * reads) < 500 and reads > 4:
        reads -= 1
    return max(1, min(4000, room.reads // (6 * heads * reads))), reads


def _memory(
    found: Findings, subject: Subject, other: Findings | None, strings: Strings, room: Room, shown: int
) -> dict[str, Any]:
    name, config = subject.name, subject.layer.config
    _, topk = _shown(subject, room)
    slots_THK, weights_THK = (one[:shown, :, :topk] for one in found.shown_reads[name])
    counts_HS = found.counts_HS(name)
    counts_S = counts_HS.sum(0)
    detailed, touched = _detailed(found, subject, slots_THK, weights_THK, counts_S, room.details)
    block, levels = _map(counts_S, config.num_subkeys, room.cells)
    report = found.usage(name)
    packed: dict[str, Any] = {
        "name": name,
        "kind": type(subject.layer).__name__,
        "heads": config.heads,
        "topk": config.topk,
        "shownTopk": topk,
        "subkeys": config.num_subkeys,
        "flat": config.keys == "flat",
        "slots": config.slots,
        "read": int((counts_S > 0).sum()),
        "allReads": int(counts_S.sum()),
        "tokens": report.tokens,
        "way": found.words.way(subject),
        "touched": touched,
        "reads": {"slots": base64_of(slots_THK, "u4"), "weights": base64_of(np.rint(weights_THK * 65535), "u2")},
        "map": {"block": block, "levels": base64_of(levels, "u1")},
        "details": _details(found, subject, strings, counts_HS, detailed),
    }
    if other is not None:
        packed["other"] = _compared(found, subject, other, detailed, topk, shown)
        _, levels = _map(other.counts_HS(name).sum(0), config.num_subkeys, room.cells)
        packed["other"]["levels"] = base64_of(levels, "u1")
    return packed


def _detailed(
    found: Findings, subject: Subject, slots: np.ndarray, weights: np.ndarray, counts_S: np.ndarray, room: int
) -> tuple[np.ndarray, int]:
    """The slots that get details, ascending, and how many slots the shown tokens read.

    The most used ones, then those that the shown tokens read with most weight, then the others by use.
    """
    strongest = found.trace.strongest_of_each
    bytes_of_slot = 4 + 4 * subject.layer.config.heads + 6 * WORDS + 7 * strongest + 6 * TYPES + 6
    most = room // bytes_of_slot
    if found.words.head is not None:
        vocabulary = sum(one.shape[0] for one in found.words.head.parameters() if one.ndim == 2)
        most = min(most, int(WORD_FLOPS / len(found.subjects) / (2 * vocabulary * subject.layer.config.dim)))
    weight_S = np.bincount(slots.ravel(), weights.ravel(), len(counts_S))
    by_use = np.argsort(-counts_S, kind="stable")
    order = np.lexsort((-counts_S, -weight_S))
    wanted = dict.fromkeys([*by_use[:MOST_USED].tolist(), *order[: int((counts_S > 0).sum())].tolist()])
    kept = [slot for slot in wanted if counts_S[slot] > 0][: max(1, most)]
    return np.sort(np.array(kept, np.int64)), int((weight_S > 0).sum())


def _details(
    found: Findings, subject: Subject, strings: Strings, counts_HS: np.ndarray, detailed: np.ndarray
) -> dict[str, Any]:
    ids, scores = (one.numpy() for one in found.words.nearest(subject, torch.from_numpy(detailed), WORDS))
    strongest = found.strongest
    of = (strongest["memory"] == subject.name) & np.isin(strongest["slot"], detailed)
    row = np.searchsorted(detailed, strongest["slot"][of])
    # In the order of `strongest`: a slot's reads follow each other, the strongest first.
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    context_DR = np.full((len(detailed), found.trace.strongest_of_each), NONE, np.int64)
    weight_DR, head_DR = np.zeros(context_DR.shape), np.zeros(context_DR.shape)
    context_DR[row, rank] = found.place_of[strongest["position"][of]]
    weight_DR[row, rank], head_DR[row, rank] = strongest["weight"][of], strongest["head"][of]
    types = found.types
    of = (types["memory"] == subject.name) & np.isin(types["slot"], detailed)
    row = np.searchsorted(detailed, types["slot"][of])
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    type_D, reads_D = np.full((len(detailed), TYPES), -1, np.int64), np.zeros((len(detailed), TYPES))
    type_D[row, rank], reads_D[row, rank] = types["token"][of], types["reads"][of]
    scale = float(np.abs(scores).max()) if scores.size else 1.0
    return {
        "slots": base64_of(detailed, "u4"),
        "counts": base64_of(counts_HS[:, detailed].T, "u4"),
        "words": base64_of(strings.places(ids), "u4"),
        "scores": base64_of(np.rint(scores / (scale or 1.0) * 32767), "i2"),
        "scale": scale,
        "contexts": base64_of(context_DR, "u4"),
        "contextWeights": base64_of(np.rint(weight_DR * 65535), "u2"),
        "contextHeads": base64_of(head_DR, "u1"),
        "types": base64_of(strings.places(type_D), "u4"),
        "typeReads": base64_of(reads_D.clip(max=65535), "u2"),
        "sampled": min(found.trace.tokens, found.trace.size),
    }


def _compared(
    found: Findings, subject: Subject, other: Findings, detailed: np.ndarray, topk: int, shown: int
) -> dict[str, Any]:
    name = subject.name
    (match,) = (one for one in other.subjects if one.name == name)
    rows = torch.from_numpy(detailed)
    values, others = (values_of(one, rows.to(one.table.row_mark.device)).cpu() for one in (subject, match))
    cosine_D = torch.cosine_similarity(values, others, dim=-1).numpy()
    mine, theirs = (one.shown_reads[name][0][:shown, :, :topk] for one in (found, other))
    overlap_T = (mine[..., :, None] == theirs[..., None, :]).any(-1).mean((1, 2))
    both = found.counts_HS(name).sum(0) > 0, other.counts_HS(name).sum(0) > 0
    return {
        "counts": base64_of(other.counts_HS(name).sum(0)[detailed], "u4"),
        "cosine": base64_of(np.rint(cosine_D * 127), "i1"),
        "overlap": base64_of(np.rint(overlap_T * 255), "u1"),
        "both": int((both[0] & both[1]).sum()),
        "onlyThis": int((both[0] & ~both[1]).sum()),
        "onlyOther": int((~both[0] & both[1]).sum()),
        "meanOverlap": float(overlap_T.mean()) if len(overlap_T) else 0.0,
    }


def _map(counts_S: np.ndarray, subkeys: int, cells: int) -> tuple[int, np.ndarray]:
    """Slots along a side of a cell, and for each cell 0 if none of its slots is read, else 1 + log2 of their mean."""
    side = min(subkeys, math.isqrt(max(1, cells)))
    block = math.ceil(subkeys / side)
    side = math.ceil(subkeys / block)
    grid = np.zeros((side * block, side * block))
    grid[:subkeys, :subkeys] = counts_S.reshape(subkeys, subkeys)
    mean = grid.reshape(side, block, side, block).mean((1, 3))
    return block, np.where(mean > 0, 1 + np.floor(np.log2(np.maximum(mean, 1))), 0)


def base64_of(array: np.ndarray, kind: str) -> str:
    """Little-endian numbers. Raises `ValueError` for what is no number."""
    if not np.isfinite(array).all():
        raise ValueError("model must have finite values and outputs to be shown, got NaN or infinite ones")
    return base64.b64encode(np.ascontiguousarray(array, dtype=np.float64).astype(f"<{kind}").tobytes()).decode()


def figures(found: Findings) -> list[Mapping[str, Any]]:
    """A row of the table of usage for each memory and each of its heads."""
    rows: list[Mapping[str, Any]] = []
    for subject in found.subjects:
        report = found.usage(subject.name)
        parts = [("all heads", report.overall), *((f"head {h}", one) for h, one in enumerate(report.heads, start=1))]
        rows += [_row(subject.name, part, one, report.slots) for part, one in parts]
    return rows


def _row(memory: str, part: str, one: UsageFigures, slots: int) -> Mapping[str, Any]:
    return {
        "memory": memory,
        "part": part,
        "usage": f"{one.count_usage:.1f} %",
        "dead": f"{round(slots * (1 - one.count_usage / 100)):,}",
        "top1": f"{one.top1_usage:.1f} %",
        "kl": f"{one.kl:.2f}",
        "gini": f"{one.gini:.2f}",
        "half": f"{one.slots_50:,}",
        "most": f"{one.slots_90:,}",
    }
