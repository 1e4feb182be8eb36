"""Training of one run, from its configuration to a finished run folder.

It stands on `transformers.Trainer` rather than on Accelerate, because `Trainer` already brings what a loop of our own
on Accelerate would have to repeat (mixed precision, clipping, scheduler, callbacks, progress and, later, checkpoints),
and because it is the loop that most users of a memory have: what is tested here works there.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, get_scheduler, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from memlayers.files import write_json
from memlayers.info import count_parameters, hardware, versions
from memlayers.lm.build import batch_loss, build_model, build_optimizer, pick_device, resolve_precision
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus, Split, Windows, prepare
from memlayers.lm.evaluate import ComputePrecision, Evaluation, device_name, evaluate
from memlayers.lm.run import RunFolder
from memlayers.models import memory_layers
from memlayers.ops import cpu
from memlayers.usage import UsageMeter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG_ENTRIES = 100  # training lines that a run leaves in its log, about


def train(
    config: RunConfig,
    output: str | Path,
    *,
    corpus: Corpus | str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one model and return what its `result.json` says; `output` becomes a `RunFolder`.

    `corpus` is a prepared corpus or the folder to prepare it in or to take it from; None: the folder `corpus` beside
    `output`. The order of the data is decided by the configuration's seed and the corpus alone, so that models that
    are compared see the same tokens in the same order.

    Raises `ValueError` before any work for a configuration that cannot run here or that does not fit the text, and for
    an `output` that holds a run already, unless `overwrite` says that it may go.
    """
    folder = RunFolder(output)
    device = pick_device()
    precision = resolve_precision(config.training.precision, device)
    _require_one_process()
    folder.check(overwrite=overwrite)
    if not isinstance(corpus, Corpus):
        corpus = prepare(config.data, folder.path.parent / "corpus" if corpus is None else corpus, progress=progress)
    windows = _training_windows(config, corpus)
    order = training_order(len(windows), config.training.steps * config.batch_windows, config.training.seed)
    set_seed(config.training.seed)
    model = build_model(config, vocab_size=corpus.vocab_size, eot_id=corpus.eot_id)
    parameters = count_parameters(model)
    if config.training.gradient_checkpointing:
        model.activation_checkpointing_enable()

    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
    if config.memory_layers and device.type == "cpu":
        cpu.compile_all()  # before the clock starts: an installation pays for it once
    folder.start(config, overwrite=overwrite)
    trainer = _LanguageModelTrainer(
        model, config, folder, Subset(windows, cast(Sequence[int], order)), corpus, precision, progress
    )
    validation, log = trainer.run()
    folder.save_model(model, corpus.tokenizer())
    tokens = config.training.steps * config.training.batch_tokens
    result = {
        "config": config.to_dict(),
        "command": sys.argv,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.training.seed,
        "versions": versions(),
        "hardware": hardware(),
        "device": device_name(device),
        "precision": precision,
        "data": {
            "folder": os.path.abspath(corpus.folder),
            "corpus_sha256": corpus.manifest["corpus_sha256"],
            "tokenizer_sha256": corpus.manifest["tokenizer"]["sha256"],
            "order_sha256": hashlib.sha256(order.tobytes()).hexdigest(),
            "epochs": len(order) / len(windows),
            "vocab_size": corpus.vocab_size,
        },
        "parameters": parameters,
        "training": {
            "steps": config.training.steps,
            "tokens": tokens,
            "seconds": trainer.clock.seconds,
            "tokens_per_s": tokens / trainer.clock.seconds,
            "words_per_s": tokens * _words_per_token(corpus.train) / trainer.clock.seconds,
        },
        "curve": log,
        "validation": validation.to_dict(),
    }
    write_json(folder.result, result)
    return result


def training_order(windows: int, count: int, seed: int) -> np.ndarray:
    """Which windows a run sees, in order: int64 [count], one shuffled pass over all windows after the other."""
    passes = math.ceil(count / windows)
    order = [np.random.default_rng([seed, index]).permutation(windows) for index in range(passes)]
    return np.concatenate(order)[:count]


class TrainingClock:
    """Seconds spent on training: what passes between marks counts, unless it is skipped."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mark = time.perf_counter()

    def tick(self) -> None:
        """Count the time since the last mark."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Leave out the time since the last mark."""
        self._mark = time.perf_counter()


class _LanguageModelTrainer(Trainer):
    """`Trainer` with our optimizer, our exact evaluation, and the figures that this project reports."""

    def __init__(
        self,
        model: "PreTrainedModel",
        config: RunConfig,
        folder: RunFolder,
        windows: Subset[dict[str, torch.Tensor]],
        corpus: Corpus,
        precision: ComputePrecision,
        progress: bool,
    ) -> None:
        self.language_model = model
        self.run_config = config
        self.corpus = corpus
        self.precision = precision
        self.clock = TrainingClock()
        self.meters = {name: UsageMeter(layer) for name, layer in memory_layers(model).items()}
        self.curve: list[dict[str, float]] = []
        self.latest: Evaluation | None = None
        self._logged_step, self._logged_seconds = 0, 0.0
        training = config.training
        optimizer = build_optimizer(config, model)
        scheduler = get_scheduler(
            "constant_with_warmup" if training.schedule == "constant" else training.schedule,
            optimizer,
            num_warmup_steps=training.warmup_steps,
            num_training_steps=training.steps,
        )
        super().__init__(
            model=model,
            args=_training_arguments(config, folder, precision),
            train_dataset=windows,
            data_collator=_collate,
            optimizers=(optimizer, scheduler),
            callbacks=[_Rhythm(self.clock, config), _MetricsFile(folder.metrics), _tensorboard(folder)],
        )
        # Ours; or nothing where the bar is not wanted.
        self.remove_callback(PrinterCallback)
        if progress:
            self.add_callback(_Progress())
        self.loss_is_scaled_for_ga = False  # `compute_loss` gives the mean of its batch

    def run(self) -> tuple[Evaluation, list[dict[str, float]]]:
        """Train to the end; the last evaluation, and all of them as a curve."""
        with contextlib.ExitStack() as stack:
            for meter in self.meters.values():
                stack.enter_context(meter)
            self.train()
        self.language_model.config.use_cache = True  # `Trainer` turns it off, and `save_pretrained` would keep that
        assert self.latest is not None, "the last step evaluates"
        return self.latest, self.curve

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, logits_BTC = batch_loss(model, inputs["input_ids"], inputs["labels"])
        return (loss, {"logits": logits_BTC}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._figures())
        super().log(logs, start_time)
        self.clock.skip()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on validation text. The meters of training rest meanwhile."""
        for meter in self.meters.values():
            meter.detach()
        self.latest = evaluate(
            self.language_model,
            self.corpus.validation,
            tokens=self.run_config.training.eval_tokens,
            context=self.run_config.model.context,
            precision=self.precision,
        )
        for meter in self.meters.values():
            meter.attach()
        figures = {"loss": self.latest.loss, "perplexity": self.latest.perplexity}
        self.curve.append({"step": self.state.global_step, **self._position(), **figures})
        metrics = {f"eval_{name}": value for name, value in figures.items()} | self._position()
        metrics["eval_perplexity_per_word"] = self.latest.perplexity_per_word
        metrics["eval_bits_per_byte"] = self.latest.bits_per_byte
        for name, usage in self.latest.usage.items():
            metrics |= _usage_entries("eval_", name, usage)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _position(self) -> dict[str, float]:
        tokens = self.state.global_step * self.run_config.training.batch_tokens
        return {"tokens": tokens, "seconds": self.clock.seconds}

    def _figures(self) -> dict[str, float]:
        """Rates and memory usage since the last log entry."""
        tokens = (self.state.global_step - self._logged_step) * self.run_config.training.batch_tokens
        rate = tokens / (self.clock.seconds - self._logged_seconds)
        self._logged_step, self._logged_seconds = self.state.global_step, self.clock.seconds
        figures = self._position()
        figures |= {"tokens_per_s": rate, "words_per_s": rate * _words_per_token(self.corpus.train)}
        for name, meter in self.meters.items():
            figures |= _usage_entries("", name, meter.report().to_dict())
            meter.reset()
        return figures


class _Rhythm(TrainerCallback):
    """Runs the clock and decides at which steps to log and to evaluate; both happen at the last step."""

    def __init__(self, clock: TrainingClock, config: RunConfig) -> None:
        self.clock = clock
        self.log_every = max(1, config.training.steps // LOG_ENTRIES)
        self.eval_every = config.training.eval_every_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.skip()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_evaluate = last or state.global_step % self.eval_every == 0
        control.should_log = control.should_evaluate or state.global_step % self.log_every == 0
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # work that is still queued belongs to training
        self.clock.tick()


class _MetricsFile(TrainerCallback):
    """Appends what is logged to a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and ("loss" in logs or "eval_loss" in logs):  # not the trainer's closing summary
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class _Progress(ProgressCallback):
    """The trainer's bar, with the latest figures in it instead of a line of text for each log entry."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, shown in (
            ("loss", "loss"),
            ("eval_perplexity", "validation perplexity"),
            ("tokens_per_s", "tokens/s"),
        ):
            if name in logs:
                self._shown[shown] = f"{logs[name]:.4g}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)


def _training_arguments(config: RunConfig, folder: RunFolder, precision: ComputePrecision) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder.path),
        max_steps=config.training.steps,
        per_device_train_batch_size=config.batch_windows // config.training.accumulate,
        gradient_accumulation_steps=config.training.accumulate,
        train_sampling_strategy="sequential",  # the dataset is in its order already
        max_grad_norm=config.training.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        seed=config.training.seed,
        logging_strategy="no",  # `_Rhythm` decides
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,  # it would report the last good loss in place of a NaN
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # else Trainer spreads the model over all GPUs by DataParallel
    return arguments


def _collate(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Windows of T + 1 tokens -> the T that are read and the T that are predicted."""
    window_BT = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": window_BT[:, :-1], "labels": window_BT[:, 1:]}


def _tensorboard(folder: RunFolder) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    return TensorBoardCallback(SummaryWriter(str(folder.tensorboard)))


def _training_windows(config: RunConfig, corpus: Corpus) -> Windows:
    needed = config.model.context + 1
    if corpus.train.num_tokens < needed:
        raise ValueError(
            f"model.context must be below the {corpus.train.num_tokens} tokens of the training text, "
            f"got {config.model.context}"
        )
    if corpus.validation.num_tokens < 2:
        raise ValueError(f"data must leave at least 2 validation tokens, got {corpus.validation.num_tokens}")
    return Windows(corpus.train, needed)


def _require_one_process() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ValueError(f"WORLD_SIZE must be 1, got {world!r}: training runs in one process, on one device")


def _usage_entries(prefix: str, name: str, usage: Mapping[str, Any]) -> dict[str, float]:
    overall = usage["overall"]
    return {f"{prefix}{figure}/{name}": overall[figure] for figure in ("usage", "kl", "top1_usage")}


def _words_per_token(split: Split) -> float:
    return split.num_words / split.num_tokens
