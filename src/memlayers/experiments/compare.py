"""Run the models of a comparison on the same tokens, and put their figures side by side."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from memlayers.console import keep_silent
from memlayers.distributed.processes import Processes, joined_processes
from memlayers.experiments.points import loss_at_time
from memlayers.experiments.report import headline, markdown, plot
from memlayers.files import write_json, write_text
from memlayers.hardware import hardware, versions
from memlayers.lm.build import pick_device, resolve_precision
from memlayers.lm.config import RunConfig, differences
from memlayers.lm.data import Corpus
from memlayers.lm.evaluate import Speed, evaluate, measure_speed
from memlayers.lm.footprint import require_memory
from memlayers.lm.presets import Comparison
from memlayers.lm.run import RunFolder, check_output
from memlayers.lm.share import number_on, prepared_by_first, share_of
from memlayers.lm.start import training_windows
from memlayers.lm.train import train
from memlayers.presentation import perplexity

REPORT = ("results.json", "table.md", "loss.png")


def compare(
    config: Comparison,
    output: str | Path,
    *,
    corpus: Corpus | str | Path | None = None,
    test_tokens: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train the three models of a comparison, one after the other, and report.

    `output` gets a folder for each run, `results.json`, `table.md` and `loss.png`. A run of the same configuration that
    is already there is used if it is finished, and goes on from its last checkpoint if it is not; an unfinished one of
    another configuration is started again. So whatever ends a comparison, calling it once more costs little. Returns
    what `results.json` says.

    Under `torchrun` all processes train each run together, as `train` does, and rank 0 reports.

    Args:
        config: the model with the memory and the learning rates of the baselines.
        output: folder of the comparison.
        corpus: a prepared corpus, or the folder of one; None: the folder `corpus` in `output`.
        test_tokens: also report on so many tokens of the test split; 0 leaves it untouched, as tuning must.
        progress: show progress bars on standard error.
        say: receives a line at each stage, those of `train` included.

    Raises `ValueError` before anything is trained for a configuration that cannot be compared or that does not fit the
    memory or the text in one of its runs, and if `output` holds a finished run of another configuration.
    """
    output = Path(output)
    runs = config.runs()
    folders = {name: RunFolder(output / name) for name in runs}
    with joined_processes() as processes:
        if not processes.is_first:
            progress, say = False, keep_silent
        with processes.together():
            if isinstance(test_tokens, bool) or test_tokens < 0 or test_tokens == 1:
                raise ValueError(f"test_tokens must be 0 or at least 2, got {test_tokens!r}")
            for name, folder in folders.items():
                _require_same(folder, runs[name])
                share_of(runs[name], processes.size)
            check_output(output)
            _require_own_report(output)
        if not isinstance(corpus, Corpus):
            place = output / "corpus" if corpus is None else corpus
            corpus = prepared_by_first(config.data, place, processes, progress=progress)
        text = corpus
        processes.first(lambda: _require_comparable(runs, folders, text, test_tokens, processes))
        for number, (name, run) in enumerate(runs.items(), start=1):
            folder = folders[name]
            if processes.first(folder.result.is_file):
                say(f"[{number}/{len(runs)}] {describe(run)}: finished already, used as it is")
                continue
            goes_on = processes.first(partial(_can_go_on, folder, run))
            begin = "going on with training" if goes_on else "training"
            say(f"[{number}/{len(runs)}] {describe(run)}: {begin} on {run.training.tokens:,} tokens")
            settings = {"overwrite": not goes_on, "resume": goes_on, "progress": progress}
            train(run, folder.path, corpus=text, say=say, **settings)
        say("measuring inference speed")
        baseline = list(runs)[1]
        return processes.first(lambda: report(folders, output, corpus=text, baseline=baseline, test_tokens=test_tokens))


def _require_comparable(
    runs: Mapping[str, RunConfig],
    folders: Mapping[str, RunFolder],
    corpus: Corpus,
    test_tokens: int,
    processes: Processes,
) -> None:
    context = next(iter(runs.values())).model.context
    if not 2 <= context <= corpus.validation.num_tokens:
        raise ValueError(
            "model.context must be from 2 to the number of validation tokens, on which inference speed is measured, "
            f"{corpus.validation.num_tokens}, got {context}"
        )
    if test_tokens and corpus.test.num_tokens < 2:
        raise ValueError(f"test_tokens must be 0 for a corpus with {corpus.test.num_tokens} test tokens")
    for name, folder in folders.items():
        if folder.finished:
            _require_corpus(folder, corpus)
        else:
            folder.check(overwrite=True)
            _require_trainable(runs[name], corpus, processes)


def report(
    folders: Mapping[str, RunFolder], output: Path, *, corpus: Corpus, baseline: str, test_tokens: int = 0
) -> dict[str, Any]:
    """Compare finished runs: measure their inference side by side, write `results.json`, `table.md` and `loss.png`.

    `baseline` names the run that inference speeds are given relative to. Raises `ValueError` unless all runs were
    trained on the same tokens in the same order.
    """
    results = {name: folder.read_result() for name, folder in folders.items()}
    require_same_data(results)
    configs = {name: folder.read_config() for name, folder in folders.items()}
    device = pick_device()
    models = {name: folder.load_model(device) for name, folder in folders.items()}
    first = next(iter(configs.values()))
    precision = resolve_precision(first.training.precision, device)
    speeds = measure_speed(models, corpus.validation, context=first.model.context, precision=precision)
    tests: dict[str, dict[str, Any]] = {}
    if test_tokens:
        for name, model in models.items():
            context = configs[name].model.context
            tests[name] = evaluate(
                model, corpus.test, tokens=test_tokens, context=context, precision=precision
            ).to_dict()
    content = {
        "models": summarise(results, configs, speeds, tests, baseline=baseline),
        "baseline": baseline,
        "versions": versions(),
        "hardware": hardware(),
    }
    content["headline"] = headline(content)
    results_file, table, image = (output / name for name in REPORT)
    write_json(results_file, content)  # first: it says whose the others are
    write_text(table, markdown(content))
    plot(content, image)
    return content


def summarise(
    results: Mapping[str, Mapping[str, Any]],
    configs: Mapping[str, RunConfig],
    speeds: Mapping[str, Speed],
    tests: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str,
) -> dict[str, dict[str, Any]]:
    """The figures of each model: its result without the configuration's noise, at equal tokens and at equal time."""
    deadline = min(result["training"]["seconds"] for result in results.values())
    models: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        loss = loss_at_time(result["curve"], deadline)
        models[name] = {
            "label": describe(configs[name]),
            "layers": configs[name].model.layers,
            "memory_layers": list(configs[name].memory_layers),
            "learning_rate": configs[name].training.learning_rate,
            "parameters": result["parameters"],
            "training": result["training"],
            "device": result["device"],
            "curve": result["curve"],
            "validation": result["validation"],
            "equal_time": {
                "seconds": deadline,
                "loss": loss,
                "perplexity": None if loss is None else perplexity(loss),
            },
            "test": tests.get(name),
            "speed": speeds[name].to_dict(),
            "prefill_ratio": speeds[name].prefill_words_per_s / speeds[baseline].prefill_words_per_s,
            "decode_ratio": speeds[name].decode_tokens_per_s / speeds[baseline].decode_tokens_per_s,
        }
    return models


def describe(config: RunConfig) -> str:
    """What a row of the table is called: ``4 layers + memory``."""
    layers = f"{config.model.layers} layer{'' if config.model.layers == 1 else 's'}"
    if not config.memory_layers:
        return layers
    return (
        f"{layers} + memory" if len(config.memory_layers) == 1 else f"{layers} + {len(config.memory_layers)} memories"
    )


def require_same_data(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `ValueError` unless all runs saw the same tokens in the same order and were evaluated on the same text."""
    (first, reference), *others = results.items()
    for name, result in others:
        for field in ("corpus_sha256", "tokenizer_sha256", "order_sha256"):
            if result["data"][field] != reference["data"][field]:
                raise ValueError(
                    f"runs must be trained on the same tokens in the same order, but {first} and {name} "
                    f"differ in {field}"
                )
        if result["validation"]["tokens"] != reference["validation"]["tokens"]:
            raise ValueError(f"runs must be evaluated on the same text, but {first} and {name} were not")


def _require_same(folder: RunFolder, config: RunConfig) -> None:
    if not folder.finished:
        return
    others = differences(folder.read_config(), config)
    if others:
        raise ValueError(
            f"output must not hold finished runs of another configuration; {str(folder.path)!r} differs in "
            f"(there, asked for): {'; '.join(others)}"
        )


def _require_own_report(output: Path) -> None:
    """Raises `ValueError` if a report would take the place of files that are none."""
    held = [name for name in REPORT if (output / name).exists()]
    try:
        is_ours = {"models", "baseline", "headline"} <= set(json.loads((output / REPORT[0]).read_bytes()))
    except (OSError, ValueError, TypeError):
        is_ours = False
    if held and not is_ours:
        raise ValueError(
            f"output must be the folder of a comparison or one without {', '.join(held)}, got {str(output)!r}, whose "
            f"{REPORT[0]} is missing or not that of a comparison: choose another one, or move them away"
        )


def _can_go_on(folder: RunFolder, config: RunConfig) -> bool:
    if not folder.begun:
        return False
    try:
        return not differences(folder.read_config(), config)
    except ValueError:  # a run that was killed before its configuration was written, or one that is damaged
        return False


def _require_corpus(folder: RunFolder, corpus: Corpus) -> None:
    if folder.read_result()["data"]["corpus_sha256"] != corpus.manifest["corpus_sha256"]:
        raise ValueError(
            f"output must not hold finished runs on other text, but {str(folder.path)!r} was not trained on the corpus "
            f"in {str(corpus.folder)!r}"
        )


def _require_trainable(config: RunConfig, corpus: Corpus, processes: Processes) -> None:
    """What `train` would refuse, before other runs have taken their hours."""
    training_windows(config, corpus)
    device = pick_device()
    precision = resolve_precision(config.training.precision, device)
    sharing = number_on(device, processes)
    share = share_of(config, processes.size)
    require_memory(share, vocab_size=corpus.vocab_size, precision=precision, device=device, processes=sharing)
