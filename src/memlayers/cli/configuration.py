"""The configuration of a run from the command line: what a preset says, then files, then options."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memlayers.cli.options_file import read_options_file
from memlayers.lm.config import RunConfig, flat_fields
from memlayers.lm.presets import preset
from memlayers.lm.run import RunFolder


@dataclass(frozen=True)
class Base:
    """What a configuration is before options are added to it. Fields go by ``section.field``."""

    kind: type[RunConfig]
    fields: Mapping[str, Any]  # without memory.dim, which is model.dim
    chosen: bool = False  # whether a preset or a file was named
    preset: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # fields that come from a file, and from which

    @classmethod
    def named(
        cls, kind: type[RunConfig], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> "Base":
        """What the options `preset`, `config` and `from` name; a file may name the preset, too. Else the demo.

        `defaults` take the place of a preset.
        """
        in_files: dict[str, Any] = {}
        places: dict[str, str] = {}
        name, first = given.get("preset"), given.get("from")
        asked = name
        for file in given.get("config", ()):
            if not file:
                raise ValueError("config must be the name of a file, got ''")
            content = read_options_file(file)
            named = content.pop("preset", None)
            asked = named if name is None and named is not None else asked
            found = flat_fields(kind, content, file)
            if found.get("memory.dim") == found.get("model.dim"):
                found.pop("memory.dim", None)
            in_files |= found
            places |= dict.fromkeys(found, file)
        chosen = asked is not None or bool(places)
        if first is not None:
            if asked is not None:
                raise ValueError(f"preset must not be given with from, whose run says the defaults, got {asked!r}")
            if "training.begin_with" in given or in_files.get("training.begin_with") is not None:
                raise ValueError("training.begin_with must not be given with from, which sets it")
            return cls(kind, _fields_of_run(first, in_files, given), True, None, places)
        if defaults is not None:
            if asked is not None:
                raise ValueError(f"preset must not be given to a command with defaults of its own, got {asked!r}")
            return cls(kind, {**cls.of(kind, kind()).fields, **defaults, **in_files}, True, None, places)
        asked = "demo" if asked is None else asked
        return cls(kind, {**cls.of(kind, preset(asked)).fields, **in_files}, chosen, asked, places)

    @classmethod
    def of(cls, kind: type[RunConfig], config: RunConfig) -> "Base":
        """The fields of a configuration."""
        flat = flat_fields(
            kind, kind(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(kind)}).to_dict()
        )
        del flat["memory.dim"]
        return cls(kind, flat, chosen=True)

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


def _fields_of_run(first: str, in_files: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a finished run, for one that begins with its model: other text is read with its tokenizer.

    Raises `ValueError` for a folder without a finished run.
    """
    run = RunFolder(first)
    if not run.finished:
        state = "a run that did not finish: --resume lets it go on" if run.is_run else "none"
        raise ValueError(f"from must be the folder of a finished run, got {first!r}, which holds {state}")
    fields = dict(Base.of(RunConfig, run.read_config()).fields)
    named = {name for name in (*in_files, *options) if name.startswith("data.") and name != "data.weights"}
    if "data.sources" in named:  # what says how the text of the run was read says nothing of another
        for name in [name for name in fields if name.startswith("data.") and name != "data.vocab_size"]:
            del fields[name]
    if named:
        fields["data.tokenizer"] = first
    return {**fields, **in_files, "training.begin_with": first}


@dataclass(frozen=True)
class Call:
    """A command as it was typed."""

    options: Mapping[str, Any]  # all but those of the configuration; what was not given has its default
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the configuration, that were given
    base: Base | None = None  # what they are added to

    def configuration(self, known: Mapping[str, Any] | None = None) -> Any:
        """The configuration; `known` are fields that win over the preset's. Raises `ValueError`."""
        assert self.base is not None
        return self.base.configuration({**(known or {}), **self.fields})
