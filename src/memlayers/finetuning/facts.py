"""Batches of facts: questions with answers, of which only the answers are learned, one a row.

Two mistakes made models learn nothing of hundreds of facts: a loss over the questions, too, which drowns the few tokens
that matter; and facts packed into one row, where each is read behind those before it, and asked for alone later.

Letters: B batch, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of what is not in the loss
_SHORT = 64  # tokens of a fact at most, where what is longer may be text that is meant to be learned whole


def facts_batch(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
    """One row for each prompt with its answer and an end, padded on the right; the loss is that of answer and end.

    Args:
        tokenizer: of `transformers`. Padding is its padding token, else its end, else 0.
        prompts: as a text begins: "The capital of France is".
        answers: as it goes on, with the space where there is one: " Paris".

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` [B, T], to call a model with.

    Raises:
        ValueError: not one answer a prompt, none at all, or one without tokens; a text in place of a list.
    """
    for name, texts in (("prompts", prompts), ("answers", answers)):
        if isinstance(texts, str):
            raise ValueError(f"{name} must be a list of texts, got the text {texts!r}")
    if len(prompts) != len(answers) or not prompts:
        raise ValueError(f"there must be as many answers as prompts, at least 1, got {len(answers)} and {len(prompts)}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        first = tokenizer(prompt)["input_ids"]
        if first[-1:] == end:  # some tokenizers end each text
            first = first[:-1]
        if not first:
            raise ValueError(f"each prompt must have at least one token, got {prompt!r} for {answer!r}")
        if not (said := tokenizer(answer, add_special_tokens=False)["input_ids"]):
            raise ValueError(f"each answer must have at least one token, got {answer!r} for {prompt!r}")
        rows.append((first, [*said, *end]))
    longest = max(len(first) + len(said) for first, said in rows)
    padding = next(one for one in (tokenizer.pad_token_id, *end, 0) if one is not None)
    filled: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for first, said in rows:
        real, rest = len(first) + len(said), longest - len(first) - len(said)
        filled["input_ids"].append([*first, *said, *[padding] * rest])
        filled["attention_mask"].append([1] * real + [0] * rest)
        filled["labels"].append([IGNORED] * len(first) + said + [IGNORED] * rest)
    return {name: torch.tensor(lists) for name, lists in filled.items()}


def faults_of_facts(batch: Mapping[str, Any], starts: Sequence[int]) -> dict[str, str]:
    """What is wrong with a batch of facts, as far as it can be seen in the arguments of a model.

    Args:
        batch: what the model is called with, by name.
        starts: the tokens with which a text begins.

    Returns:
        Messages by "prompt" (the loss covers whole rows that are short) and "packed" (short texts see each other).
    """
    ids_BT, labels_BT = batch.get("input_ids"), batch.get("labels")
    if not (isinstance(ids_BT, Tensor) and isinstance(labels_BT, Tensor)) or ids_BT.shape != labels_BT.shape:
        return {}
    if ids_BT.ndim != 2 or 0 in ids_BT.shape:
        return {}
    mask: Any = batch.get("attention_mask")
    has_plain_mask = isinstance(mask, Tensor) and mask.shape == ids_BT.shape
    # Without a mask, what is behind the last label may be padding.
    real_BT: Tensor = mask != 0 if has_plain_mask else (labels_BT != IGNORED).flip(1).cumsum(1).flip(1) > 0
    real_B = real_BT.sum(1)
    found = {}
    covers = (labels_BT == ids_BT) | ~real_BT
    covers[torch.arange(len(ids_BT)), real_BT.int().argmax(1)] = True  # nothing predicts the first token
    if bool(covers.all()) and int(real_B.min()) > 1 and int(real_B.max()) <= _SHORT:
        found["prompt"] = (
            f"the loss covers all tokens of {len(ids_BT)} rows of at most {int(real_B.max())}: of a question with its "
            f"answer, only the answer is to be learned (labels of {IGNORED} elsewhere, as facts_batch makes them)"
        )
    is_start_BT = torch.isin(ids_BT, torch.tensor([*starts], device=ids_BT.device, dtype=ids_BT.dtype)) & real_BT
    inner_B = (is_start_BT[:, 1:] & real_BT[:, :-1] & ~is_start_BT[:, :-1]).sum(1)
    are_apart = (
        (isinstance(mask, Tensor) and (not has_plain_mask or int(mask.max()) > 1))  # 4-D, or numbers of texts
        or batch.get("position_ids") is not None  # which may say where texts begin
        or any(name.startswith("cu_seq_lens") for name in batch)
    )
    texts = int((inner_B + 1).sum())
    if not are_apart and int(inner_B.min()) >= 2 and int(real_B.sum()) / texts <= _SHORT:
        found["packed"] = (
            f"{texts} short texts are packed into {len(ids_BT)} rows, and each sees those before it, which are not "
            "there when it is asked for: have one fact a row (facts_batch), or a mask that keeps them apart"
        )
    return found
