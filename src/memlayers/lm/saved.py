"""Models that `save_pretrained` or `save_memory` wrote, their weights and their tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import memlayers.models as models
from memlayers.lm.data.corpus import DOCUMENT, END_OF_TEXT, Split


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """The causal language model in a folder, on the CPU, in evaluation mode. Raises `ValueError` if there is none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        places = {*config.get("auto_map", {})} - {"AutoConfig"}
        names = config.get("architectures") or []
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} must describe a model of transformers ({error})") from None
    if places and "AutoModelForCausalLM" not in places:
        raise ValueError(
            f"checkpoint must hold a causal language model, got {str(folder)!r} with a {' or '.join(names)}: call "
            f"memlayers.doctor(model, batch) with a batch of its own"
        )
    for name in names:  # known to the Auto classes from now on
        getattr(models, name, None)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {error}") from error
    return model.eval()


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a text begins with, or that ends the one before; None if the tokenizer has neither.

    As a corpus has it: <|endoftext|> where the tokenizer knows it.
    """
    mark = tokenizer.get_vocab().get(END_OF_TEXT)
    if mark is not None:
        return mark
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def read_again(split: Split, own: Any, other: PreTrainedTokenizerBase, most: int) -> Split:
    """The first documents of a split in the tokens of another tokenizer: as many as have `most` tokens there, about."""
    mark = first_token(other)
    if mark is None:
        raise ValueError("the tokenizer must have a token that begins or ends a text, got one without")
    documents: list[tuple[int, int, int]] = []
    tokens: list[int] = []
    for shard in split.shards:
        ends = [*shard.documents["offset"][1:], shard.num_tokens]
        for (offset, words, size), end in zip(shard.documents, ends, strict=True):
            text = own.decode(shard.tokens[offset + 1 : end].tolist(), clean_up_tokenization_spaces=False)
            documents.append((len(tokens), words, size))
            tokens += [mark, *other.encode(text, add_special_tokens=False)]
            if len(tokens) >= most:
                break
        if len(tokens) >= most:
            break
    return Split(np.array(tokens, dtype=np.int64), np.array(documents, dtype=DOCUMENT))
