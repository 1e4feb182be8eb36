"""reproduce: one experiment, from its checks to its report. Read it from top to bottom."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memlayers.experiments.experiment import Experiment, Run
from memlayers.experiments.grid import run_grid
from memlayers.experiments.records import GridFolder, Identity, Record
from memlayers.experiments.registry import experiment as experiment_named
from memlayers.experiments.scales import Scale, changed
from memlayers.experiments.scales import scale as scale_named
from memlayers.experiments.speeds import Kept, measure_layers, measure_models
from memlayers.experiments.work import run_work
from memlayers.experiments.write_up import write_report
from memlayers.files import sole_user, write_json
from memlayers.hardware import hardware, versions
from memlayers.lm.build import build_model, pick_device, resolve_precision
from memlayers.lm.config import RunConfig
from memlayers.lm.data import MANIFEST, Corpus, DataConfig, open_corpus, prepare
from memlayers.lm.footprint import footprint, require_memory
from memlayers.lm.run import check_output
from memlayers.lm.start import training_windows
from memlayers.parameters import count_parameters
from memlayers.presentation import duration_text, markdown_table
from memlayers.sizes import size_text


def reproduce(
    name: str,
    output: str | Path,
    *,
    scale: str = "laptop",
    corpus: Corpus | str | Path | None = None,
    jobs: int | None = None,
    keep_models: bool = False,
    report_only: bool = False,
    measure_speed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run what is left of an experiment, and report. Returns what its `report.json` says.

    Whatever ends it, calling it once more goes on where it was, in the middle of a run too. Experiments that share a
    folder share the runs that they have in common.

    Args:
        name: The experiment.
        output: The folder of all experiments on one text; the report goes to the folder of that name in it.
        scale: Which sizes and budgets: "laptop", "gpu" or "paper".
        corpus: A prepared corpus, or the folder of one. None is the default text, prepared in the folder ``corpus`` of
            `output`.
        jobs: Runs at a time. None is one on a GPU, else as many as there are cores for.
        keep_models: Keep the models of finished runs, which are removed otherwise.
        report_only: Train nothing: report what is there.
        measure_speed: Measure the speeds of the models when all is trained, on a machine that does nothing else. What
            only measures does so anyway. What was measured there before something ended it is not measured again.
        say: Receives lines of progress.

    Raises:
        ValueError: Before any work: an unknown experiment or scale; a corpus with fewer tokens than a run reads, or
            none to report on; runs for which there is no memory; a folder with results on other text, or with files
            that are none of ours.
        CommandFailed: A run ended without a result, which is not that its numbers diverged: that is one.
    """
    asked = experiment_named(name)
    known = scale_named(scale)
    if measure_speed and not asked.layers(known) and not asked.speeds(known):
        raise ValueError(f"measure_speed must be False for an experiment without speeds, got True for {name!r}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    folder = GridFolder(output)
    if report_only and not measure_speed and corpus is None and not (folder.path / "corpus" / MANIFEST).is_file():
        raise ValueError(f"corpus must be given to report on runs, since {str(folder.path / 'corpus')!r} is none")
    text = open_text(corpus, folder.path, scale)
    size = scale_named(scale, train_tokens=text.train.num_tokens, vocab_size=text.vocab_size)
    device = pick_device()
    precision = resolve_precision(size.base.training.precision, device)
    identity = Identity.of(text, precision)
    folder.check(name, identity)

    def found(config: RunConfig) -> Record | None:
        return folder.read(identity.key(config))

    if not report_only:
        _require_trainable(asked.runs(size, found), text, precision, device)
    folder.start(identity)
    with sole_user(folder.path):
        while not report_only:
            runs = {identity.key(run.config): run.config for run in asked.runs(size, found)}
            if all(folder.result(key).is_file() for key in runs):
                break
            run_grid(
                runs,
                folder,
                text,
                jobs=jobs or _jobs(size, device),
                threads=size.threads,
                keep_models=keep_models,
                say=lambda line: say(f"{name}: {line}"),
            )
        only_measures = not asked.runs(size, found)
        what = {"measured_sha256": _measured(asked, size)}
        if measure_speed or (only_measures and not report_only):
            folder.speeds.mkdir(exist_ok=True)
            begun = folder.speeds / f"{name}.begun.json"
            kept = Kept(begun, {**what, "hardware": hardware(), "versions": versions(), "precision": precision})
            figures = _measure(asked, size, text, device, precision, kept, say)
            write_json(folder.speeds / f"{name}.json", {**what, **figures})
            begun.unlink()
        speeds = folder.read_speeds(name)
        if speeds is not None and not speeds.items() >= what.items():
            say(f"{name}: its speeds are those of other models and left out; measure them anew with --measure_speed")
            speeds = None
        return write_report(asked, size, found, folder.path / name, speeds=speeds)


def _measured(asked: Experiment, size: Scale) -> str:
    """A hash of the layers and models whose speeds an experiment measures."""
    models = [{name: changed(config, _SIZELESS) for name, config in group.items()} for group in asked.speeds(size)]
    return hashlib.sha256(repr((asked.layers(size), models)).encode()).hexdigest()


def _measure(
    asked: Experiment,
    size: Scale,
    text: Corpus,
    device: torch.device,
    precision: Any,
    kept: Kept,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The speeds of the layers or models that an experiment names."""
    if layers := asked.layers(size):
        return measure_layers(layers, device, kept, say=say)
    return measure_models(asked.speeds(size), text, device, precision, kept, train=asked.measures_training, say=say)


def open_text(corpus: Corpus | str | Path | None, output: Path, scale: str) -> Corpus:
    """The corpus of a grid; the default one is prepared if it is not there."""
    if isinstance(corpus, Corpus):
        return corpus
    if corpus is not None:
        return open_corpus(corpus)
    return prepare(DataConfig(vocab_size=scale_named(scale).base.data.vocab_size), output / "corpus")


def plan(
    name: str,
    *,
    scale: str = "laptop",
    corpus: Corpus | None = None,
    output: str | Path | None = None,
    jobs: int | None = None,
) -> str:
    """What an experiment would run, as Markdown: parameters, tokens, memory and hours of each run. Builds no model.

    Runs that depend on the results of others are listed as if the best of those that are known, or the first, had won.
    Those that the folder `output` has on the text `corpus` are named as done, and take no time.

    Raises `ValueError` for what `reproduce` would refuse of the text and the folder.
    """
    asked, text = experiment_named(name), corpus
    size = scale_named(
        scale,
        train_tokens=None if text is None else text.train.num_tokens,
        vocab_size=None if text is None else text.vocab_size,
    )
    if output is not None:
        check_output(Path(output))
    found = _found(name, size, text, output)
    rows, hours, done = [], 0.0, 0
    for config, run in {run.config: run for run in planned(asked, size, found)}.items():
        parameters, size_of_step = _size(changed(config, _SIZELESS))
        takes = run_work(config) / size.multiplications_per_s / 3600
        is_done = found(config) is not None
        if text is not None and not is_done:
            _require_text(config, text)
        done, hours = done + is_done, hours + (0 if is_done else takes)
        rows.append(
            [
                f"{run.point}, seed {config.training.seed}",
                f"{parameters:,}",
                f"{config.training.tokens:,}",
                size_of_step,
                "done" if is_done else f"{takes:.2f}",
            ]
        )
    if not rows:
        return f"nothing is trained: {len(asked.layers(size))} layers are measured"
    at_once = jobs or (2 if scale == "laptop" else 1)
    what = f"{len(rows)} runs, {done} of them done" if done else f"{len(rows)} runs"
    total = (
        f"{what}; about {duration_text(3600 * hours / at_once)} with {at_once} at a time "
        f"(at {size.multiplications_per_s:.2g} multiplications a second each, a stated rate)"
    )
    return f"{markdown_table(['run', 'parameters', 'tokens', 'memory', 'hours'], rows)}\n\n{total}"


def _found(
    name: str, size: Scale, text: Corpus | None, output: str | Path | None
) -> Callable[[RunConfig], Record | None]:
    """What a folder has of the runs on this text. Raises `ValueError` for one of other text."""
    if text is None or output is None or not (folder := GridFolder(output)).mark.exists():
        return lambda config: None
    identity = Identity.of(text, resolve_precision(size.base.training.precision, pick_device()))
    folder.check(name, identity)
    return lambda config: folder.read(identity.key(config))


# What has no influence on the size and speed of a run: seeds, rates, fresh values and budgets.
_SIZELESS = {
    "training.seed": 0,
    "training.learning_rate": 1.0,
    "training.value_learning_rate": 1.0,
    "training.value_schedule": "constant",
    "training.selector_learning_rate": None,
    "training.tokens": 1,
    "memory.value_std": None,
}


@functools.cache
def _size(config: RunConfig) -> tuple[int, str]:
    """Parameters of a model, and the memory of its training step; counted on shapes."""
    vocab_size = config.data.vocab_size
    model = build_model(config, vocab_size=vocab_size, eot_id=0, device="meta")
    return count_parameters(model)["total"], size_text(footprint(config, vocab_size=vocab_size).total)


def planned(
    asked: Experiment, size: Scale, found: Callable[[RunConfig], Record | None] = lambda config: None
) -> list[Run]:
    """All runs, as if those that are not found, and that others depend on, had come out the same, and badly."""

    def pretended(config: RunConfig) -> Record:
        figures = {"loss": 1e3, "perplexity": 1e3, "usage": {}}
        parts = {"total": 1, "values": 0, "query": 0, "keys": 0, "rest": 1}
        return found(config) or {"failed": None, "validation": figures, "parameters": parts, "curve": []}

    return asked.runs(size, pretended)


def _jobs(size: Scale, device: torch.device) -> int:
    """As many runs at a time as there are cores for; one on a GPU."""
    cores: int = hardware()["cpu_cores"] or 1
    return 1 if device.type == "cuda" or size.threads is None else max(1, cores // size.threads)


def _require_trainable(runs: list[Run], corpus: Corpus, precision: Any, device: torch.device) -> None:
    """Raises `ValueError` for what `train` would refuse, and for a run that would see its text twice."""
    for config in dict.fromkeys(run.config for run in runs):
        _require_text(config, corpus)
        require_memory(config, vocab_size=corpus.vocab_size, precision=precision, device=device)


def _require_text(config: RunConfig, corpus: Corpus) -> None:
    if config.training.tokens > corpus.train.num_tokens:
        raise ValueError(
            f"corpus must have at least the {config.training.tokens:,} tokens that a run reads, so that none is seen "
            f"twice, got {str(corpus.folder)!r} with {corpus.train.num_tokens:,}"
        )
    training_windows(config, corpus)
