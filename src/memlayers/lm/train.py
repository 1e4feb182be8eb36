"""train: one run, from its configuration to a finished run folder. Read it from top to bottom.

`train` checks and builds, `Loop.run` makes the steps; what it uses lies in start.py (what it must have), build.py
(model, optimizer, loss), checkpoint.py (what is on disk while it runs), metrics.py (where figures go), faults.py (what
stops it), evaluate.py and run.py (the folder).

Several processes make a step together: each reads its share of the windows of each part, and rank 0 alone writes. What
one of them must raise all raise (`memlayers.distributed.processes`).

The loop stands on PyTorch alone. `transformers.Trainer` trains memories, too, but what a run promises (its order of
data, its figures, its checkpoints) would be spread over the private methods of a `Trainer`; and the precision of an
`accelerate.Accelerator` is that of the whole process, which refuses a second run in another one.

Shapes: B windows, T tokens of a window.
"""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import set_seed

from memlayers.checks import ProcessLost
from memlayers.console import announce, keep_silent
from memlayers.distributed.processes import Processes, explain_loss, joined_processes
from memlayers.distributed.statistics import merge_statistics
from memlayers.files import sole_user
from memlayers.hardware import hardware, versions
from memlayers.layer import memory_layers
from memlayers.lm.build import batch_loss, build_model, build_optimizer, build_scheduler, pick_device, resolve_precision
from memlayers.lm.checkpoint import Checkpoint, Checkpoints, TrainingState, random_states
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus
from memlayers.lm.evaluate import ComputePrecision, Evaluation, autocast, device_name, evaluate
from memlayers.lm.faults import (
    Diverged,
    TrainingFault,
    bad_gradient,
    bad_output,
    bad_parameter,
    bad_state,
    rows_are_finite,
)
from memlayers.lm.footprint import explain_out_of_memory, require_memory
from memlayers.lm.metrics import MetricsFile, Progress, TensorBoard, TrainingClock, usage_figures
from memlayers.lm.run import RunFolder
from memlayers.lm.share import number_on, order_of_share, prepared_by_first, replica_of, seed_of_rank, share_of
from memlayers.lm.start import (
    Text,
    checkpoint_to_go_on,
    data_identity,
    first_run,
    require_models_kept,
    require_same_config,
    require_space,
    text_of,
)
from memlayers.lm.tables import begin_tables, place_of
from memlayers.lm.weights import load_weights
from memlayers.ops import cpu
from memlayers.parameters import count_parameters
from memlayers.signals import Stopped, StopRequest, stop_request
from memlayers.usage import UsageMeter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG_ENTRIES = 100  # windows of usage figures and rates that a run leaves in its log, about
FP16_PATIENCE = 50  # bad steps in a row: a loss scaler that halves as often has nothing left to halve


def train(
    config: RunConfig,
    output: str | Path,
    *,
    corpus: Corpus | str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = announce,
) -> dict[str, Any]:
    """Train one model and return what its `result.json` says; `output` becomes a `RunFolder`.

    The order of the data is decided by the configuration's seed and the corpus alone, so that models that are compared
    see the same tokens in the same order.

    Under `torchrun`, or in a group of `torch.distributed`, all processes call it together and train one model; each
    returns the same. A part of a step is that of as many parts of one process, one for each of them. Other numbers of
    processes read the text in the same order.

    Args:
        config: All that decides the result.
        output: The folder of the run.
        corpus: A prepared corpus, or the folder to prepare it in or to take it from. None is the folder `corpus` beside
            `output`.
        overwrite: Replace the run that `output` holds.
        resume: Go on with the run that `output` holds, from its newest checkpoint: with the same losses, rates, order
            of the data and usage figures as if it had never stopped. Begins a run where there is none, and leaves a
            finished one as it is.
        progress: Show bars.
        say: Is told from where a resumed run goes on, where one that was stopped has its checkpoint, and that text is
            seen again.

    Raises:
        ValueError: Before any work, for a configuration that cannot run here (for want of memory or of room on the
            disk, too) or that does not fit the text; for an `output` that holds a run already, unless `overwrite` or
            `resume` is given; for a run of another configuration or on other text; for a checkpoint that is
            damaged or of another version, or that must have been there; for an `output` with files that have the names
            of a run's and are none; and for a step that processes cannot share evenly.
        TrainingFault: A run that has begun cannot go on.
        ProcessLost: Another process ended, so this one cannot go on.
        Stopped: SIGTERM or SIGHUP asked for the end (if nobody else handles them, and in the main thread alone). The
            step is made and a checkpoint of it written before; a second such signal ends the process at once. This is
            a `SystemExit` of the status 128 + signal.
    """
    with joined_processes() as processes:
        if not processes.is_first:
            say, progress = keep_silent, False
        return _train(config, RunFolder(output), corpus, processes, overwrite, resume, progress, say)


def _train(
    config: RunConfig,
    folder: RunFolder,
    corpus: Corpus | str | Path | None,
    processes: Processes,
    overwrite: bool,
    resume: bool,
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    with processes.together():
        device = pick_device()
        precision = resolve_precision(config.training.precision, device)
        share = share_of(config, processes.size)
        folder.check(overwrite=overwrite, resume=resume)
        if overwrite:
            require_models_kept(folder, config)
        if resume and folder.begun:
            require_same_config(folder.read_config(), config, folder)
        first = None
        if config.training.begin_with is not None and not (resume and folder.finished):
            first = first_run(config)
    if processes.first(lambda: resume and folder.finished):

        def leave() -> dict[str, Any]:
            with sole_user(folder.path):
                return _leave(folder, say)

        return processes.first(leave)
    if not isinstance(corpus, Corpus):
        place = folder.path.parent / "corpus" if corpus is None else corpus
        corpus = prepared_by_first(config.data, place, processes, progress=progress)
    with processes.together():
        text = text_of(config, corpus)
        identity = {"config": config.to_dict(), "data": data_identity(config, text, first), "precision": precision}
    if (passes := len(text.order) / len(text.windows)) > 1:
        say(f"training.tokens are {passes:.1f} times the training text of {str(corpus.folder)!r}: text is seen again")
    vocab_size = corpus.vocab_size
    settings: Any = {"precision": precision, "device": device, "processes": number_on(device, processes)}
    need = processes.first(lambda: require_memory(share, vocab_size=vocab_size, **settings))
    processes.first(lambda: require_space(folder, config, need))

    set_seed(config.training.seed)
    model = build_model(config, vocab_size=vocab_size, eot_id=corpus.eot_id, values=place_of(config))
    parameters = count_parameters(model)
    if config.training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
    if config.memory_layers and device.type == "cpu":
        cpu.compile_all()  # before the clock starts: an installation pays for it once

    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_first:
                folder.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(sole_user(folder.path))
        stop = held.enter_context(stop_request())
        if processes.first(lambda: resume and folder.finished):  # by another process, meanwhile
            return processes.first(lambda: _leave(folder, say))
        checkpoint = processes.first(lambda: checkpoint_to_go_on(folder, identity, say) if resume else None)
        if checkpoint is None:
            begin_tables(model, resume=resume)
            processes.first(lambda: folder.start(config, overwrite=overwrite or resume))
            if first is not None:
                with processes.together():
                    load_weights(model, first.model)
        loop = Loop(
            config,
            folder,
            text,
            model,
            precision,
            identity=identity,
            checkpoint=checkpoint,
            stop=stop,
            processes=processes,
        )
        try:
            validation = loop.run(progress=progress)
        except Stopped as stopped:
            say(f"{stopped} after step {loop.step}, of which {folder.checkpoints} has a checkpoint for --resume")
            raise
        except (RuntimeError, MemoryError) as error:
            if lost := explain_loss(error):
                raise ProcessLost(f"{lost}; {loop.kept()}, from which --resume goes on") from error
            if explained := explain_out_of_memory(error, need):
                if not processes.is_first:  # others will not know why
                    announce(explained)
                raise TrainingFault(explained) from error
            raise
        with processes.together():
            if processes.is_first:
                with loop.writing("the model"):
                    folder.save_model(model, corpus)
                with loop.writing("the result"):
                    result = {**_result(loop, parameters), "curve": loop.curve, "validation": validation.to_dict()}
                    folder.finish(result)
        return processes.first(folder.read_result)


class Loop:
    """The steps of one run, from its beginning or from a checkpoint to its end.

    Each step leaves a line in `metrics.jsonl`. A step whose loss or gradients are not finite is not made: it raises
    `TrainingFault` with the step, its windows and what went first.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        text: Text,
        model: "PreTrainedModel",
        precision: ComputePrecision,
        *,
        identity: Mapping[str, Any],
        checkpoint: Checkpoint | None = None,
        stop: StopRequest | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.folder, self.text, self.model, self.precision = config, folder, text, model, precision
        self.identity = identity
        self.processes = Processes() if processes is None else processes
        self.part_windows = config.batch_windows // config.training.accumulate // self.processes.size
        self.optimizer = build_optimizer(config, model)
        self.replica = None if self.processes.ranks is None else replica_of(model)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")
        self.meters = {name: UsageMeter(layer) for name, layer in memory_layers(model).items()}
        self.checkpoints = Checkpoints(folder.checkpoints, config.training.keep_checkpoints)
        self.metrics = MetricsFile(folder.metrics)
        self.clock = TrainingClock()
        self.step = 0  # steps made
        self.curve: list[dict[str, float]] = []  # of all evaluations
        self._window = {"step": 0, "seconds": 0.0, "loss": 0.0}  # where the last usage figures were, losses since
        self._bad_steps = 0  # in a row
        self._checkpoint = checkpoint
        self._stop = StopRequest() if stop is None else stop  # which is false as long as none came

    def run(self, *, progress: bool = True) -> Evaluation:
        """Train to the end, and return the last evaluation."""
        training, model = self.config.training, self.model
        self.step = 0 if self._checkpoint is None else self._checkpoint.step
        self.progress = Progress(training, self.step, shown=progress)
        with contextlib.ExitStack() as stack:
            stack.callback(self.progress.close)
            if self.processes.is_first:
                self.tensorboard = TensorBoard(self.folder.tensorboard, after_step=self.step)
                stack.callback(self.tensorboard.close)
            self._settle_replica()
            for meter in self.meters.values():
                stack.enter_context(meter)
            # Again, so that what training draws does not depend on what the model drew.
            set_seed(seed_of_rank(training.seed, self.processes))
            batches = self._batches()
            if self._checkpoint is not None:
                with self.processes.together():
                    self._restore(self._checkpoint)
            if self._checkpoint is None and (training.begin_with is not None or self.config.base is not None):
                self._show({f"eval_{name}": value for name, value in self._quality(self._evaluate()).items()})
            model.train()
            self.clock.skip()
            while self.step < training.steps:
                loss = self.forward_backward(batches)
                norm = self.checked_norm(loss)
                line = {"step": self.step + 1, "loss": loss, "learning_rate": self.scheduler.get_last_lr()[0]}
                if training.max_grad_norm:
                    dense = [one for group in self.optimizer.param_groups for one in group["params"]]
                    torch.nn.utils.clip_grads_with_norm_(dense, training.max_grad_norm, norm)
                scale = self.scaler.get_scale()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                if self.scaler.get_scale() >= scale:  # else the gradients overflowed, and no step was made
                    self.scheduler.step()
                self.optimizer.zero_grad()
                if self.replica is not None:
                    merge_statistics(model)
                self.step += 1
                evaluation = self.finish_step({**line, "grad_norm": float(norm)})
                # All end that one was asked to end.
                if (number := self.processes.largest(self._stop.number or 0)) and self.step < training.steps:
                    if self.processes.first(self.checkpoints.newest_step) != self.step:
                        self._save()
                    raise Stopped(number)
        with self.processes.together():
            self._require_finite_model()
        assert evaluation is not None, "the last step evaluates"
        return evaluation

    def _settle_replica(self) -> None:
        """Has DDP sort gradients into their buckets, as it does after the first backward pass it sees.

        The order of sums depends on the buckets: a resumed run would not have the bits of one that went on.
        """
        if self.replica is not None:
            self.model.eval()  # which draws nothing, and leaves statistics alone
            tokens_BT = torch.zeros(1, self.config.model.context, dtype=torch.int64, device=self.model.device)
            with autocast(self.model.device, self.precision):
                self._loss(tokens_BT, tokens_BT).backward()
            self.optimizer.zero_grad()

    # A step.

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the steps that are left, each as the tokens that are read and those that are predicted."""
        left = self.text.order[self.step * self.config.batch_windows :]
        own = Subset(self.text.windows, cast(Sequence[int], order_of_share(left, self.part_windows, self.processes)))
        pinned = self.model.device.type == "cuda"
        return iter(DataLoader(own, self.part_windows, collate_fn=_collate, pin_memory=pinned))

    def forward_backward(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Forward and backward of each part of a step; returns the loss of the whole, raises if it is not finite."""
        parts, device = self.config.training.accumulate, self.model.device
        losses, bad = [], None
        for part in range(parts):
            inputs_BT, labels_BT = (tokens_BT.to(device, non_blocking=True) for tokens_BT in next(batches))
            with self._exchange_of_gradients(part == parts - 1):
                with autocast(device, self.precision):
                    loss = self._loss(inputs_BT, labels_BT)
                if bad is None and not bool(torch.isfinite(loss)):
                    bad = inputs_BT, labels_BT, float(loss.detach())
                    if self.replica is None:
                        self._stop_at_loss(*bad)  # else others wait for the gradients of this step
                self.scaler.scale(loss / parts).backward()
            losses.append(loss.detach() / (parts * self.processes.size))
            self.progress.add_part()
        total = torch.zeros((), device=device)
        for loss in torch.stack(self.processes.gather(torch.stack(losses)), 1).flatten():
            total += loss  # in the order of parts and then of ranks, as in one process with as many parts
        mean = float(total)
        if not math.isfinite(mean):
            with self.processes.together():
                if bad is not None:
                    self._stop_at_loss(*bad)
        return mean

    def _loss(self, inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
        if self.replica is not None:
            return self.replica(inputs_BT, labels_BT)
        return batch_loss(self.model, inputs_BT, labels_BT)

    def _exchange_of_gradients(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """That of the last part of a step has the gradients of all parts."""
        return contextlib.nullcontext() if is_last or self.replica is None else self.replica.no_sync()

    def checked_norm(self, loss: float) -> Tensor:
        """Norm of all dense gradients. If it is not finite the run ends; with a loss scaler, after many such steps."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        is_good = not self.processes.any(not (bool(torch.isfinite(norm)) and rows_are_finite(self.model)))
        self._bad_steps = 0 if is_good else self._bad_steps + 1
        if self._bad_steps > (FP16_PATIENCE if self.precision == "fp16" else 0):
            found = next(filter(None, self.processes.gather_objects(bad_gradient(self.model))), None)
            found = found or "the norm of all gradients, each of which is finite"
            raise self._fault(f"the loss is {loss:.6g}, but its gradient is not finite", found)
        return norm

    # After a step: first its figures, then its line, then the checkpoint, which so holds all of them.

    def finish_step(self, line: dict[str, Any]) -> Evaluation | None:
        """Report and save what is due after a step, and return its evaluation if there was one.

        The last step evaluates. It needs no checkpoint: the finished model follows.
        """
        training, evaluation = self.config.training, None
        is_last = self.step == training.steps
        evaluates = is_last or self.step % training.eval_every_steps == 0
        figures_due = evaluates or self.step % max(1, training.steps // LOG_ENTRIES) == 0
        if figures_due and torch.cuda.is_available():
            torch.cuda.synchronize()  # work that is still queued belongs to training
        self.clock.tick()
        self._window["loss"] += line["loss"]
        if figures_due:
            line |= self._figures()
            # TensorBoard and the bar show the mean loss since the last figures, the line has that of the step, too.
            shown = {name: value for name, value in line.items() if name not in ("step", "mean_loss")}
            self._show({**shown, "loss": line["mean_loss"]})
        if evaluates:
            evaluation = self._evaluate()
            figures = {f"eval_{name}": value for name, value in self._quality(evaluation).items()}
            line |= figures
            self._show(figures)
        with self.processes.together(), self.writing(f"the metrics of step {self.step}"):
            if self.processes.is_first:
                self.metrics.append(line)
        if not is_last and self.step % training.save_every_steps == 0:
            self._save()
        self.clock.skip()
        return evaluation

    def _position(self) -> dict[str, float]:
        return {"tokens": self.step * self.config.training.batch_tokens, "seconds": self.clock.seconds}

    def _figures(self) -> dict[str, float]:
        """Mean loss, rates and memory usage since the last such figures."""
        steps = self.step - self._window["step"]
        rate = steps * self.config.training.batch_tokens / (self.clock.seconds - self._window["seconds"])
        figures = {"mean_loss": self._window["loss"] / steps, **self._position()}
        figures |= {"tokens_per_s": rate, "words_per_s": rate * self.text.corpus.train.words_per_token}
        for name, meter in self.meters.items():
            self.processes.sum_([*meter.state_dict().values()])
            figures |= usage_figures(name, meter.report().to_dict())
            meter.reset()
        self._window = {"step": self.step, "seconds": self.clock.seconds, "loss": 0.0}
        return figures

    def _evaluate(self) -> Evaluation:
        """Evaluate on validation text. The meters of training rest meanwhile."""
        for meter in self.meters.values():
            meter.detach()
        evaluation = evaluate(
            self.model,
            self.text.corpus.validation,
            tokens=self.config.training.eval_tokens,
            context=self.config.model.context,
            precision=self.precision,
            # No more than training holds at once: the estimate of memory is of a step.
            batch_windows=min(8, self.part_windows),
            processes=self.processes,
        )
        for meter in self.meters.values():
            meter.attach()
        if not math.isfinite(evaluation.loss):
            found = bad_parameter(self.model) or "the loss of a validation text, by a model that is finite,"
            raise self._not_finite(found)
        quality = {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
        self.curve.append({"step": self.step, **self._position(), **quality})
        return evaluation

    def _quality(self, evaluation: Evaluation) -> dict[str, float]:
        names = ("loss", "perplexity", "perplexity_per_word", "bits_per_byte")
        figures = {name: getattr(evaluation, name) for name in names}
        for name, usage in evaluation.usage.items():
            figures |= usage_figures(name, usage)
        return figures

    def _show(self, figures: Mapping[str, float]) -> None:
        if self.processes.is_first:
            self.tensorboard.add(figures, self.step)
        self.progress.show(figures)

    # What stays when it stops.

    @property
    def _state(self) -> TrainingState:
        keep = self.config.training.keep_checkpoints
        return TrainingState(self.model, self.optimizer, self.scheduler, self.scaler, self.meters, keep)

    def _save(self) -> None:
        for meter in self.meters.values():
            self.processes.sum_([*meter.state_dict().values()])
            if not self.processes.is_first:  # which has the hits of all from here on
                meter.reset()
        draws = self.processes.gather_objects(random_states())
        with self.processes.together():
            if self.processes.is_first:
                self._write_checkpoint(draws)

    def _write_checkpoint(self, draws: list[dict[str, Any]]) -> None:
        self._require_finite_model()
        with self.writing(f"the checkpoint of step {self.step}"):
            content = {
                **self.identity,
                "metrics_bytes": self.metrics.flush(),
                "seconds": self.clock.seconds,
                "window": self._window,
                "curve": self.curve,
            }
            self.checkpoints.write(self.step, content, lambda folder: self._state.save(folder, draws))

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._state.load(checkpoint.folder, self.processes.rank)
        self.clock.seconds = checkpoint.content["seconds"]
        self._window = dict(checkpoint.content["window"])
        self.curve = list(checkpoint.content["curve"])

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn what prevents a file from being written into a `TrainingFault` that says what is kept."""
        try:
            yield
        except Exception as error:  # OSError, and what torch and safetensors make of one
            folder = self.folder.path
            raise TrainingFault(
                f"{what} could not be written to {str(folder)!r}: {error}; "
                f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free there; {self.kept()}"
            ) from error

    # What stops it.

    def _stop_at_loss(self, inputs_BT: Tensor, labels_BT: Tensor, loss: float) -> NoReturn:
        # Statistics are no cause: this very step has moved them.
        found = bad_parameter(self.model, buffers=False)
        with autocast(self.model.device, self.precision):
            found = found or bad_output(self.model, lambda: self.model(input_ids=inputs_BT, use_cache=False))
        raise self._fault(f"the loss is {loss}", found or "the loss itself, from logits that are finite")

    def _require_finite_model(self) -> None:
        if found := bad_parameter(self.model) or bad_state(self.model, self.optimizer):
            raise self._not_finite(found)

    def _not_finite(self, found: str) -> Diverged:
        return Diverged(f"{self._stopped_at(self.step)}: {found} is not finite; {self.kept()}")

    def _fault(self, what: str, first: str) -> Diverged:
        size = self.config.batch_windows
        windows = ", ".join(map(str, self.text.order[self.step * size : (self.step + 1) * size][:8].tolist()))
        batch = f"windows {windows}{', ...' if size > 8 else ''} of the training text"
        return Diverged(
            f"{self._stopped_at(self.step + 1)}: {what}. First not to be finite: {first}. Batch: {batch}. The step was "
            f"not made; {self.kept()}"
        )

    def _stopped_at(self, step: int) -> str:
        return f"stopped at step {step} of {self.config.training.steps}"

    def kept(self) -> str:
        """Which checkpoint there is, in words."""
        step = self.checkpoints.newest_step()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is of step {step}"


def _collate(items: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Windows of T + 1 tokens -> the T that are read and the T that are predicted."""
    window_BT = torch.stack([item["input_ids"] for item in items])
    return window_BT[:, :-1], window_BT[:, 1:]


def _result(loop: Loop, parameters: dict[str, int]) -> dict[str, Any]:
    """What `result.json` says of a run beside its quality."""
    training, text, seconds = loop.config.training, loop.text, loop.clock.seconds
    tokens = training.steps * training.batch_tokens
    return {
        "config": loop.identity["config"],
        "data": {
            **loop.identity["data"],
            "folder": os.path.abspath(text.corpus.folder),
            "epochs": len(text.order) / len(text.windows),
            "vocab_size": text.corpus.vocab_size,
        },
        "command": sys.argv,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": training.seed,
        "versions": versions(),
        "hardware": hardware(),
        "processes": loop.processes.size,
        "device": device_name(loop.model.device),
        "precision": loop.precision,
        "parameters": parameters,
        "training": {
            "steps": training.steps,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "words_per_s": tokens * text.corpus.train.words_per_token / seconds,
        },
    }


def _leave(folder: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"{folder.path} holds a finished run, which is left as it is")
    folder.tidy()
    return folder.read_result()
