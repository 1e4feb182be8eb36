"""The commands that use or measure what there is: a trained model, this machine."""

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from memlayers.cli import show
from memlayers.cli.call import Call
from memlayers.cli.options import Base, field_comments
from memlayers.lm.config import RunConfig
from memlayers.lm.presets import preset, preset_names


def add_eval(parser: ArgumentParser, base: Base | None) -> None:
    _add_run(parser)
    parser.add_argument("--split", choices=["validation", "test", "train"], default="validation", help="which text")
    parser.add_argument(
        "--tokens",
        type=int,
        default=100_000,
        help="the longest prefix of whole documents within it; the first document whatever its length",
    )
    parser.add_argument("--corpus", help="folder of the prepared corpus, if it has moved since the training")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def run_eval(call: Call) -> None:
    from memlayers.lm.build import pick_device, resolve_precision
    from memlayers.lm.data import open_corpus
    from memlayers.lm.evaluate import evaluate
    from memlayers.lm.run import RunFolder

    options, folder = call.options, RunFolder(call.options.run)
    result, config = folder.read_result(), folder.read_config()
    data = _entry(result, "data", folder.result)
    corpus = open_corpus(options.corpus or _entry(data, "folder", folder.result))
    if corpus.tokenizer_sha256 != _entry(data, "tokenizer_sha256", folder.result):
        raise ValueError(
            f"corpus must have the tokenizer of the run, got {str(corpus.folder)!r}, which has another one"
        )
    device = pick_device()
    evaluation = evaluate(
        folder.load_model(device),
        getattr(corpus, options.split),
        tokens=options.tokens,
        context=config.model.context,
        precision=resolve_precision(config.training.precision, device),
    ).to_dict()
    print(json.dumps(evaluation, indent=2) if options.json else show.quality(evaluation))


def add_generate(parser: ArgumentParser, base: Base | None) -> None:
    from memlayers.lm.generate import generate

    _add_run(parser)
    parser.add_argument("--prompt", required=True, help="the beginning of a document")
    helps = {
        "max_new_tokens": "tokens to write at most",
        "temperature": "of the distribution that is drawn from; 0: the likeliest token each time",
        "top_p": "draw from the likeliest tokens that together have this probability",
        "seed": "of the draws",
    }
    for name, parameter in inspect.signature(generate).parameters.items():
        if name in helps:
            parser.add_argument(f"--{name}", type=parameter.annotation, default=parameter.default, help=helps[name])


def run_generate(call: Call) -> None:
    from memlayers.lm.generate import generate

    names = ("max_new_tokens", "temperature", "top_p", "seed")
    print(generate(call.options.run, call.options.prompt, **{name: call.options[name] for name in names}))


def add_bench(parser: ArgumentParser, base: Base | None) -> None:
    from memlayers.bench.run import BenchConfig, case_names
    from memlayers.bench.shapes import shape_names

    helps = field_comments(BenchConfig)
    for field, known in (("cases", case_names()), ("shapes", shape_names())):
        parser.add_argument(f"--{field}", nargs="+", default=None, help=f"{helps[field]}; of {', '.join(known)}")
    parser.add_class_arguments(BenchConfig, nested_key=None, skip={"cases", "shapes"})
    for action in parser._actions:
        if action.dest in helps and action.dest not in ("cases", "shapes"):
            action.help = helps[action.dest]


def run_bench(call: Call) -> None:
    from memlayers.bench.run import BenchConfig, run

    given = {field.name: call.options[field.name] for field in dataclasses.fields(BenchConfig)}
    print(run(BenchConfig(**{name: value for name, value in given.items() if value is not None}), say=_say))


def add_info(parser: ArgumentParser, base: Base | None) -> None:
    assert base is not None
    parser.add_argument("what", nargs="?", help=f"folder of a run, or a preset: {', '.join(preset_names())}")
    base.add_to(parser)


def run_info(call: Call) -> None:
    from memlayers.lm.run import RunFolder

    what, base = call.options.what, call.base
    assert base is not None
    lines, vocab_size = show.machine(), None
    if what is not None:
        if base.chosen:
            raise ValueError(f"{what!r} is a configuration already: give no --preset or --config beside it")
        if what in preset_names():
            base = Base.of(RunConfig, preset(what))
        else:
            folder = RunFolder(what)
            base = Base.of(RunConfig, folder.read_config())
            if folder.finished and "data.vocab_size" not in call.fields:
                data = _entry(folder.read_result(), "data", folder.result)
                vocab_size = _entry(data, "vocab_size", folder.result)
    if base.chosen or call.fields:
        config = base.configuration(call.fields)
        lines += show.configuration(config, vocab_size or config.data.vocab_size)
    print(show.table(lines))


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a finished run")


def _entry(content: Any, name: str, file: Path) -> Any:
    if not isinstance(content, Mapping) or name not in content:
        raise ValueError(f"{file} is damaged: it has no {name!r}")
    return content[name]


def _say(line: str) -> None:
    print(line, file=sys.stderr)
