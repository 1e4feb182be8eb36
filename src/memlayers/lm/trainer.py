"""LanguageModelTrainer: `transformers.Trainer` with this project's optimizer, figures, checks and checkpoints.

It stands on `Trainer` rather than on Accelerate, because `Trainer` already brings what a loop of our own on Accelerate
would have to repeat (mixed precision, accumulation, scheduler, callbacks, progress, resuming), and because it is the
loop that most users of a memory have: what is tested here works there.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from memlayers.layer import memory_layers
from memlayers.lm.build import batch_loss, build_optimizer
from memlayers.lm.checkpoint import Checkpoint, Checkpoints
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus, Split
from memlayers.lm.evaluate import ComputePrecision, Evaluation, evaluate
from memlayers.lm.faults import TrainingFault, bad_gradient, bad_output, bad_parameter, bad_state, rows_are_finite
from memlayers.lm.metrics import MetricsFile
from memlayers.lm.run import RunFolder, without_bars
from memlayers.usage import UsageMeter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG_ENTRIES = 100  # windows of usage figures and rates that a run leaves in its log, about
FP16_PATIENCE = 50  # bad steps in a row: a loss scaler that halves as often has nothing left to halve
USAGE = "usage.safetensors"
OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"  # as `Trainer` names them


class Text(NamedTuple):
    """What a run reads: the windows of its corpus, and in which order."""

    corpus: Corpus
    windows: Subset[dict[str, torch.Tensor]]
    order: np.ndarray


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


class LanguageModelTrainer(Trainer):
    """Trains one run to its end, from its beginning or from a checkpoint.

    Each step leaves a line in `metrics.jsonl`. A step whose loss or gradients are not finite is not made: it raises
    `TrainingFault` with the step, its windows and what went first.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        config: RunConfig,
        folder: RunFolder,
        text: Text,
        precision: ComputePrecision,
        *,
        identity: Mapping[str, Any],
        from_step: int = 0,
        progress: bool = True,
    ) -> None:
        self.language_model = model
        self.run_config = config
        self.text = text
        self.precision = precision
        self.identity = identity
        self.clock = TrainingClock()
        self.checkpoints = Checkpoints(folder.checkpoints, config.training.keep_checkpoints)
        self.metrics = MetricsFile(folder.metrics)
        self.meters = {name: UsageMeter(layer) for name, layer in memory_layers(model).items()}
        self.curve: list[dict[str, float]] = []
        self.latest: Evaluation | None = None
        self._step_loss = torch.zeros((), device=model.device)
        self._bad_steps = 0  # in a row
        self._line: dict[str, Any] | None = None  # of the step that was made last, until it is written
        self._window = {"step": 0, "seconds": 0.0, "loss": 0.0}  # where the last usage figures were, losses since
        training = config.training
        self._tensorboard = _event_writer(folder, from_step)
        self._optimizer = build_optimizer(config, model)
        self._scheduler = get_scheduler(
            "constant_with_warmup" if training.schedule == "constant" else training.schedule,
            self._optimizer,
            num_warmup_steps=training.warmup_steps,
            num_training_steps=training.steps,
        )
        super().__init__(
            model=model,
            args=_training_arguments(config, folder, precision),
            train_dataset=text.windows,
            data_collator=_collate,
            optimizers=(self._optimizer, self._scheduler),
            callbacks=[_Rhythm(self.clock, config), TensorBoardCallback(self._tensorboard)],
        )
        self.remove_callback(PrinterCallback)
        self._progress = _Progress(config)
        if progress:
            self.add_callback(self._progress)
        self.loss_is_scaled_for_ga = False  # `compute_loss` gives the mean of its batch

    def run(self, checkpoint: Checkpoint | None = None) -> tuple[Evaluation, list[dict[str, float]]]:
        """Train to the end; the last evaluation, and all of them as a curve."""
        if checkpoint is not None:
            self._restore(checkpoint)
        with contextlib.ExitStack() as stack:
            stack.callback(self._progress.close)
            stack.callback(self._tensorboard.close)
            for meter in self.meters.values():
                stack.enter_context(meter)
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
        self._require_finite_model()
        self.language_model.config.use_cache = True  # `Trainer` turns it off, and `save_pretrained` would keep that
        assert self.latest is not None, "the last step evaluates"
        return self.latest, self.curve

    # A step.

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean negative log likelihood in float32, of all positions; stops the run if it is not finite."""
        loss, logits_BTC = batch_loss(model, inputs["input_ids"], inputs["labels"])
        if not bool(torch.isfinite(loss)):
            self._stop_at_loss(model, inputs, float(loss.detach()))
        return (loss, {"logits": logits_BTC}) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one part of a step."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss += loss
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        norm = self._checked_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = self._checked_norm(model) if grad_norm is None else grad_norm
        self._line = {
            "step": self.state.global_step + 1,
            "loss": float(self._step_loss),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
        }
        self._window["loss"] += self._line["loss"]
        self._step_loss.zero_()
        return norm

    def _checked_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Norm of all dense gradients. If it is not finite the run ends; with a loss scaler, after many such steps."""
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        is_good = bool(torch.isfinite(norm)) and rows_are_finite(self.language_model)
        self._bad_steps = 0 if is_good else self._bad_steps + 1
        if self._bad_steps > (FP16_PATIENCE if self.precision == "fp16" else 0):
            found = bad_gradient(self.language_model) or "the norm of all gradients, each of which is finite"
            raise self._fault(f"the loss is {float(self._step_loss):.6g}, but its gradient is not finite", found)
        return norm

    # What is reported.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._figures()
        super().log(logs, start_time)
        if self._line is not None:
            # The step's own loss, rate and norm stay; the mean since the last figures is beside them.
            self._line |= {{"loss": "mean_loss"}.get(name, name): value for name, value in logs.items()} | {
                name: self._line[name] for name in ("learning_rate", "grad_norm")
            }
        self.clock.skip()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on validation text. The meters of training rest meanwhile."""
        for meter in self.meters.values():
            meter.detach()
        self.latest = evaluate(
            self.language_model,
            self.text.corpus.validation,
            tokens=self.run_config.training.eval_tokens,
            context=self.run_config.model.context,
            precision=self.precision,
            # No more than training holds at once: the estimate of memory is of a step.
            batch_windows=min(8, self.run_config.batch_windows // self.run_config.training.accumulate),
        )
        for meter in self.meters.values():
            meter.attach()
        if not math.isfinite(self.latest.loss):
            found = bad_parameter(self.language_model) or "the loss of a validation text, by a model that is finite,"
            raise TrainingFault(f"{self._where(self.state.global_step)}: {found} is not finite; {self._kept()}")
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
        """Loss, rates and memory usage since the last such figures."""
        steps = self.state.global_step - self._window["step"]
        rate = steps * self.run_config.training.batch_tokens / (self.clock.seconds - self._window["seconds"])
        figures = self._position() | {"loss": self._window["loss"] / steps}
        figures |= {"tokens_per_s": rate, "words_per_s": rate * words_per_token(self.text.corpus.train)}
        for name, meter in self.meters.items():
            figures |= _usage_entries("", name, meter.report().to_dict())
            meter.reset()
        self._window = {"step": self.state.global_step, "seconds": self.clock.seconds, "loss": 0.0}
        return figures

    # What stays when it stops.

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """First the figures of the step, then its line, then the checkpoint, which so holds all of them."""
        is_due, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._line is not None:
            with self.writing(f"the metrics of step {self.state.global_step}"):
                self.metrics.append(self._line)
            self._line = None
        if is_due:
            self._save_checkpoint(self.language_model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.clock.skip()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._require_finite_model()
        step = self.state.global_step
        with self.writing(f"the checkpoint of step {step}"):
            content = {
                **self.identity,
                "metrics_bytes": self.metrics.flush(),
                "seconds": self.clock.seconds,
                "window": self._window,
                "curve": self.curve,
            }
            self.checkpoints.write(step, content, self._write_state)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turns what prevents a file from being written into a `TrainingFault` that says what is kept."""
        try:
            yield
        except Exception as error:  # OSError, and what torch and safetensors make of one
            folder = self.metrics.path.parent
            raise TrainingFault(
                f"{what} could not be written to {str(folder)!r}: {error}; "
                f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free there; {self._kept()}"
            ) from error

    def _write_state(self, folder: Path) -> None:
        with without_bars():
            self.language_model.save_pretrained(folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / STATE))
        totals = {f"{name}/{part}": t for name, meter in self.meters.items() for part, t in meter.state_dict().items()}
        save_file(totals, folder / USAGE)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """What is ours; model, optimizer, scheduler and random state are left to `Trainer`."""
        content = checkpoint.content
        self.clock.seconds = content["seconds"]
        self._window = dict(content["window"])
        self.curve = list(content["curve"])
        totals = load_file(checkpoint.folder / USAGE)
        for name, meter in self.meters.items():
            prefix = f"{name}/"
            meter.load_state_dict({key.removeprefix(prefix): t for key, t in totals.items() if key.startswith(prefix)})

    # From the disk straight into place (files are mapped): a second copy of a table or of its moments may not fit.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
            if file.name != USAGE:
                weights |= load_file(file)
        held = self.language_model.state_dict(keep_vars=True)
        result = self.language_model.load_state_dict(weights, strict=False)
        loaded = {id(held[name]) for name in weights if name in held}
        missing = [name for name in result.missing_keys if id(held[name]) not in loaded]  # tied ones are stored once
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{resume_from_checkpoint} is not of this model: missing {missing}, unknown {result.unexpected_keys}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = torch.load(Path(checkpoint, OPTIMIZER), map_location="cpu", weights_only=True, mmap=True)
        mapped = {value.data_ptr() for state in saved["state"].values() for value in _tensors(state)}
        self._optimizer.load_state_dict(saved)
        for state in self._optimizer.state.values():
            for name, value in state.items():  # what was taken over as it is must not stay a file
                if isinstance(value, torch.Tensor) and value.data_ptr() in mapped:
                    state[name] = value.clone()
        self._scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER), weights_only=True))

    # What stops it.

    def _stop_at_loss(self, model: torch.nn.Module, inputs: dict[str, Any], loss: float) -> None:
        # Statistics are no cause: this very step has moved them.
        found = bad_parameter(self.language_model, buffers=False) or bad_output(
            self.language_model, lambda: batch_loss(model, inputs["input_ids"], inputs["labels"])
        )
        raise self._fault(f"the loss is {loss}", found or "the loss itself, from logits that are finite")

    def _require_finite_model(self) -> None:
        found = bad_parameter(self.language_model) or bad_state(self.language_model, self._optimizer)
        if found is not None:
            raise TrainingFault(f"{self._where(self.state.global_step)}: {found} is not finite; {self._kept()}")

    def _fault(self, what: str, first: str) -> TrainingFault:
        step, size = self.state.global_step, self.run_config.batch_windows
        windows = ", ".join(map(str, self.text.order[step * size : (step + 1) * size][:8].tolist()))
        batch = f"windows {windows}{', ...' if size > 8 else ''} of the training text"
        return TrainingFault(
            f"{self._where(step + 1)}: {what}. First not to be finite: {first}. Batch: {batch}. The step was not made; "
            f"{self._kept()}"
        )

    def _where(self, step: int) -> str:
        return f"stopped at step {step} of {self.run_config.training.steps}"

    def _kept(self) -> str:
        step = self.checkpoints.newest_step()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is of step {step}"


class _Rhythm(TrainerCallback):
    """Runs the clock and decides after which steps to log, to evaluate and to save.

    The last step logs and evaluates. It needs no checkpoint: the finished model follows.
    """

    def __init__(self, clock: TrainingClock, config: RunConfig) -> None:
        self.clock = clock
        self.log_every = max(1, config.training.steps // LOG_ENTRIES)
        self.eval_every = config.training.eval_every_steps
        self.save_every = config.training.save_every_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.skip()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_evaluate = last or state.global_step % self.eval_every == 0
        control.should_log = control.should_evaluate or state.global_step % self.log_every == 0
        control.should_save = not last and state.global_step % self.save_every == 0
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # work that is still queued belongs to training
        self.clock.tick()


class _Progress(TrainerCallback):
    """A bar of tokens, with their rate, the time that is left, and the latest figures."""

    def __init__(self, config: RunConfig) -> None:
        self.step_tokens = config.training.batch_tokens
        self.part_tokens = self.step_tokens // config.training.accumulate
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        done, total = (steps * self.step_tokens for steps in (state.global_step, state.max_steps))
        self._bar = tqdm(desc="training", total=total, initial=done, unit=" tokens", unit_scale=True, mininterval=0.5)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self.part_tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self.part_tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, shown in (("loss", "loss"), ("eval_perplexity", "validation perplexity")):
            if name in logs:
                self._shown[shown] = f"{logs[name]:.4g}"
        self._bar.set_postfix(self._shown)

    def close(self) -> None:
        """Leave the bar as it stands, whatever ended the training."""
        if self._bar is not None:
            self._bar.close()


def words_per_token(split: Split) -> float:
    return split.num_words / split.num_tokens


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


def _event_writer(folder: RunFolder, from_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    # What a killed process wrote after its last checkpoint is written again.
    return SummaryWriter(str(folder.tensorboard), purge_step=from_step + 1 if from_step else None)


def _usage_entries(prefix: str, name: str, usage: Mapping[str, Any]) -> dict[str, float]:
    overall = usage["overall"]
    return {f"{prefix}{figure}/{name}": overall[figure] for figure in ("usage", "kl", "top1_usage")}


def _tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]
