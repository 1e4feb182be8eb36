"""From what was typed to the command that does it."""

from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from memlayers.cli import diagnosing, making, using
from memlayers.cli.call import Call, Command
from memlayers.cli.options import Base, flatten
from memlayers.cli.refusals import refusal
from memlayers.config import instead
from memlayers.lm.config import RunConfig
from memlayers.lm.presets import Comparison
from memlayers.version import __version__


def run_command(arguments: Sequence[str]) -> None:
    """Parse the arguments and run the command. Raises `ValueError` for what it does not take."""
    commands = _commands()
    name = arguments[0] if arguments else ""
    if name not in commands and not name.startswith("-"):
        given = f"unknown command {name!r}" if name else "a command is missing"
        raise ValueError(f"{given}; {instead(name, commands)}")
    parser = ArgumentParser(
        prog="memlayers",
        description="Large memory layers: train, compare and use language models that have one.",
        exit_on_error=False,
        allow_abbrev=False,  # of the commands' parsers, too
        version=__version__,
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    parsers: dict[str, ArgumentParser] = {}
    base: Base | None = None
    for other, command in commands.items():
        parsers[other] = ArgumentParser(exit_on_error=False)
        if other == name:  # the others are only listed
            if command.kind is not None:
                base = Base.find(arguments[1:], command.kind)
            command.add_options(parsers[other], base)
        subcommands.add_subcommand(other, parsers[other], help=command.summary)
    try:
        given = parser.parse_args(list(arguments), defaults=False)[name]
    except ArgumentError as error:
        if name not in commands:
            raise ValueError(error.message) from None
        raise ValueError(refusal(error, name, parsers[name], arguments[1:], base)) from None
    kind = commands[name].kind
    defaults = {action.dest: action.default for action in parsers[name]._actions if "." not in action.dest}
    options = Namespace(**{option: given.get(option, default) for option, default in defaults.items()})
    commands[name].run(Call(options, {} if kind is None else flatten(given, kind), base))


def _commands() -> dict[str, Command]:
    return {
        "train": Command("train one model", making.add_train, making.run_train, RunConfig),
        "compare": Command(
            "N layers with a memory against N and 2N layers without", making.add_compare, making.run_compare, Comparison
        ),
        "prepare": Command(
            "turn text into token files, for later training", making.add_prepare, making.run_prepare, RunConfig
        ),
        "eval": Command(
            "perplexity, bits per byte and memory usage of a trained model", using.add_eval, using.run_eval
        ),
        "generate": Command("continue a text with a trained model", using.add_generate, using.run_generate),
        "doctor": Command(
            "whether a model's memories are reached, trained and used", diagnosing.add_doctor, diagnosing.run_doctor
        ),
        "bench": Command(
            "speed and peak memory of the layer on this machine, against baselines", using.add_bench, using.run_bench
        ),
        "info": Command(
            "versions and devices; parameters and memory of a run, a preset or a configuration",
            using.add_info,
            using.run_info,
            RunConfig,
        ),
    }
