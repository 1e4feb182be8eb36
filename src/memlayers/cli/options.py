"""A configuration from the command line: what a preset says, then a file, then the options.

Options are the fields of the configuration's dataclasses; their help is the comment that stands beside each field.
"""

import dataclasses
import inspect
import io
import re
import tokenize
from argparse import ArgumentParser as PlainParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from memlayers.cli.config_file import read_config_file
from memlayers.lm.config import RunConfig, field_types, flat_fields, section_types
from memlayers.lm.presets import preset, preset_names


@dataclass(frozen=True)
class Base:
    """What a configuration is before options are added to it. Fields go by ``section.field``."""

    kind: type[RunConfig]
    fields: Mapping[str, Any]  # without memory.dim, which is model.dim
    chosen: bool = False  # whether a preset or a file was named
    preset: str | None = "demo"
    files: Mapping[str, str] = field(default_factory=dict)  # fields that come from a file, and from which

    @classmethod
    def find(cls, arguments: Sequence[str], kind: type[RunConfig]) -> "Base":
        """The preset and the files that the arguments name. They decide the defaults, so they are read first."""
        finder = PlainParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--preset", nargs="?")
        finder.add_argument("--config", nargs="?", action="append", default=[])
        named = finder.parse_known_args(arguments)[0]
        name: str | None = named.preset
        given: dict[str, Any] = {}
        files: dict[str, str] = {}
        for file in named.config:
            if file is None:  # the option's value is missing, which the parser says
                continue
            if not file:
                raise ValueError("config must be the name of a file, got ''")
            content = dict(read_config_file(file))
            in_file = content.pop("preset", None)
            name = in_file if named.preset is None and in_file is not None else name
            found = flat_fields(kind, content, file)
            if found.get("memory.dim") == found.get("model.dim"):
                found.pop("memory.dim", None)
            given |= found
            files |= dict.fromkeys(found, file)
        base = cls.of(kind, preset("demo" if name is None else name))
        return cls(
            kind,
            {**base.fields, **given},
            chosen=name is not None or bool(files),
            preset="demo" if name is None else name,
            files=files,
        )

    @classmethod
    def of(cls, kind: type[RunConfig], config: RunConfig) -> "Base":
        """The fields of a configuration."""
        fields = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(kind)}
        flat = flat_fields(kind, kind(**fields).to_dict())
        del flat["memory.dim"]
        return cls(kind, flat, chosen=True, preset=None)

    def names_data(self, options: Mapping[str, Any]) -> bool:
        """Whether a file or an option says which text there is, and how it becomes tokens."""
        return any(name.startswith("data.") and name != "data.weights" for name in (*self.files, *options))

    def configuration(self, options: Mapping[str, Any]) -> Any:
        """The configuration with some fields changed. Raises `ValueError` naming the field, and its file."""
        try:
            return self.kind.from_dict({**self.fields, **options})
        except ValueError as error:
            name = str(error).partition(" ")[0]
            if name in self.files and name not in options:
                raise ValueError(f"{error} (in {self.files[name]})") from None
            raise

    def add_to(self, parser: ArgumentParser, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Add the options: a preset, a file, and the fields that are wanted."""
        parser.add_argument(
            "--preset", choices=list(preset_names()), default=self.preset, help="where the defaults below come from"
        )
        parser.add_argument("--config", help="a YAML or JSON file of options; config.json of a run is one")
        sections, types = section_types(self.kind), field_types(self.kind)
        groups: dict[str, Any] = {}
        for section, part in sections.items():
            if any(wanted(name) for name in types if name.startswith(f"{section}.")):
                summary = (inspect.getdoc(part) or "").partition("\n")[0].replace("%", "%%")
                groups[section] = parser.add_argument_group(section, summary)
        comments = {section: field_comments(part) for section, part in {**sections, "": self.kind}.items()}
        for name, kind in types.items():
            section, _, inner = name.rpartition(".")
            if wanted(name):
                comment = comments[section].get(inner, "")
                groups.get(section, parser).add_argument(
                    f"--{name}", type=kind, default=self.fields.get(name), help=comment.replace("%", "%%")
                )


def flatten(options: Namespace, kind: type[RunConfig]) -> dict[str, Any]:
    """The fields of a configuration among parsed options, by ``section.field``."""
    return {name: options[name] for name in field_types(kind) if name in options}


def field_comments(config_class: type) -> dict[str, str]:
    """The comment beside each field of a dataclass and of those it inherits from; none where there is no source."""
    comments: dict[str, str] = {}
    for ancestor in reversed(config_class.__mro__[:-1]):
        try:
            source = inspect.getsource(ancestor)
        except OSError:
            continue
        name = ""
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME and (found := re.match(r"    (\w+): ", token.line)):
                name = found[1]
            elif token.type == tokenize.COMMENT and name in getattr(ancestor, "__dataclass_fields__", {}):
                comments.setdefault(name, token.string.lstrip("# "))
            elif token.type == tokenize.NAME and token.string == "def":
                break
    return comments
