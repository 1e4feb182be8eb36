"""What a run takes from the trained model that its memories stand beside: sizes, blocks, weights, tokens."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memlayers.files import describe_files, file_sha256
from memlayers.layer import memory_layers
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus
from memlayers.lm.data.tokenize import SMALLEST_VOCABULARY, tokenizer_file
from memlayers.lm.saved import load_model
from memlayers.models import default_layer, find_layers
from memlayers.models.folder import MEMORY_CONFIG_NAME, WHOLE_MODEL
from memlayers.models.targets import Layers, hidden_size, num_blocks

MOST_CONTEXT = 1024  # tokens of a window by default: models of today take a hundred times as many
BATCH_TOKENS = 4096  # of a step by default, about


def fields_of_base(folder: Path) -> dict[str, Any]:
    """The fields of a `RunConfig` that the model in a folder decides, by ``section.field``.

    Raises `ValueError` for a folder without a causal language model and its tokenizer, and for one with memories.
    """
    tokenizer_file(str(folder))
    if (folder / MEMORY_CONFIG_NAME).exists():
        raise ValueError(
            f"base must be a model without memories, got {str(folder)!r}: a run goes on by memlayers train --from RUN"
        )
    model = empty_model(folder)
    layers, context = num_blocks(model), min(_most_context(model), MOST_CONTEXT)
    return {
        "base": str(folder),
        "data.tokenizer": str(folder),
        "data.vocab_size": max(SMALLEST_VOCABULARY, model.config.get_text_config().vocab_size),
        "model.family": "pretrained",
        "model.layers": layers,
        "model.dim": hidden_size(model),
        "model.heads": getattr(model.config.get_text_config(), "num_attention_heads", None) or 1,
        "model.context": context,
        "memory_layers": (default_layer(layers),),
        "training.batch_tokens": context * max(1, BATCH_TOKENS // context),
    }


def empty_model(folder: Path) -> PreTrainedModel:
    """The model in a folder without its weights, on the meta device. Raises `ValueError` if there is none."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base must hold a causal language model of transformers, got {str(folder)!r}: {error}"
        ) from None


def base_model(config: RunConfig, *, is_empty: bool) -> PreTrainedModel:
    """The base of a run in float32, on the meta device if it `is_empty`, else on the CPU.

    Raises `ValueError` for one that is not as the configuration says.
    """
    folder = Path(str(config.base))
    model = empty_model(folder) if is_empty else load_model(folder, dtype=torch.float32)
    sizes = {"layers": num_blocks(model), "dim": hidden_size(model)}
    for name, size in sizes.items():
        if getattr(config.model, name) != size:
            raise ValueError(f"model.{name} must be that of the base, {size}, got {getattr(config.model, name)}")
    if config.model.context > _most_context(model):
        raise ValueError(
            f"model.context must be at most that of the base, {_most_context(model)}, got {config.model.context}"
        )
    if memory_layers(model):
        raise ValueError(f"base must be a model without memories, got {str(folder)!r}")
    return model


def _most_context(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or MOST_CONTEXT


def places(model: PreTrainedModel, numbers: Sequence[int]) -> Layers:
    """What `add_memory` takes for these blocks: the numbers, or the names of blocks whose FFN is not one module.

    Raises `ValueError` for blocks that no memory can stand beside.
    """
    known = {
        place.layers if isinstance(place.layers, int) else int(place.name.rpartition(".")[2]) + 1: place
        for place in find_layers(model)
        if "parallel" in place.modes
    }
    if missing := [number for number in numbers if number not in known]:
        raise ValueError(f"memory_layers must be among {', '.join(map(str, known))} for this base, got {missing[0]}")
    chosen = [known[number] for number in numbers]
    if all(isinstance(place.layers, int) for place in chosen):
        return list(numbers)
    return [place.name for place in chosen]


def base_sha256(config: RunConfig, corpus: Corpus) -> str:
    """The hash of the weights of a run's base. Raises `ValueError` if it has other tokens than the corpus."""
    folder = Path(str(config.base))
    if file_sha256(tokenizer_file(str(folder))) != corpus.tokenizer_sha256:
        raise ValueError(
            f"corpus must have the tokenizer of the base, got {str(corpus.folder)!r} with another one: prepare the "
            f"text with --data.tokenizer {folder}"
        )
    size = empty_model(folder).config.get_text_config().vocab_size
    if corpus.vocab_size > size:
        raise ValueError(f"corpus must have at most the {size} tokens of the base, got {corpus.vocab_size}")
    names = [path.name for path in folder.iterdir() if re.fullmatch(WHOLE_MODEL, path.name)]
    return hashlib.sha256(json.dumps(describe_files(folder, names), sort_keys=True).encode()).hexdigest()
