"""memlayers doctor: the checks of `memlayers.doctor` on a model that was saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsonargparse import ArgumentParser

from memlayers.cli.call import Call
from memlayers.cli.options import Base

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from memlayers.lm.config import RunConfig
    from memlayers.lm.data import Corpus

BATCH_WINDOWS = 4
MOST_TOKENS = 512  # of a window


def add_doctor(parser: ArgumentParser, base: Base | None) -> None:
    parser.add_argument(
        "checkpoint", help="folder of a finished run, a checkpoint in a run, or what save_pretrained wrote"
    )
    parser.add_argument("--corpus", help="folder of the prepared corpus, if it has moved, or if the model has none")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")


def run_doctor(call: Call) -> None:
    from memlayers.diagnosis import DoctorError, doctor
    from memlayers.lm.build import build_optimizer, pick_device
    from memlayers.optim import MemoryAdamW

    saved = open_saved(Path(call.options.checkpoint))
    folder = call.options.corpus or (saved.corpus if saved.corpus and Path(saved.corpus).is_dir() else None)
    corpus = None if folder is None else _open_corpus(folder, saved)
    model, device = saved.load(), pick_device()
    ids_BT = _random_ids(model) if corpus is None else _validation_ids(corpus, model)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
    optimizer = MemoryAdamW(model) if saved.config is None else build_optimizer(saved.config, model)
    report = doctor(model, {"input_ids": ids_BT.to(device)}, optimizer=optimizer)
    if corpus is None:
        report = report.with_failures_as_warnings({"usage"})
    source = "random tokens, so usage cannot fail" if corpus is None else f"validation text of {folder}"
    tokens = f"{ids_BT.numel():,} tokens: {source}"
    print(json.dumps({"tokens": tokens, **report.to_dict()}, indent=2) if call.options.json else f"{tokens}\n{report}")
    if not report.ok:
        raise DoctorError(f"{len(report.failures)} of {len(report.findings)} checks failed")


class Saved(NamedTuple):
    """A model on disk."""

    load: "Callable[[], PreTrainedModel]"
    config: "RunConfig | None" = None  # of the run that trained it
    corpus: str | None = None  # folder of the text that it was trained on
    tokenizer_sha256: str | None = None


def open_saved(folder: Path) -> Saved:
    """What a folder holds. Raises `ValueError` if it is none of a run, a checkpoint and a saved model."""
    from memlayers.lm.checkpoint import DESCRIPTION, Checkpoints
    from memlayers.lm.config import RunConfig
    from memlayers.lm.run import RunFolder

    run = RunFolder(folder)
    if run.finished:
        data = run.read_result()["data"]
        return Saved(run.load_model, run.read_config(), data.get("folder"), data.get("tokenizer_sha256"))
    if (folder / DESCRIPTION).is_file():
        content = Checkpoints(folder.parent).named(folder.name).content
        try:
            config, data = RunConfig.from_dict(content["config"]), content["data"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{folder / DESCRIPTION} is of another version: {error}") from error
        # A checkpoint does not say where its text is; without being told, a run puts it beside its own folder.
        corpus = folder.absolute().parents[2] / "corpus"
        return Saved(lambda: _load(folder), config, str(corpus), data.get("tokenizer_sha256"))
    if run.checkpoints.is_dir():
        raise ValueError(
            f"checkpoint must be the folder of a finished run, got {str(folder)!r}, which did not finish; "
            f"name one of its checkpoints in {str(run.checkpoints)!r}"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"checkpoint must be the folder of a run, of a checkpoint in one, or of a saved model, got {str(folder)!r}"
        )
    return Saved(lambda: _load(folder))


def _load(folder: Path) -> "PreTrainedModel":
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import memlayers.models

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
        getattr(memlayers.models, name, None)
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {error}") from error


def _open_corpus(folder: str, saved: Saved) -> "Corpus":
    from memlayers.lm.data import open_corpus

    corpus = open_corpus(folder)
    if saved.tokenizer_sha256 not in (None, corpus.tokenizer_sha256):
        raise ValueError(f"corpus must have the tokenizer of the run, got {folder!r}, which has another one")
    return corpus


def _validation_ids(corpus: "Corpus", model: "PreTrainedModel") -> "Tensor":
    """Windows [B, T] from the beginning of the validation text."""
    import numpy as np
    import torch

    vocab_size, length = _limits(model)
    if corpus.vocab_size > vocab_size:
        raise ValueError(f"corpus must have at most the {vocab_size} tokens of the model, got {corpus.vocab_size}")
    tokens = corpus.validation.shards[0].tokens
    length = min(length, len(tokens))
    windows = min(BATCH_WINDOWS, len(tokens) // max(1, length))
    if length < 2:
        raise ValueError(f"corpus must have at least 2 tokens of validation text, got {length}")
    return torch.from_numpy(np.asarray(tokens[: windows * length], dtype=np.int64)).view(windows, length)


def _random_ids(model: "PreTrainedModel") -> "Tensor":
    import torch

    vocab_size, length = _limits(model)
    return torch.randint(vocab_size, (BATCH_WINDOWS, length), generator=torch.Generator().manual_seed(0))


def _limits(model: "PreTrainedModel") -> tuple[int, int]:
    """Its vocabulary, and the tokens of a window."""
    config = model.config.get_text_config()
    return config.vocab_size, min(MOST_TOKENS, getattr(config, "max_position_embeddings", None) or MOST_TOKENS)
