"""Speeds of models, measured by themselves: never taken from a training, which may have shared the machine.

Models are built anew, with random weights, and read real text. Those of a group take turns, so that their ratios are
fair where the machine is not quite quiet. What is measured stays in a file, so that whatever ends it costs one group.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from memlayers.config import MemoryConfig
from memlayers.experiments.records import read_fields
from memlayers.files import write_json
from memlayers.hardware import hardware, versions
from memlayers.layer import MemoryLayer
from memlayers.lm.build import build_model
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus
from memlayers.lm.dry_run import first_batch, training_steps
from memlayers.lm.evaluate import ComputePrecision, measure_speed

REPEATS = 5
PATIENCE_S = 60.0  # work that has taken longer in all is not repeated further
LAYER_TOKENS = 2048  # that a layer reads at a time
Group = Mapping[str, RunConfig]
Figures = dict[str, dict[str, Any]]  # by name


class Kept:
    """Figures in a file: what was measured on the same machine, by the same versions, is not measured again.

    Args:
        file: is written after each group.
        settings: what decides the figures beside what is measured.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file = file
        self._content: dict[str, Any] = {**settings, "figures": {}}
        if file.is_file():
            held = read_fields(file) or {}
            if isinstance(held.get("figures"), dict) and {**held, "figures": {}} == self._content:
                self._content = held

    def of(self, names: Collection[str], measure: Callable[[], Figures]) -> Figures:
        """The figures of those names: the ones in the file, or else new ones."""
        figures = self._content["figures"]
        if not figures.keys() >= set(names):
            figures |= measure()
            write_json(self._file, self._content)
        return {name: figures[name] for name in names}


def measure_models(
    groups: Sequence[Group],
    corpus: Corpus,
    device: torch.device,
    precision: ComputePrecision,
    kept: Kept,
    *,
    train: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Prefill, decode and, with `train`, training steps of each model; rates and ratios to the first of its group."""
    models: Figures = {}
    for number, group in enumerate(groups, start=1):
        say(f"measuring speeds, group {number} of {len(groups)}: {', '.join(group)}")
        models |= kept.of(group, partial(_measure_group, group, corpus, device, precision, train))
    return {"models": models, "hardware": hardware(), "versions": versions(), "precision": precision}


def _measure_group(
    group: Group, corpus: Corpus, device: torch.device, precision: ComputePrecision, train: bool
) -> Figures:
    built = {}
    for name, config in group.items():
        set_seed(config.training.seed)
        model = build_model(config, vocab_size=corpus.vocab_size, eot_id=corpus.eot_id)
        built[name] = model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to`
    context = next(iter(group.values())).model.context
    speeds = measure_speed(built, corpus.validation, context=context, precision=precision, repeats=REPEATS)
    found: Figures = {
        name: {
            "prefill_tokens_per_s": speed.prefill_tokens_per_s,
            "prefill_words_per_s": speed.prefill_words_per_s,
            "decode_tokens_per_s": speed.decode_tokens_per_s,
        }
        for name, speed in speeds.items()
    }
    if train:
        steps = {
            name: training_steps(config, built[name], first_batch(config, corpus, corpus.vocab_size), device, precision)
            for name, config in group.items()
        }
        for name, seconds in in_turns({name: partial(next, one) for name, one in steps.items()}).items():
            found[name] |= {
                "step_seconds": seconds,
                "training_tokens_per_s": group[name].training.batch_tokens / seconds,
            }
    first = next(iter(found.values()))
    return {
        name: {**figures, "against": next(iter(found)), "ratios": {k: v / first[k] for k, v in figures.items()}}
        for name, figures in found.items()
    }


def measure_layers(
    configs: Mapping[str, MemoryConfig], device: torch.device, kept: Kept, *, say: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of a forward pass of each layer, and of the feed-forward network of its width in turn with it."""
    layers: Figures = {}
    for name, config in configs.items():
        say(f"measuring {name}")
        layers |= kept.of((name,), partial(_measure_layer, name, config, device))
    return {"layers": layers, "tokens": LAYER_TOKENS, "hardware": hardware(), "versions": versions()}


def _measure_layer(name: str, config: MemoryConfig, device: torch.device) -> Figures:
    torch.manual_seed(0)
    with torch.device(device):
        layer = MemoryLayer(config).eval()
        ffn = nn.Sequential(nn.Linear(config.dim, 4 * config.dim), nn.GELU(), nn.Linear(4 * config.dim, config.dim))
        x_TD = torch.randn(LAYER_TOKENS, config.dim)
    with torch.no_grad():
        seconds = in_turns({"memory": partial(layer, x_TD), "ffn": partial(ffn, x_TD)})
    return {name: {**seconds, "ratio": seconds["memory"] / seconds["ffn"], "slots": config.slots}}


def in_turns(work: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each piece of work, all of which are done in turn; the first round is not counted.

    Rounds end after `PATIENCE_S`, when one is counted: a layer that reads for minutes needs no five repeats.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    started = time.perf_counter()
    for repeat in range(-1, REPEATS):
        if repeat > 0 and time.perf_counter() - started > PATIENCE_S:
            break
        for name, one in work.items():
            begin = time.perf_counter()
            one()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}
