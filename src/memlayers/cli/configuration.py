"""The configuration of a run from the command line: what a preset says, then files, then options."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memlayers.cli.options_file import read_options_file
from memlayers.lm.config import RunConfig, flat_fields
from memlayers.lm.presets import preset


@dataclass(frozen=True)
class Base:
    """What a configuration is before options are added to it. Fields go by ``section.field``."""

    kind: type[RunConfig]
    fields: Mapping[str, Any]  # without memory.dim, which is model.dim
    chosen: bool = False  # whether a preset or a file was named
    preset: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # fields that come from a file, and from which

    @classmethod
    def named(cls, kind: type[RunConfig], name: str | None, files: Sequence[str]) -> "Base":
        """The preset and the files that were named; a file may name the preset, too. Without either, the demo."""
        in_files: dict[str, Any] = {}
        places: dict[str, str] = {}
        asked = name
        for file in files:
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
