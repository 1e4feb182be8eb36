"""train, retrofit, compare, reproduce, prepare: the commands that make models, experiments, token files."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memlayers.checks import settings_of
from memlayers.cli.configuration import Call
from memlayers.cli.model_commands import on_mesh, quality
from memlayers.console import show, tell
from memlayers.experiments.compare import compare
from memlayers.experiments.reproduce import plan, reproduce
from memlayers.launch import is_first
from memlayers.lm.data import MANIFEST, Corpus, DataConfig, open_corpus, prepare
from memlayers.lm.data.prepare import copies_text, is_occupied, strange_text
from memlayers.lm.data.sources import open_sources
from memlayers.lm.dry_run import dry_run
from memlayers.lm.mesh import share_on
from memlayers.lm.opened import model_folder
from memlayers.lm.retrofit import fields_of_base
from memlayers.lm.run import RunFolder, check_output
from memlayers.lm.start import first_run, same_tokens, training_windows
from memlayers.lm.train import train
from memlayers.presentation import two_columns


def run_train(call: Call) -> None:
    """memlayers train"""
    options = call.options
    if options["dry_run"]:
        _dry_run(call)
        return
    config, corpus = _with_data_of_corpus(call)
    result = train(config, options["output"], corpus=corpus, overwrite=options["overwrite"], resume=options["resume"])
    run = result["training"]
    if not is_first():  # several processes return the same
        return
    first = result["curve"][0]
    before = f"perplexity {first['perplexity']:.2f} per token before\n" if first["step"] == 0 else ""
    show(
        f"{result['parameters']['total']:,} parameters, {run['tokens']:,} tokens in {run['seconds']:,.0f} s "
        f"({run['tokens_per_s']:,.0f} tokens/s)\n{before}{quality(result['validation'])}\nrun: {options['output']}"
    )


def run_retrofit(call: Call) -> None:
    """memlayers retrofit"""
    base = call.base
    assert base is not None
    decided = fields_of_base(model_folder(call.options["base"]))
    of_files = {name: base.fields[name] for name in base.files}
    fields = {**base.fields, **decided, **of_files, "base": decided["base"]}
    run_train(replace(call, base=replace(base, fields=fields)))
    if not call.options["dry_run"]:
        folder = RunFolder(call.options["output"])
        is_alone = folder.read_config().base_is_frozen
        show(f"{'memory, for load_memory,' if is_alone else 'model, for'} eval, generate and explore: {folder.model}")


def _dry_run(call: Call) -> None:
    config, corpus = _with_data_of_corpus(call)
    first = None if config.training.begin_with is None else first_run(config)
    if mesh := call.options.get("mesh"):
        share_on(config, mesh)  # mistakes show before a step is made
    if isinstance(corpus, str | None):
        output, data = call.options["output"], config.data
        folder = corpus or (None if output is None else str(Path(output).parent / "corpus"))
        if folder is not None and is_occupied(Path(folder)):
            corpus = prepare(data, folder)  # which opens and compares what is there, and writes nothing
        else:
            open_sources(data.sources, text_field=data.text_field, id_field=data.id_field)
            corpus = None
    if corpus is not None:
        training_windows(config, corpus)
        if first is not None:
            same_tokens(first, corpus)
    lines = dry_run(config, corpus=corpus).lines()
    if corpus is None:
        lines = [("corpus", "the text was not tokenised yet"), *lines]
    if mesh:
        lines += on_mesh(config, mesh, config.data.vocab_size if corpus is None else corpus.vocab_size)
    print(two_columns(lines))


def run_compare(call: Call) -> None:
    """memlayers compare"""
    config, corpus = _with_data_of_corpus(call)
    output = Path(call.options["output"])
    compare(config, output, corpus=corpus, test_tokens=call.options["test_tokens"], say=tell)
    if not is_first():
        return
    show((output / "table.md").read_text())
    show(f"{output / 'table.md'}, {output / 'results.json'}, {output / 'loss.png'}")


def run_reproduce(call: Call) -> None:
    """memlayers reproduce"""
    options = call.options
    if options["dry_run"]:
        corpus = None if options["corpus"] is None else open_corpus(options["corpus"], progress=True)
        given = {name: options[name] for name in ("scale", "output", "jobs")}
        print(plan(options["name"], corpus=corpus, **given))
        return
    names = ("scale", "corpus", "jobs", "keep_models", "measure_speed")
    output = Path(options["output"])
    reproduce(
        options["name"], output, report_only=options["report"], say=tell, **{name: options[name] for name in names}
    )
    report = output / options["name"] / "report.md"
    show(f"{report.read_text()}\n{report}")


def run_prepare(call: Call) -> None:
    """memlayers prepare"""
    config, folder = call.configuration(), call.options["output"]
    was_ready = _is_ready(folder)
    if not was_ready:
        check_output(Path(folder))
    start = time.perf_counter()
    corpus = prepare(config.data, folder)
    show(_described(corpus, None if was_ready else time.perf_counter() - start))


def _described(corpus: Corpus, seconds: float | None) -> str:
    """A prepared corpus, and how fast it was made; no `seconds`: it was there already."""
    lines = [("corpus", f"{corpus.folder}{'' if seconds is not None else ', which was ready'}")]
    num_bytes = 0
    for name in ("train", "validation", "test"):
        split = getattr(corpus, name)
        num_bytes += split.num_bytes
        shards = f", {len(split.shards)} shard{'' if len(split.shards) == 1 else 's'}" if name == "train" else ""
        text = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_words:,} words{shards}"
        lines.append((name, text))
    lines.append(("vocabulary", f"{corpus.vocab_size:,} tokens"))
    left_out = [("blank", "blank_documents"), ("malformed", "malformed_records")]
    found = [("copies", copies_text(corpus.manifest)), ("not text", strange_text(corpus.manifest))]
    lines += [line for line in found if line[1]]
    lines.append(("left out", ", ".join(f"{corpus.manifest[field]:,} {what}" for what, field in left_out)))
    if seconds is not None:
        lines.append(("time", f"{seconds:,.1f} s ({num_bytes / 1e6 / seconds:,.1f} MB/s of text)"))
    return two_columns(lines)


def _with_data_of_corpus(call: Call) -> tuple[Any, Any]:
    """The configuration, and the corpus or its folder. A ready corpus that is named says what the data are."""
    folder, first = call.options["corpus"], call.options.get("from")
    assert call.base is not None
    if folder is None and first is not None and not call.base.names_data(call.fields):
        folder = RunFolder(first).read_result()["data"].get("folder", "")
        if not _is_ready(folder):
            raise ValueError(
                f"corpus must be given, since that of {first!r}, {folder!r}, is not there: --corpus FOLDER, or "
                f"--data.sources TEXT for other text"
            )
    if folder is None or not _is_ready(folder) or call.base.names_data(call.fields):
        return call.configuration(), folder
    if "data.weights" not in (*call.fields, *call.base.files):  # which need the sources
        call.configuration()  # mistakes show before a large corpus is verified
    corpus = open_corpus(folder, progress=is_first())
    return call.configuration(_data_of(corpus.manifest["asked"])), corpus


def _data_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus was asked for, as fields of a configuration."""
    # Of the tokenizer its hash is known.
    names = [name for name in settings_of(DataConfig) if name in asked and name != "tokenizer"]
    unnamed = ("pytorch", "stdlib")  # what the text is without an entry, now and before
    entries = [
        entry["name"] for entry in asked["sources"] if any(file["format"] not in unnamed for file in entry["files"])
    ]
    return {f"data.{name}": asked[name] for name in names} | {"data.sources": entries}


def _is_ready(folder: str) -> bool:
    return (Path(folder) / MANIFEST).is_file()
