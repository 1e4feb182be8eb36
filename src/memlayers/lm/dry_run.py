"""dry_run: one real step of a run, and what the whole of it will need, in memory, on disk and in time.

Shapes: B windows, T tokens of a window.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlayers.available import available_memory
from memlayers.console import announce
from memlayers.hardware import peak_bytes
from memlayers.lm.build import batch_loss, build_model, build_optimizer, pick_device, resolve_precision
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus
from memlayers.lm.data.windows import Windows
from memlayers.lm.evaluate import ComputePrecision, autocast
from memlayers.lm.footprint import Footprint, require_memory, size_text
from memlayers.lm.tables import lines as lines_of_tables
from memlayers.lm.tables import mapped_tables, place_of
from memlayers.ops import cpu
from memlayers.parameters import count_parameters
from memlayers.presentation import duration_text
from memlayers.storage import MappedFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORWARD = 1 / 3  # of a step's time: backward takes twice as long as forward


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run needs, and what one of its steps did."""

    parameters: dict[str, int]  # by part, and in total
    footprint: Footprint  # bytes of a training step, estimated
    available_memory: int  # bytes that could be had on the device before
    measured_peak: int  # bytes by which two steps raised the most memory that the process has held
    device: str
    precision: ComputePrecision
    real_text: bool  # whether the step read the corpus; else random tokens
    tokens: int  # of the run, in whole steps
    steps: int
    evaluations: int
    evaluation_tokens: int  # of one evaluation, at most
    checkpoints: int
    checkpoint_bytes: int  # of one: parameters and the optimizer's state
    kept_checkpoints: int  # that are on disk at once, at most
    loss: float  # of the step
    step_seconds: float
    training_seconds: float  # estimated, of the whole run
    evaluation_seconds: float  # estimated, of all evaluations
    tables: tuple[tuple[str, str], ...] = ()  # that are not beside the model: names and texts of what they take

    @property
    def tokens_per_s(self) -> float:
        """Training tokens a second, in the step."""
        return self.tokens / self.steps / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON types."""
        return {
            **dataclasses.asdict(self),
            "footprint": self.footprint.to_dict(),
            "tokens_per_s": self.tokens_per_s,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Names and texts, for people."""
        total = self.training_seconds + self.evaluation_seconds
        text = "windows of the corpus" if self.real_text else "random tokens, since no corpus is ready"
        return [
            *((f"{part} parameters", f"{number:,}") for part, number in self.parameters.items()),
            *((f"memory: {name}", size) for name, size in self.footprint.lines()),
            *self.tables,
            ("memory: available", f"{size_text(self.available_memory)} on {self.device}"),
            ("memory: measured", f"{size_text(self.measured_peak)} more at the peak of two steps"),
            ("tokens", f"{self.tokens:,} in {self.steps:,} steps of {self.tokens // self.steps:,}"),
            ("evaluations", f"{self.evaluations:,} of at most {self.evaluation_tokens:,} tokens"),
            (
                "checkpoints",
                f"{self.checkpoints:,} of {size_text(self.checkpoint_bytes)}, {self.kept_checkpoints} kept at once",
            ),
            ("step", f"loss {self.loss:.3f} on {text}, in {self.precision}"),
            ("speed", f"{self.step_seconds:.3g} s a step, {self.tokens_per_s:,.0f} tokens/s"),
            (
                "time",
                f"about {duration_text(total)}: training {duration_text(self.training_seconds)}, evaluations "
                f"{duration_text(self.evaluation_seconds)} (an estimate, from one step)",
            ),
        ]


def dry_run(config: RunConfig, *, corpus: Corpus | None, say: Callable[[str], None] = announce) -> DryRun:
    """Take a step as training would, after one that warms up; nothing stays on disk.

    corpus: a prepared one, or None: the step reads random tokens of `config.data.vocab_size`. `say` is told what is
    being done. Raises `ValueError` before anything is built if the step does not fit into memory, if the precision
    cannot be had here, or if the corpus has too few windows.
    """
    device = pick_device()
    precision = resolve_precision(config.training.precision, device)
    vocab_size = config.data.vocab_size if corpus is None else corpus.vocab_size
    batch_BT = first_batch(config, corpus, vocab_size)
    available = available_memory(device)
    need = require_memory(config, vocab_size=vocab_size, precision=precision, device=device)
    if corpus is None:
        say("no corpus is ready: the step reads random tokens")
    say(f"building the model, which needs about {size_text(need.total)}")
    with torch.random.fork_rng(), ExitStack() as held:
        torch.manual_seed(config.training.seed)
        if config.memory_layers and device.type == "cpu":
            cpu.compile_all()
        before = peak_bytes(device)
        place = place_of(config)
        if config.tables_in_files:  # new ones, which do not stay
            place = MappedFile(held.enter_context(TemporaryDirectory(prefix="memlayers-")))
        model = build_model(config, vocab_size=vocab_size, eot_id=0 if corpus is None else corpus.eot_id, values=place)
        parameters = count_parameters(model)
        steps = training_steps(config, model, batch_BT, device, precision)
        say("two steps: one to warm up, one to measure")
        next(steps)
        start = time.perf_counter()
        loss = next(steps)
        seconds = time.perf_counter() - start
        measured = peak_bytes(device) - before
        for table in mapped_tables(model):
            table.close()
    training = config.training
    every = training.eval_every_steps
    evaluations = math.ceil(training.steps / every)
    evaluation_steps = training.eval_tokens / training.batch_tokens
    return DryRun(
        parameters=parameters,
        footprint=need,
        available_memory=available,
        measured_peak=measured,
        device=str(device),
        precision=precision,
        real_text=corpus is not None,
        tokens=training.steps * training.batch_tokens,
        steps=training.steps,
        evaluations=evaluations,
        evaluation_tokens=training.eval_tokens,
        checkpoints=training.checkpoints,
        checkpoint_bytes=need.saved,
        kept_checkpoints=min(training.keep_checkpoints, training.checkpoints),
        loss=loss,
        step_seconds=seconds,
        training_seconds=seconds * training.steps,
        evaluation_seconds=evaluations * evaluation_steps * seconds * _FORWARD,
        tables=tuple(lines_of_tables(config, need)),
    )


def first_batch(config: RunConfig, corpus: Corpus | None, vocab_size: int) -> Tensor:
    """The tokens of a step [B, T + 1]: the first windows of the corpus, or random ones."""
    length, count = config.model.context + 1, config.batch_windows
    if corpus is None:
        draw = torch.Generator().manual_seed(config.training.seed)
        return torch.randint(vocab_size, (count, length), generator=draw)
    windows = Windows(corpus.train, length)
    return torch.stack([windows[number % len(windows)]["input_ids"] for number in range(count)])


def training_steps(
    config: RunConfig, model: "PreTrainedModel", batch_BT: Tensor, device: torch.device, precision: ComputePrecision
) -> Iterator[float]:
    """The loss of one step after the other, each on the same batch, done when it is given."""
    training = config.training
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
    model.train()
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = build_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    while True:
        losses = []
        for part_BT in batch_BT.chunk(training.accumulate):
            inputs_BT, labels_BT = part_BT[:, :-1].to(device), part_BT[:, 1:].to(device)
            with autocast(device, precision):
                loss = batch_loss(model, inputs_BT, labels_BT) / training.accumulate
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        if training.max_grad_norm:
            dense = [one for group in optimizer.param_groups for one in group["params"]]
            torch.nn.utils.clip_grad_norm_(dense, training.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield float(torch.stack(losses).sum())  # waits for the device
