"""start: what a run must have before its first step, and what is refused before any work.

The model that it begins with, the checkpoint from which it goes on, its text, and room on the disk.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from memlayers.available import available_memory
from memlayers.lm.build import build_model
from memlayers.lm.checkpoint import Checkpoint, Checkpoints
from memlayers.lm.config import RunConfig, differences
from memlayers.lm.data import Corpus, Windows, training_order
from memlayers.lm.footprint import Footprint, size_text
from memlayers.lm.metrics import MetricsFile
from memlayers.lm.retrofit import base_sha256
from memlayers.lm.run import RunFolder
from memlayers.lm.tables import weight_bytes
from memlayers.parameters import count_parameters


class Text(NamedTuple):
    """What a run reads: the windows of its corpus, and in which order."""

    corpus: Corpus
    windows: Windows
    order: np.ndarray


def first_run(config: RunConfig) -> RunFolder:
    """The run that another one begins with, verified. Raises `ValueError` if it has no such model."""
    first = RunFolder(str(config.training.begin_with))
    if not first.finished:
        raise ValueError(f"training.begin_with must be the folder of a finished run, got {str(first.path)!r}")
    parts = ("model.", "memory", "base", "train_base")
    others = [line for line in differences(first.read_config(), config) if line.startswith(parts)]
    # Neither where a table lies nor what is dropped is of the model.
    if others := [line for line in others if not re.match(r"\S*dropout: |memory_values: ", line)]:
        raise ValueError(
            f"training.begin_with must be a run of the same model; {str(first.path)!r} differs in (there, asked for): "
            f"{'; '.join(others)}"
        )
    first.verify_model()
    return first


def require_models_kept(folder: RunFolder, config: RunConfig) -> None:
    """Raises `ValueError` if the run would take the place of a model that it needs."""
    for name, place in (("base", config.base), ("training.begin_with", config.training.begin_with)):
        if place is not None and folder.takes_the_place_of(place):
            raise ValueError(
                f"output must be another folder than that of the model in {name}, whose place it would take, got "
                f"{str(folder.path)!r} for {place!r}"
            )


def same_tokens(first: RunFolder, corpus: Corpus) -> str:
    """The hash of the model that a run begins with. Raises `ValueError` if the corpus has other tokens than that."""
    result = first.read_result()
    if result["data"].get("tokenizer_sha256") != corpus.tokenizer_sha256:
        raise ValueError(
            f"corpus must have the tokenizer of the run in training.begin_with, got {str(corpus.folder)!r} with "
            f"another one: prepare the text with --data.tokenizer {first.path}"
        )
    return hashlib.sha256(json.dumps(result["model_files"], sort_keys=True).encode()).hexdigest()


def checkpoint_to_go_on(folder: RunFolder, identity: dict[str, Any], say: Callable[[str], None]) -> Checkpoint | None:
    """From where a run goes on, if its folder holds one and the checkpoint is of this very run."""
    checkpoints = Checkpoints(folder.checkpoints)
    for name in checkpoints.remove_incomplete():
        say(f"the checkpoint {name} was not complete and is skipped")
    checkpoint = checkpoints.newest()
    if checkpoint is None:
        if folder.begun:
            made, due = MetricsFile(folder.metrics).lines(), folder.read_config().training.save_every_steps
            if made > due:  # a line is written before the checkpoint of its step
                raise ValueError(
                    f"output must hold the checkpoints of a run to be resumed, but {folder.checkpoints} has none, and "
                    f"{folder.metrics.name} has {made} steps, of which step {due} left one: bring them back (is a disk "
                    f"not mounted?), or have the run replaced (--overwrite, overwrite=True)"
                )
            say(f"{folder.path} has no checkpoint yet: the run begins again")
        return None
    require_same_config(
        RunConfig.from_dict(checkpoint.content["config"]), RunConfig.from_dict(identity["config"]), folder
    )
    for what, expected in checkpoint.content["data"].items():
        if identity["data"].get(what) != expected:
            raise ValueError(
                f"output must hold a run on the same text to be resumed, but {str(folder.path)!r} was trained with "
                f"another {what.removesuffix('_sha256')}"
            )
    if checkpoint.content["precision"] != identity["precision"]:
        raise ValueError(
            f"training.precision must be that of the run to be resumed: {str(folder.path)!r} was trained in "
            f"{checkpoint.content['precision']}, which means {identity['precision']} on this machine"
        )
    MetricsFile(folder.metrics).cut(checkpoint.content["metrics_bytes"])
    say(f"going on from the checkpoint of step {checkpoint.step}")
    return checkpoint


def require_same_config(held: RunConfig, asked: RunConfig, folder: RunFolder) -> None:
    if others := differences(held, asked):
        raise ValueError(
            f"output must hold a run of the same configuration to be resumed; {str(folder.path)!r} differs in (there, "
            f"asked for): {'; '.join(others)}. Its own configuration is {folder.config.name}; to train a finished run "
            f"on, begin a new one with its model (training.begin_with)"
        )


def text_of(config: RunConfig, corpus: Corpus) -> Text:
    """The windows of a run in their order. Raises `ValueError` if the corpus or the memory is too small for them."""
    windows = training_windows(config, corpus)
    count = config.training.steps * config.batch_windows
    if 4 * count > available_memory("cpu"):
        name = "tokens" if config.training.steps > 1 else "batch_tokens"
        raise ValueError(
            f"training.{name} must be fewer: the order of {count:,} windows alone does not fit into memory, "
            f"got {getattr(config.training, name):,}"
        )
    return Text(corpus, windows, training_order(windows, count, config.training.seed, config.data.weights))


def training_windows(config: RunConfig, corpus: Corpus) -> Windows:
    """The windows that a run reads. Raises `ValueError` for a corpus that is too small for `config`."""
    needed, longest = config.model.context + 1, max(shard.num_tokens for shard in corpus.train.shards)
    if longest < needed:
        raise ValueError(
            f"model.context must be below the {longest} tokens of the training text (its longest shard), "
            f"got {config.model.context}"
        )
    if corpus.validation.num_tokens < 2:
        raise ValueError(f"data must leave at least 2 validation tokens, got {corpus.validation.num_tokens}")
    return Windows(corpus.train, needed)


def data_identity(config: RunConfig, text: Text, first: RunFolder | None) -> dict[str, str]:
    """The hashes of all that a run reads. Raises `ValueError` for a corpus whose tokens are not those of its model."""
    corpus = text.corpus
    hashes = {
        "corpus_sha256": corpus.manifest["corpus_sha256"],
        "tokenizer_sha256": corpus.tokenizer_sha256,
        "order_sha256": hashlib.sha256(text.order.data).hexdigest(),
    }
    if first is not None:
        hashes["begin_with_sha256"] = same_tokens(first, corpus)
    if config.base is not None:
        hashes["base_sha256"] = base_sha256(config, corpus)
    return hashes


def require_space(folder: RunFolder, config: RunConfig, need: Footprint) -> None:
    """Room for the checkpoints that are kept, one more that is being written, and the model."""
    of_base = 0  # is in none of them if it is frozen
    if config.base_is_frozen:
        of_base = 4 * count_parameters(build_model(config, vocab_size=0, eot_id=0, device="meta"))["rest"]
    checkpoints = min(config.training.keep_checkpoints + 1, config.training.checkpoints)
    needed = checkpoints * (need.saved - of_base) + need.parameters - of_base + weight_bytes(config, need)
    held = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    place = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free + held
    if needed > free:
        raise ValueError(
            f"output must have {size_text(needed)} free for checkpoints and the model, {str(folder.path)!r} has "
            f"{size_text(free)}: lower training.keep_checkpoints or the size of the model, or choose another disk"
        )
