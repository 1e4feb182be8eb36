"""Training of one run, from its configuration to a finished run folder."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Subset
from transformers import set_seed

from memlayers.available import available_memory
from memlayers.files import sole_user
from memlayers.hardware import hardware, versions
from memlayers.lm.build import build_model, pick_device, resolve_precision
from memlayers.lm.checkpoint import Checkpoint, Checkpoints
from memlayers.lm.config import RunConfig, differences
from memlayers.lm.data import Corpus, Windows, prepare, training_order
from memlayers.lm.evaluate import device_name
from memlayers.lm.faults import TrainingFault
from memlayers.lm.footprint import explain_out_of_memory, require_memory, size_text
from memlayers.lm.metrics import MetricsFile
from memlayers.lm.run import RunFolder
from memlayers.lm.trainer import LanguageModelTrainer, Text, words_per_token
from memlayers.ops import cpu
from memlayers.parameters import count_parameters


def _to_stderr(line: str) -> None:
    print(f"memlayers: {line}", file=sys.stderr)


def train(
    config: RunConfig,
    output: str | Path,
    *,
    corpus: Corpus | str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _to_stderr,
) -> dict[str, Any]:
    """Train one model and return what its `result.json` says; `output` becomes a `RunFolder`.

    `corpus` is a prepared corpus or the folder to prepare it in or to take it from; None: the folder `corpus` beside
    `output`. The order of the data is decided by the configuration's seed and the corpus alone, so that models that
    are compared see the same tokens in the same order.

    `resume` goes on with the run that `output` holds, from its newest checkpoint: with the same losses, rates, order
    of the data and usage figures as if it had never stopped. It begins a run where there is none, and leaves a finished
    one as it is. `say` is told from where.

    Raises `ValueError` before any work for a configuration that cannot run here (for want of memory or of room on the
    disk, too) or that does not fit the text; for an `output` that holds a run already, unless `overwrite` says that it
    may go, or `resume` that it goes on; for a run of another configuration or on other text; and for a checkpoint that
    is damaged. Raises `TrainingFault` when a run that has begun cannot go on.
    """
    folder = RunFolder(output)
    device = pick_device()
    precision = resolve_precision(config.training.precision, device)
    _require_one_process()
    folder.check(overwrite=overwrite, resume=resume)
    if resume and folder.begun:
        _require_same_config(folder.read_config(), config, folder)
        if folder.finished:
            with sole_user(folder.path):
                return _leave(folder, say)
    if not isinstance(corpus, Corpus):
        corpus = prepare(config.data, folder.path.parent / "corpus" if corpus is None else corpus, progress=progress)
    windows = training_windows(config, corpus)
    count = config.training.steps * config.batch_windows
    if 4 * count > available_memory("cpu"):
        raise ValueError(
            f"training.tokens must be fewer: the order of {count:,} windows alone does not fit into memory, "
            f"got {config.training.tokens:,}"
        )
    order = training_order(windows, count, config.training.seed, config.data.weights)
    text = Text(corpus, Subset(windows, cast(Sequence[int], order)), order)
    identity: dict[str, Any] = {
        "config": config.to_dict(),
        "data": {
            "corpus_sha256": corpus.manifest["corpus_sha256"],
            "tokenizer_sha256": corpus.tokenizer_sha256,
            "order_sha256": hashlib.sha256(order.data).hexdigest(),
        },
        "precision": precision,
    }
    need = require_memory(config, vocab_size=corpus.vocab_size, precision=precision, device=device)
    checkpoint_bytes = need.parameters + need.optimizer_state
    checkpoints = min(config.training.keep_checkpoints + 1, config.training.checkpoints)
    _require_space(folder, checkpoints * checkpoint_bytes + need.parameters)
    set_seed(config.training.seed)
    model = build_model(config, vocab_size=corpus.vocab_size, eot_id=corpus.eot_id)
    parameters = count_parameters(model)
    if config.training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
    if config.memory_layers and device.type == "cpu":
        cpu.compile_all()  # before the clock starts: an installation pays for it once

    folder.path.mkdir(parents=True, exist_ok=True)
    with sole_user(folder.path):
        if resume and folder.finished:  # by another process, meanwhile
            return _leave(folder, say)
        checkpoint = _checkpoint(folder, identity, say) if resume else None
        if checkpoint is None:
            folder.start(config, overwrite=overwrite or resume)
        trainer = LanguageModelTrainer(
            model,
            config,
            folder,
            text,
            precision,
            identity=identity,
            from_step=0 if checkpoint is None else checkpoint.step,
            progress=progress,
        )
        try:
            validation, curve = trainer.run(checkpoint)
        except (RuntimeError, MemoryError) as error:
            if explained := explain_out_of_memory(error, need):
                raise TrainingFault(explained) from error
            raise
        with trainer.writing("the model"):
            folder.save_model(model, corpus)
        with trainer.writing("the result"):
            folder.finish({**_result(trainer, parameters), "curve": curve, "validation": validation.to_dict()})
    return folder.read_result()


def _result(trainer: LanguageModelTrainer, parameters: dict[str, int]) -> dict[str, Any]:
    """What `result.json` says of a run beside its quality."""
    training, corpus, seconds = trainer.run_config.training, trainer.text.corpus, trainer.clock.seconds
    tokens = training.steps * training.batch_tokens
    return {
        "config": trainer.identity["config"],
        "data": {
            **trainer.identity["data"],
            "folder": os.path.abspath(corpus.folder),
            "epochs": len(trainer.text.order) / len(trainer.text.windows.dataset),  # type: ignore[arg-type]
            "vocab_size": corpus.vocab_size,
        },
        "command": sys.argv,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": training.seed,
        "versions": versions(),
        "hardware": hardware(),
        "device": device_name(trainer.language_model.device),
        "precision": trainer.precision,
        "parameters": parameters,
        "training": {
            "steps": training.steps,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "words_per_s": tokens * words_per_token(corpus.train) / seconds,
        },
    }


def _leave(folder: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"{folder.path} holds a finished run, which is left as it is")
    folder.tidy()
    return folder.read_result()


def _checkpoint(folder: RunFolder, identity: dict[str, Any], say: Callable[[str], None]) -> Checkpoint | None:
    """From where a run goes on, if its folder holds one and the checkpoint is of this very run."""
    checkpoints = Checkpoints(folder.checkpoints)
    for name in checkpoints.remove_incomplete():
        say(f"the checkpoint {name} was not complete and is skipped")
    checkpoint = checkpoints.newest()
    if checkpoint is None:
        if folder.begun:
            say(f"{folder.path} has no checkpoint yet: the run begins again")
        return None
    _require_same_config(
        RunConfig.from_dict(checkpoint.content["config"]), RunConfig.from_dict(identity["config"]), folder
    )
    for what, expected in checkpoint.content["data"].items():
        if identity["data"][what] != expected:
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


def _require_same_config(held: RunConfig, asked: RunConfig, folder: RunFolder) -> None:
    if others := differences(held, asked):
        raise ValueError(
            f"output must hold a run of the same configuration to be resumed; {str(folder.path)!r} differs in (there, "
            f"asked for): {'; '.join(others)}. Its own configuration is {folder.config.name}"
        )


def training_windows(config: RunConfig, corpus: Corpus) -> Windows:
    needed, longest = config.model.context + 1, max(shard.num_tokens for shard in corpus.train.shards)
    if longest < needed:
        raise ValueError(
            f"model.context must be below the {longest} tokens of the training text (its longest shard), "
            f"got {config.model.context}"
        )
    if corpus.validation.num_tokens < 2:
        raise ValueError(f"data must leave at least 2 validation tokens, got {corpus.validation.num_tokens}")
    return Windows(corpus.train, needed)


def _require_space(folder: RunFolder, needed: int) -> None:
    """Room for the checkpoints that are kept, one more that is being written, and the model."""
    held = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    place = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free + held
    if needed > free:
        raise ValueError(
            f"output must have {size_text(needed)} free for checkpoints and the model, {str(folder.path)!r} has "
            f"{size_text(free)}: lower training.keep_checkpoints or the size of the model, or choose another disk"
        )


def _require_one_process() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ValueError(f"WORLD_SIZE must be 1, got {world!r}: training runs in one process, on one device")
