"""The commands that make something: token files, a model, a comparison."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from memlayers.cli import show
from memlayers.cli.call import Call
from memlayers.cli.options import Base


def add_train(parser: ArgumentParser, base: Base | None) -> None:
    assert base is not None
    parser.add_argument("--output", help="folder of the run, which is written; needed but for --dry-run")
    _add_corpus(parser, "`corpus` beside the run")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that the folder holds, from its last checkpoint; begin it if there is none",
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="write nothing: take one step and say what the whole run needs, in memory and in time",
    )
    base.add_to(parser)


def run_train(call: Call) -> None:
    options = call.options
    if options.overwrite and options.resume:
        raise ValueError("overwrite and resume exclude each other: a run is either replaced or goes on")
    if options.dry_run:
        _dry_run(call)
        return
    if options.output is None:
        raise ValueError("output must be given: --output FOLDER, for the run")
    from memlayers.lm.train import train

    config, corpus = _with_data_of_corpus(call)
    result = train(config, options.output, corpus=corpus, overwrite=options.overwrite, resume=options.resume)
    print(show.training(result))
    print(f"run: {options.output}")


def _dry_run(call: Call) -> None:
    from memlayers.lm.data import prepare
    from memlayers.lm.data.prepare import is_occupied
    from memlayers.lm.data.sources import open_sources
    from memlayers.lm.dry_run import dry_run
    from memlayers.lm.train import training_windows

    config, corpus = _with_data_of_corpus(call)
    if isinstance(corpus, str | None):
        output, data = call.options.output, config.data
        folder = corpus or (None if output is None else str(Path(output).parent / "corpus"))
        if folder is not None and is_occupied(Path(folder)):
            corpus = prepare(data, folder)  # which opens and compares what is there, and writes nothing
        else:
            open_sources(data.sources, text_field=data.text_field, id_field=data.id_field)
            corpus = None
    if corpus is not None:
        training_windows(config, corpus)
    lines = dry_run(config, corpus=corpus).lines()
    if corpus is None:
        lines = [("corpus", "the text was not tokenised yet"), *lines]
    print(show.table(lines))


def add_compare(parser: ArgumentParser, base: Base | None) -> None:
    assert base is not None
    parser.add_argument("--output", required=True, help="folder of the comparison, which is written")
    _add_corpus(parser, "`corpus` in the comparison's folder")
    parser.add_argument(
        "--test_tokens", type=int, default=0, help="also report on so many tokens of the test split; 0: leave it alone"
    )
    base.add_to(parser)


def run_compare(call: Call) -> None:
    from memlayers.experiments.compare import compare

    config, corpus = _with_data_of_corpus(call)
    output = Path(call.options.output)
    compare(config, output, corpus=corpus, test_tokens=call.options.test_tokens, say=_say)
    print((output / "table.md").read_text())
    print(f"{output / 'table.md'}, {output / 'results.json'}, {output / 'loss.png'}")


def add_prepare(parser: ArgumentParser, base: Base | None) -> None:
    assert base is not None
    parser.add_argument("--output", required=True, help="folder of the token files, which is written")
    base.add_to(parser, lambda name: name.startswith("data."))


def run_prepare(call: Call) -> None:
    from memlayers.lm.data import prepare
    from memlayers.lm.run import check_output

    config, folder = call.configuration(), call.options.output
    was_ready = _is_ready(folder)
    if not was_ready:
        check_output(Path(folder))
    start = time.perf_counter()
    corpus = prepare(config.data, folder)
    print(show.corpus(corpus, None if was_ready else time.perf_counter() - start))


def _add_corpus(parser: ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--corpus",
        help="folder of the prepared corpus; made if it is not there. One that is ready decides the data options, "
        f"unless some are given (default: {default})",
    )


def _with_data_of_corpus(call: Call) -> tuple[Any, Any]:
    """The configuration, and the corpus or its folder. A ready corpus that is named says what the data are."""
    folder = call.options.corpus
    assert call.base is not None
    if folder is None or not _is_ready(folder) or call.base.names_data(call.fields):
        return call.configuration(), folder
    from memlayers.lm.data import open_corpus

    if "data.weights" not in (*call.fields, *call.base.files):  # which need the sources
        call.configuration()  # mistakes show before a large corpus is verified
    corpus = open_corpus(folder, progress=True)
    return call.configuration(_data_of(corpus.manifest["asked"])), corpus


def _data_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus was asked for, as fields of a configuration."""
    from memlayers.lm.data import DataConfig

    names = [field.name for field in dataclasses.fields(DataConfig) if field.name in asked]
    entries = [
        entry["name"] for entry in asked["sources"] if any(file["format"] != "stdlib" for file in entry["files"])
    ]
    return {f"data.{name}": asked[name] for name in names} | {"data.sources": entries}


def _is_ready(folder: str) -> bool:
    from memlayers.lm.data import MANIFEST

    return (Path(folder) / MANIFEST).is_file()


def _say(line: str) -> None:
    print(line, file=sys.stderr)
