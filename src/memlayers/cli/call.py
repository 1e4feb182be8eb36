"""What a command is, and how it was typed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from memlayers.cli.options import Base
from memlayers.lm.config import RunConfig


@dataclass(frozen=True)
class Call:
    """A command as it was typed."""

    options: Namespace  # all of them, those that were not given at their defaults
    fields: Mapping[str, Any]  # those of the configuration that were given, by section.field
    base: Base | None  # what they are added to

    def configuration(self, known: Mapping[str, Any] | None = None) -> Any:
        """The configuration; `known` are fields that win over the preset's. Raises `ValueError`."""
        assert self.base is not None
        return self.base.configuration({**(known or {}), **self.fields})


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    summary: str
    add_options: Callable[[ArgumentParser, Base | None], None]
    run: Callable[[Call], None]
    kind: type[RunConfig] | None = None  # the configuration that it takes
