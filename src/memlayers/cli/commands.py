"""Every command with its options, and the choice between them.

What a command does is imported once its arguments have been understood: transformers and torch take seconds to import.
"""

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memlayers.checks import Setting, instead, require, settings_of
from memlayers.cli.arguments import Parser
from memlayers.cli.configuration import Base, Call
from memlayers.experiments.registry import EXPERIMENTS, experiment
from memlayers.launch import is_launched, number
from memlayers.lm.config import SECTIONS, RunConfig, run_settings
from memlayers.lm.data.prepare import is_occupied
from memlayers.lm.data.sources import open_sources
from memlayers.lm.presets import RETROFIT, Comparison, preset_names
from memlayers.lm.run import RunFolder
from memlayers.presentation import two_columns


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the command line."""

    summary: str
    run: str  # the function that does it, as module:name
    options: Mapping[str, Setting] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)  # options without a value, and their help
    placed: str | None = None  # the option that is given by its place
    kind: type[RunConfig] | None = None  # the configuration that it takes
    sections: tuple[str, ...] = ("",)  # with which the names of those fields begin that it takes
    aliases: Mapping[str, str] = field(default_factory=dict)  # its own names of fields
    defaults: Mapping[str, Any] | None = None  # of its fields, in place of a preset's
    settings: str = ""  # a dataclass of further options, as module:name
    in_processes: bool = False  # whether several that `torchrun` started do it together

    def parser(self, name: str, defaults: Mapping[str, object]) -> Parser:
        """Its parser; `defaults` are those of the configuration, for the help."""
        fields = self.fields(defaults)
        wanted = [section for section in SECTIONS if any(name.startswith(f"{section}.") for name in fields)]
        return Parser(
            name,
            f"{self.summary[0].upper()}{self.summary[1:]}.",
            {**self.own_settings(), **fields},
            flags=self.flags,
            placed=self.placed,
            sections={section: (inspect.getdoc(SECTIONS[section]) or "").partition("\n")[0] for section in wanted},
        )

    def own_settings(self) -> dict[str, Setting]:
        """Its options, without the fields of the configuration."""
        further = settings_of(_load(self.settings)) if self.settings else {}
        shared = _OF_A_CONFIGURATION if self.kind else {}
        if self.defaults is not None:
            shared = {name: found for name, found in shared.items() if name != "preset"}
        known = run_settings(self.kind) if self.kind else {}
        return {**self.options, **{name: known[of] for name, of in self.aliases.items()}, **shared, **further}

    def fields(self, defaults: Mapping[str, object]) -> dict[str, Setting]:
        """The fields of the configuration that it takes."""
        known = {} if self.kind is None else run_settings(self.kind)
        return {
            name: found._replace(default=defaults.get(name))
            for name, found in known.items()
            if name.startswith(self.sections) and name not in self.aliases.values()
        }

    def typed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields among what was given, by their own names."""
        own = {of: given[name] for name, of in self.aliases.items() if name in given}
        return {**own, **{name: given[name] for name in self.fields({}) if name in given}}


def _option(help: str, kind: object = str, default: object = dataclasses.MISSING, **limits: int) -> Setting:
    return Setting(kind, help, default, limits)


_OF_A_CONFIGURATION = {
    "preset": _option(f"where the defaults below come from: {', '.join(preset_names())}", default=None),
    "config": _option(
        "YAML or JSON files of options, a later one over an earlier; config.json of a run is one",
        tuple[str, ...],
        default=(),
    ),
}
_CHECKPOINT = "the folder of a run, of a checkpoint in one, or of a saved model"
_MODEL = (
    "folder of a finished run or of a checkpoint in one; or what save_pretrained wrote, with its tokenizer, or "
    "save_memory, beside its base"
)
_BASE = {
    "base": _option(
        "for a memory alone: folder of its base, if that is no longer where it was when the memory was added",
        default=None,
    )
}
_RUN = {
    "run": _option(_MODEL),
    **_BASE,
    "memory_values": _option(
        'for a memory alone: "memory" loads its tables as they are, "int8" and "int4" round them on the way, "mapped" '
        'reads them from their files as they are needed, "host" keeps them off a GPU',
        Literal["memory", "int8", "int4", "mapped", "host"],
        "memory",
    ),
}
_MESH = _option(
    "processes, or machines and processes of a machine: also say what each holds and receives in a step, with replicas "
    "of tables and with tables in columns, and which to choose",
    tuple[int, ...],
    (),
    least=1,
)
_CORPUS = (
    "folder of the prepared corpus; made if it is not there. One that is ready decides the data options, unless some "
    "are given (default: `corpus` {})"
)
_TRAINED = {
    "output": _option("folder of the run, which is written; needed but for --dry_run", default=None),
    "corpus": _option(_CORPUS.format("beside the run"), default=None),
}
_TRAINING = {
    "overwrite": "replace the run that the folder holds",
    "resume": "go on with the run that the folder holds, from its last checkpoint; begin it if there is none",
    "dry_run": "write nothing: take two steps and say what the whole run needs, in memory and in time",
}
COMMANDS = {
    "train": Command(
        summary="train one model",
        run="memlayers.cli.training_commands:run_train",
        options={
            **_TRAINED,
            "mesh": _MESH._replace(help=f"for --dry_run: {_MESH.help}"),
            "from": _option(
                "folder of a finished run, with whose model this one begins. Its configuration gives the defaults, in "
                "place of a preset's, and its corpus the text, unless --corpus or data options name another, which is "
                "read with its tokenizer; schedule and moments are new",
                default=None,
            ),
        },
        flags=_TRAINING,
        kind=RunConfig,
        in_processes=True,
    ),
    "retrofit": Command(
        summary="train a memory beside a model that is trained already",
        run="memlayers.cli.training_commands:run_retrofit",
        options={
            "base": _option("folder of a causal language model of transformers, or of a run, with its tokenizer"),
            **_TRAINED,
        },
        flags=_TRAINING,
        placed="base",
        kind=RunConfig,
        sections=(
            "data.",
            "memory.",
            "memory_kind",
            "memory_share",
            "memory_values",
            "model.context",
            "train_base",
            "training.",
        ),
        aliases={"data": "data.sources", "layers": "memory_layers"},
        defaults=RETROFIT,
    ),
    "compare": Command(
        summary="N layers with a memory against N and 2N layers without",
        run="memlayers.cli.training_commands:run_compare",
        options={
            "output": _option("folder of the comparison, which is written"),
            "corpus": _option(_CORPUS.format("in the comparison's folder"), default=None),
            "test_tokens": _option(
                "also report on so many tokens of the test split; 0: leave it alone", int, 0, least=0
            ),
        },
        kind=Comparison,
        in_processes=True,
    ),
    "reproduce": Command(
        summary="an experiment of the paper: its runs, as far as they are left, and its report",
        run="memlayers.cli.training_commands:run_reproduce",
        options={
            "name": _option(f"the experiment: {', '.join(EXPERIMENTS)}"),
            "scale": _option(
                "sizes and budgets: two cores in hours, a large GPU in an hour, or those of the paper",
                Literal["laptop", "gpu", "paper"],
                "laptop",
            ),
            "output": _option(
                "folder of all experiments on one text, which is written; needed but for --dry_run", default=None
            ),
            "corpus": _option(
                "folder of the prepared corpus (default: that of the default text, made in `corpus` in the output)",
                default=None,
            ),
            "jobs": _option("runs at a time; null: one on a GPU, else as many as cores", int | None, None, least=1),
        },
        flags={
            "dry_run": "write nothing: list the runs with their parameters, tokens, memory and hours",
            "keep_models": "keep the models of finished runs, which are removed otherwise",
            "report": "train nothing: report what is there",
            "measure_speed": "measure the speeds of the models at the end, on a machine that does nothing else",
        },
        placed="name",
    ),
    "prepare": Command(
        summary="turn text into token files, for later training",
        run="memlayers.cli.training_commands:run_prepare",
        options={"output": _option("folder of the token files, which is written")},
        kind=RunConfig,
        sections=("data.",),
    ),
    "eval": Command(
        summary="perplexity, bits per byte and memory usage of a trained model",
        run="memlayers.cli.model_commands:run_eval",
        options={
            **_RUN,
            "split": _option("which text", Literal["validation", "test", "train"], "validation"),
            "tokens": _option(
                "the longest prefix of whole documents within it; the first document whatever its length",
                int,
                100_000,
                least=2,
            ),
            "corpus": _option("folder of the prepared corpus, if it has moved or the model is no run", default=None),
        },
        flags={"json": "print all figures as JSON"},
        placed="run",
    ),
    "generate": Command(
        summary="continue a text with a trained model",
        run="memlayers.cli.model_commands:run_generate",
        options={
            **_RUN,
            "prompt": _option("the beginning of a document"),
            "max_new_tokens": _option("tokens to write at most", int, 100, least=1),
            "temperature": _option(
                "of the distribution that is drawn from; 0: the likeliest token each time", float, 0.8, least=0
            ),
            "top_p": _option(
                "draw from the likeliest tokens that together have this probability", float, 0.95, above=0
            ),
            "seed": _option("of the draws", int, 0, least=0),
        },
        placed="run",
    ),
    "explore": Command(
        summary="a page in HTML about what a model's memories read of a text, and what their slots say",
        run="memlayers.cli.model_commands:run_explore",
        options={
            "run": _option(_MODEL),
            **_BASE,
            "text": _option("file of text, or a folder, as --data.sources takes them"),
            "output": _option("file of the page, which is written", default="explorer.html"),
            "compare": _option("folder of another model with the same memories, to compare with", default=None),
            "tokens": _option("tokens of the text to read, at most", int, 50_000, least=1),
        },
        placed="run",
    ),
    "doctor": Command(
        summary="whether a model's memories are reached, trained and used",
        run="memlayers.cli.model_commands:run_doctor",
        options={
            "checkpoint": _option(_MODEL),
            **_BASE,
            "corpus": _option("folder of the prepared corpus, if it has moved, or if the model has none", default=None),
        },
        flags={"json": "print all findings as JSON"},
        placed="checkpoint",
    ),
    "bench": Command(
        summary="speed and peak memory of the layer on this machine, against baselines",
        run="memlayers.cli.machine_commands:run_bench",
        settings="memlayers.bench.run:BenchConfig",
    ),
    "info": Command(
        summary="versions and devices; parameters and memory of a run, a preset or a configuration",
        run="memlayers.cli.machine_commands:run_info",
        options={
            "what": _option(f"folder of a run, or a preset: {', '.join(preset_names())}", default=None),
            "mesh": _MESH,
        },
        placed="what",
        kind=RunConfig,
    ),
}


def run_command(arguments: Sequence[str]) -> None:
    """Parses the arguments and runs the command. Raises `ValueError` for what it does not take."""
    name, *words = arguments or [""]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in COMMANDS:
        wrong = f"unknown command {name!r}" if name else "a command is missing"
        raise ValueError(f"{wrong}; {instead(name, COMMANDS)}")
    command = COMMANDS[name]
    if is_launched() and not command.in_processes:
        raise _of_one_process(name)
    given = command.parser(name, {}).values(words)
    asks_for_help = given.pop("help", False)
    base = None
    if command.kind is not None:
        base = Base.named(command.kind, given, command.defaults)
    if asks_for_help:
        print(command.parser(name, {} if base is None else base.fields).format_help(), end="")
        return
    call = Call(_options(name, command, given), command.typed(given), base)
    _refuse_early(name, call)
    run = _load(command.run)
    if transformers := sys.modules.get("transformers"):  # which not every command imports
        transformers.utils.logging.disable_progress_bar()  # of saving and loading; training keeps its own
    run(call)


def _of_one_process(what: str) -> ValueError:
    return ValueError(
        f"memlayers {what} runs in one process: start it without torchrun, which has started {number('WORLD_SIZE')}"
    )


def _refuse_early(name: str, call: Call) -> None:
    """Raises what the command would raise of its configuration and its folder, before seconds of imports."""
    base = call.options.get("base")
    if base is not None and not Path(str(base)).is_dir():
        raise ValueError(f"base must be the folder of a model, got {base!r}, which is not there")
    if name in ("train", "retrofit", "compare", "prepare") and call.base is not None:
        options = call.options
        if options.get("overwrite") and options.get("resume"):
            raise ValueError("overwrite and resume exclude each other: a run is either replaced or goes on")
        if is_launched() and options.get("dry_run"):
            raise _of_one_process(f"{name} --dry_run")
        if name in ("train", "retrofit") and options["output"] is None and not options["dry_run"]:
            raise ValueError("output must be given: --output FOLDER, for the run")
        if name == "retrofit":
            if options["corpus"] is None and not call.base.names_data(call.fields):
                raise ValueError("data must be given: --data TEXT, or --corpus FOLDER from memlayers prepare")
            return  # the base says the rest of the configuration
        if options.get("mesh") and not options["dry_run"]:
            raise ValueError("mesh is for --dry_run: torchrun says how many processes train")
        # A corpus that is ready says what the data are, and weights need its sources.
        if options.get("corpus") is None or "data.weights" not in (*call.fields, *call.base.files):
            config = call.configuration()
            if name == "prepare" and not is_occupied(Path(options["output"])):
                open_sources(config.data.sources, text_field=config.data.text_field, id_field=config.data.id_field)
    elif name == "reproduce":
        experiment(call.options["name"])
        if call.options["output"] is None and not call.options["dry_run"]:
            raise ValueError("output must be given: --output FOLDER, for the experiments on one text")
    elif name in ("eval", "generate") and not Path(call.options["run"]).is_dir():
        RunFolder(call.options["run"]).read_result()
    elif name == "explore":
        for folder in filter(None, (call.options["run"], call.options["compare"])):
            if not Path(folder).is_dir():
                raise ValueError(
                    f"{'run' if folder == call.options['run'] else 'compare'} must be {_CHECKPOINT}, got {folder!r}"
                )
        open_sources([call.options["text"]], text_field="text", id_field="id")
        if Path(call.options["output"]).is_dir() or not Path(call.options["output"]).absolute().parent.is_dir():
            raise ValueError(f"output must be a file in a folder that is there, got {call.options['output']!r}")
    elif name == "doctor" and not Path(call.options["checkpoint"]).is_dir():
        raise ValueError(f"checkpoint must be {_CHECKPOINT}, got {call.options['checkpoint']!r}")
    elif (
        name == "info" and call.options["what"] not in (None, *preset_names()) and not (call.base and call.base.chosen)
    ):
        RunFolder(call.options["what"]).read_config()


def overview() -> str:
    """What `memlayers --help` prints."""
    lines = two_columns([(f"  {name}", command.summary) for name, command in COMMANDS.items()])
    return (
        "usage: memlayers COMMAND ...\n\nLarge memory layers: train, compare and use language models that have one.\n\n"
        f"{lines}\n\nmemlayers COMMAND --help says more; memlayers --version says which one this is."
    )


def _options(name: str, command: Command, given: Mapping[str, object]) -> dict[str, object]:
    """The options that are no fields of the configuration, checked."""
    known = command.own_settings()
    missing = [option for option, found in known.items() if not found.has_default and option not in given]
    if missing:
        shown = [
            f"{option.upper() if option == command.placed else f'--{option}'} ({known[option].help})"
            for option in missing
        ]
        raise ValueError(f"memlayers {name} needs {', '.join(shown)}")
    for option, found in known.items():
        if option in given:
            require(option, given[option], found.kind, found.limits)
            if given[option] == "" and option != "prompt":  # to pathlib this is the current folder
                raise ValueError(f"{option} must not be empty, got ''")
    defaults = {option: found.default for option, found in known.items()} | dict.fromkeys(command.flags, False)
    return {option: given.get(option, default) for option, default in defaults.items()}


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
