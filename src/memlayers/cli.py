"""The command line: ``memlayers train | compare | eval | generate | bench | info``.

Options are the fields of the configuration's dataclasses, read from them by jsonargparse; their help is the comment
that stands beside each field.
"""

import dataclasses
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import memlayers

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from memlayers.lm.config import RunConfig

USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user got wrong is one line on standard error and status 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        import jsonargparse  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        return _fail(f"the command line needs {error.name}: pip install 'memlayers[lm]'")
    transformers.utils.logging.disable_progress_bar()  # of saving and loading; training keeps its own
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("memlayers: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="memlayers",
        description="Large memory layers: train, compare and use language models that have one.",
        exit_on_error=False,
        version=memlayers.__version__,
    )
    commands = {
        "train": (_train_parser, _train, "train one model"),
        "compare": (_compare_parser, _compare, "N layers with a memory against N and 2N layers without"),
        "eval": (_eval_parser, _eval, "perplexity, bits per byte and memory usage of a trained model"),
        "generate": (_generate_parser, _generate, "continue a text with a trained model"),
        "bench": (_bench_parser, _bench, "speed and peak memory of the layer on this machine, against baselines"),
        "info": (_info_parser, _info, "versions and devices; parameters of a run or a preset"),
    }
    subcommands = parser.add_subcommands(dest="command", required=True)
    preset_name = _preset_in(arguments)
    for name, (build, _, summary) in commands.items():
        subcommands.add_subcommand(name, build(preset_name), help=summary)
    try:
        parsed = parser.parse_args(list(arguments))
        options = parser.instantiate(parsed)[parsed.command]
    except ArgumentError as error:
        return _fail(str(error))
    commands[parsed.command][1](options)
    return 0


def _train_parser(preset_name: str) -> "ArgumentParser":
    from memlayers.lm.config import RunConfig

    parser = _parser()
    _add_run_options(parser, RunConfig, preset_name)
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    return parser


def _train(options: "Namespace") -> None:
    from memlayers.lm.config import RunConfig
    from memlayers.lm.train import train

    config = _config(RunConfig, options)
    result = train(config, options.output, corpus=options.corpus, overwrite=options.overwrite)
    validation, training = result["validation"], result["training"]
    print(
        f"{result['parameters']['total']:,} parameters, {training['tokens']:,} tokens in {training['seconds']:,.0f} s "
        f"({training['tokens_per_s']:,.0f} tokens/s)\n{_quality(validation)}\nrun: {options.output}"
    )


def _compare_parser(preset_name: str) -> "ArgumentParser":
    from memlayers.lm.presets import Comparison

    parser = _parser()
    _add_run_options(parser, Comparison, preset_name)
    parser.add_argument(
        "--test_tokens", type=int, default=0, help="also report on so many tokens of the test split; 0: leave it alone"
    )
    return parser


def _compare(options: "Namespace") -> None:
    from memlayers.experiments.compare import compare
    from memlayers.lm.presets import Comparison

    config = _config(Comparison, options)
    compare(
        config,
        options.output,
        corpus=options.corpus,
        test_tokens=options.test_tokens,
        say=lambda line: print(line, file=sys.stderr),
    )
    output = Path(options.output)
    print((output / "table.md").read_text())
    print(f"{output / 'table.md'}, {output / 'results.json'}, {output / 'loss.png'}")


def _eval_parser(preset_name: str) -> "ArgumentParser":
    parser = _parser()
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--split", choices=["validation", "test", "train"], default="validation", help="which text")
    parser.add_argument("--tokens", type=int, default=100_000, help="the longest prefix of whole documents within it")
    parser.add_argument("--corpus", help="folder of the prepared corpus, if it has moved since the training")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def _eval(options: "Namespace") -> None:
    from memlayers.lm.build import pick_device, resolve_precision
    from memlayers.lm.data import open_corpus
    from memlayers.lm.evaluate import evaluate
    from memlayers.lm.run import RunFolder

    folder = RunFolder(options.run)
    result, config = folder.read_result(), folder.read_config()
    corpus = open_corpus(options.corpus or result["data"]["folder"])
    if corpus.manifest["tokenizer"]["sha256"] != result["data"]["tokenizer_sha256"]:
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
    if options.json:
        print(json.dumps(evaluation, indent=2))
    else:
        print(_quality(evaluation))


def _generate_parser(preset_name: str) -> "ArgumentParser":
    from memlayers.lm.generate import generate

    parser = _parser()
    parser.add_argument("run", help="folder of a finished run")
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
    return parser


def _generate(options: "Namespace") -> None:
    from memlayers.lm.generate import generate

    print(
        generate(
            options.run,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
    )


def _bench_parser(preset_name: str) -> "ArgumentParser":
    from memlayers.bench.run import BenchConfig, case_names
    from memlayers.bench.shapes import shape_names

    parser = _parser()
    helps = _field_comments(BenchConfig)
    for field, known in (("cases", case_names()), ("shapes", shape_names())):
        parser.add_argument(f"--{field}", nargs="+", default=None, help=f"{helps[field]}; of {', '.join(known)}")
    parser.add_class_arguments(BenchConfig, nested_key=None, skip={"cases", "shapes"})
    for action in parser._actions:
        if action.dest in helps and action.dest not in ("cases", "shapes"):
            action.help = helps[action.dest]
    return parser


def _bench(options: "Namespace") -> None:
    from memlayers.bench.gate import GateError
    from memlayers.bench.run import BenchConfig, run

    given = {field.name: options[field.name] for field in dataclasses.fields(BenchConfig)}
    config = BenchConfig(**{name: value for name, value in given.items() if value is not None})
    try:
        print(run(config, say=lambda line: print(line, file=sys.stderr)))
    except GateError as error:  # not the user's mistake
        raise SystemExit(f"memlayers: error: {error}") from None


def _info_parser(preset_name: str) -> "ArgumentParser":
    from memlayers.lm.presets import preset_names

    parser = _parser()
    parser.add_argument("what", nargs="?", help=f"folder of a run, or a preset: {', '.join(preset_names())}")
    return parser


def _info(options: "Namespace") -> None:
    from memlayers.info import count_parameters, hardware, operations, versions
    from memlayers.lm.build import build_model
    from memlayers.lm.presets import preset, preset_names
    from memlayers.lm.run import RunFolder

    lines = [("versions", ", ".join(f"{name} {version}" for name, version in versions().items()))]
    machine = hardware()
    lines.append(("cpu", f"{machine['cpu']}, {machine['cpu_cores']} cores, {machine['threads']} threads"))
    gpu = f"{machine['gpu']}, {machine['gpu_gigabytes']} GiB" if machine["gpu"] else "none"
    lines.append(("gpu", gpu))
    lines += operations().items()
    if options.what is not None:
        if options.what in preset_names():
            config: RunConfig = preset(options.what).run()
            vocab_size = config.data.vocab_size
        else:
            folder = RunFolder(options.what)
            config = folder.read_config()
            vocab_size = folder.read_result()["data"]["vocab_size"] if folder.finished else config.data.vocab_size
        counts = count_parameters(build_model(config, vocab_size=vocab_size, eot_id=0, device="meta"))
        model = config.model
        lines.append(
            (
                "model",
                f"{model.family}, {model.layers} layers, dim {model.dim}, {model.heads} heads, "
                f"context {model.context}, vocabulary {vocab_size:,}",
            )
        )
        if config.memory_layers:
            memory = config.memory
            lines.append(
                (
                    "memory",
                    f"layers {', '.join(map(str, config.memory_layers))}: {memory.slots:,} slots, {memory.heads} heads "
                    f"x {memory.topk} neighbours, query width {memory.query_dim}",
                )
            )
        lines += [(f"{part} parameters", f"{number:,}") for part, number in counts.items()]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False)


def _add_run_options(parser: "ArgumentParser", config_class: "type[RunConfig]", preset_name: str) -> None:
    from memlayers.lm.presets import preset, preset_names

    parser.add_argument(
        "--preset", choices=list(preset_names()), default=preset_name, help="where the defaults below come from"
    )
    parser.add_argument("--config", action="config", help="a YAML file of options")
    parser.add_argument("--output", required=True, help="folder that is written")
    parser.add_argument(
        "--corpus",
        help="folder of the prepared corpus; made if it is not there (default: `corpus` "
        "beside the run, or in the comparison's folder)",
    )
    parser.add_class_arguments(config_class, nested_key=None)
    parser.link_arguments("model.dim", "memory.dim")
    named = preset(preset_name)
    names = [field.name for field in dataclasses.fields(config_class)]
    parser.set_defaults(
        {
            option: value
            for name in names
            for option, value in _options(name, getattr(named, name)).items()
            if option != "memory.dim"
        }
    )
    comments = {option: text for name in names for option, text in _comments(name, getattr(named, name)).items()}
    comments |= _field_comments(config_class)
    for action in parser._actions:
        if action.dest in comments:
            action.help = comments[action.dest].replace("%", "%%")


def _config(config_class: Any, options: "Namespace") -> Any:
    return config_class(**{field.name: options[field.name] for field in dataclasses.fields(config_class)})


def _options(name: str, value: Any) -> dict[str, Any]:
    """Option names and values of a field; those of its fields if it is a dataclass."""
    if not dataclasses.is_dataclass(value):
        return {name: value}
    return {f"{name}.{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}


def _comments(name: str, value: Any) -> dict[str, str]:
    if not dataclasses.is_dataclass(value):
        return {}
    return {f"{name}.{field}": text for field, text in _field_comments(type(value)).items()}


def _field_comments(config_class: type) -> dict[str, str]:
    """The comment beside each field of a dataclass and of those it inherits from; none where there is no source."""
    comments: dict[str, str] = {}
    for ancestor in reversed(config_class.__mro__[:-1]):
        try:
            source = inspect.getsource(ancestor)
        except OSError:
            continue
        name = ""
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME and (field := re.match(r"    (\w+): ", token.line)):
                name = field[1]
            elif token.type == tokenize.COMMENT and name in getattr(ancestor, "__dataclass_fields__", {}):
                comments.setdefault(name, token.string.lstrip("# "))
            elif token.type == tokenize.NAME and token.string == "def":
                break
    return comments


def _preset_in(arguments: Sequence[str]) -> str:
    """The preset that the arguments name: it decides the defaults, so it is needed before they are parsed."""
    from argparse import ArgumentParser

    finder = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--preset", nargs="?", default="demo")
    named = finder.parse_known_args(arguments)[0].preset
    from memlayers.lm.presets import preset_names

    return named if named in preset_names() else "demo"  # an unknown one is an error of the real parser


def _quality(evaluation: dict[str, Any]) -> str:
    from memlayers.experiments.report import figure

    lines = [
        f"perplexity {evaluation['perplexity']:.2f} per token, {figure(evaluation['perplexity_per_word'])} per word, "
        f"{evaluation['bits_per_byte']:.4f} bits per byte (over {evaluation['tokens']:,} tokens)"
    ]
    for name, report in evaluation["usage"].items():
        overall = report["overall"]
        lines.append(
            f"{name}: usage {overall['usage']:.1f} %, KL {overall['kl']:.3f}, "
            f"top-1 usage {overall['top1_usage']:.1f} % of {report['slots']:,} slots (over {report['tokens']:,} tokens)"
        )
    return "\n".join(lines)


def _fail(message: str) -> int:
    """Report what the user got wrong, on one line."""
    print(f"memlayers: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
