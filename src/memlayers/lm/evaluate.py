"""How good a language model is (`evaluate`) and how fast it answers (`measure_speed`).

Shapes: B windows in a batch, T tokens of a window, C tokens of the vocabulary.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlayers.distributed.processes import Processes
from memlayers.layer import memory_layers
from memlayers.lm.data import Split
from memlayers.presentation import perplexity
from memlayers.usage import UsageMeter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ComputePrecision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model makes of a text of whole documents.

    Every token but the first, which opens the first document, was predicted exactly once, from up to `context` tokens
    before it. A word is a whitespace-separated one.
    """

    tokens: int  # tokens predicted, and tokens that went through each memory
    words: int  # words of the text
    bytes: int  # UTF-8 bytes of the text
    nll: float  # negative log likelihood of all predictions, in nats
    usage: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each memory, as `UsageReport.to_dict` gives it

    @property
    def loss(self) -> float:
        """Negative log likelihood per token, in nats."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token of this vocabulary."""
        return perplexity(self.nll / self.tokens)

    @property
    def perplexity_per_word(self) -> float:
        """exp(total negative log likelihood / words): comparable between vocabularies."""
        return perplexity(self.nll / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Negative log likelihood in bits, per byte of UTF-8 text."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON types; a perplexity per word that is no finite number is None.

        That of a text whose words are not separated, such as Chinese, is beyond what a float can hold.
        """
        per_word = self.perplexity_per_word
        return {
            **dataclasses.asdict(self),
            "loss": self.loss,
            "perplexity": self.perplexity,
            "perplexity_per_word": per_word if math.isfinite(per_word) else None,
            "bits_per_byte": self.bits_per_byte,
        }


def evaluate(
    model: "PreTrainedModel",
    split: Split,
    *,
    tokens: int,
    context: int,
    precision: ComputePrecision = "fp32",
    batch_windows: int = 8,
    processes: Processes | None = None,
) -> Evaluation:
    """Evaluate on the longest prefix of whole documents of `split` with at most `tokens` tokens.

    Windows of `context + 1` tokens with a stride of `context`: the last token of one is the first of the next, so that
    it is first predicted and then read. Raises `ValueError` if there is nothing to predict.

    Several `processes` take turns in reading batches, and each returns what one alone would, usage but for the order of
    its sums.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, got {tokens}")
    text = split.prefix(tokens)
    if text.num_tokens < 2:
        raise ValueError(f"split must have at least 2 tokens, got {text.num_tokens}")
    device = next(model.parameters()).device
    processes = Processes() if processes is None else processes
    batches = math.ceil((text.num_tokens - 1) / (context * batch_windows)) + 1  # at most: the rest is a batch, too
    nll_N = torch.zeros(-(-batches // processes.size), dtype=torch.float64, device=device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_inference(model, precision))
        meters = {name: stack.enter_context(UsageMeter(layer)) for name, layer in memory_layers(model).items()}
        windows = _windows(text.tokens, context, batch_windows)
        for number, window_BT in enumerate(itertools.islice(windows, processes.rank, None, processes.size)):
            ids_BT = torch.from_numpy(window_BT).to(device)
            logits_BTC = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
            nll_N[number] = sum_nll(logits_BTC, ids_BT[:, 1:])
        # Summed one by one in the order of the text, so that there is one figure for any number of processes.
        nll = functools.reduce(operator.add, torch.stack(processes.gather(nll_N), 1).flatten().tolist())
        for meter in meters.values():
            processes.sum_([*meter.state_dict().values()])
        reports = {name: meter.report().to_dict() for name, meter in meters.items()}
    # Lists, so that what is written to a file and read again is equal.
    usage = {name: {**report, "heads": list(report["heads"])} for name, report in reports.items()}
    return Evaluation(tokens=text.num_tokens - 1, words=text.num_words, bytes=text.num_bytes, nll=nll, usage=usage)


def sum_nll(logits_BTC: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log likelihood of the targets, summed; computed in float32 whatever the model computes in."""
    return F.cross_entropy(logits_BTC.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Inference speed of one model; figures compare only with those of the same `measure_speed` call."""

    prefill_words_per_s: float  # words read a second: full windows, all logits, no cache
    prefill_tokens_per_s: float  # tokens read a second, in the same windows
    decode_tokens_per_s: float  # tokens written a second, one text, KV cache, the reading of the prompt included
    batch_windows: int  # windows read at a time
    context: int  # tokens of a window
    prompt_tokens: int  # tokens of the prompt in decoding
    new_tokens: int  # tokens written in decoding
    repeats: int  # medians are over so many runs of each model, interleaved
    device: str  # "cpu" or the name of the GPU
    threads: int  # CPU threads of PyTorch
    precision: str  # fp32, bf16 or fp16

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON types."""
        return dataclasses.asdict(self)


def measure_speed(
    models: "Mapping[str, PreTrainedModel]",
    split: Split,
    *,
    context: int,
    precision: ComputePrecision = "fp32",
    batch_windows: int = 8,
    new_tokens: int = 64,
    repeats: int = 5,
) -> dict[str, Speed]:
    """Measure models side by side: one run of each in turn, `repeats` times, so that ratios are fair on a busy machine.

    Reading (prefill) is measured on windows of real text from `split`, so that memories see real queries; writing
    (decoding) greedily from a short prompt with a batch of one. Raises `ValueError` if `split` is shorter than a
    window.
    """
    if split.num_tokens < context:
        raise ValueError(f"split must have at least context = {context} tokens, got {split.num_tokens}")
    batch_windows = min(batch_windows, split.num_tokens // context)
    new_tokens = min(new_tokens, context // 2)
    if new_tokens < 1 or repeats < 1:
        raise ValueError(f"new_tokens and repeats must be at least 1, got {new_tokens} and {repeats}")
    prompt_tokens = min(16, context - new_tokens)
    text_BT = torch.from_numpy(np.asarray(split.tokens[: batch_windows * context], dtype=np.int64)).view(-1, context)
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-1, repeats):  # the first round warms up and is not counted
        for name, model in models.items():
            device = next(model.parameters()).device
            ids_BT = text_BT.to(device)
            with _inference(model, precision):
                start = _now(device)
                model(input_ids=ids_BT, use_cache=False)
                read = _now(device) - start
                prompt = ids_BT[:1, :prompt_tokens]
                start = _now(device)
                _decode(model, prompt, new_tokens)
                written = _now(device) - start
            if repeat >= 0:
                prefill[name].append(read)
                decode[name].append(written)
    speeds = {}
    for name, model in models.items():
        tokens_per_s = batch_windows * context / statistics.median(prefill[name])
        speeds[name] = Speed(
            prefill_words_per_s=tokens_per_s * split.words_per_token,
            prefill_tokens_per_s=tokens_per_s,
            decode_tokens_per_s=new_tokens / statistics.median(decode[name]),
            batch_windows=batch_windows,
            context=context,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            device=device_name(next(model.parameters()).device),
            threads=torch.get_num_threads(),
            precision=precision,
        )
    return speeds


def device_name(device: torch.device) -> str:
    """The name of a GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast(device: torch.device, precision: ComputePrecision) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model of float32 weights computes in `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


@contextlib.contextmanager
def _inference(model: nn.Module, precision: ComputePrecision) -> Iterator[None]:
    """Evaluation mode, without gradients, in `precision`; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(next(model.parameters()).device, precision):
            yield
    finally:
        model.train(training)


def _windows(tokens: np.ndarray, context: int, batch_windows: int) -> Iterator[np.ndarray]:
    """Batches [B, context + 1] of int64 in which every token but the first is a target once; a shorter one last."""
    full = (len(tokens) - 1) // context
    for first in range(0, full, batch_windows):
        last = min(first + batch_windows, full)
        flat = np.asarray(tokens[first * context : last * context + 1], dtype=np.int64)
        yield np.lib.stride_tricks.sliding_window_view(flat, context + 1)[::context].copy()
    rest = np.asarray(tokens[full * context :], dtype=np.int64)
    if len(rest) > 1:
        yield rest[None]


def _decode(model: "PreTrainedModel", prompt: Tensor, new_tokens: int) -> None:
    model.generate(  # type: ignore[operator]  # transformers mixes it in at run time
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
