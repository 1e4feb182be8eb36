"""What a corpus is asked to be, in the words of its manifest, and whether one is that."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from memlayers.lm.data.sources import Source, open_sources

if TYPE_CHECKING:
    from memlayers.lm.data.config import DataConfig


def describe_request(
    config: "DataConfig", entries: Sequence[list[Source] | None], held: dict[str, Any] | None
) -> dict[str, Any]:
    """The settings, and what the sources contain. A file of equal stamp in `held`, an earlier request, is not read.

    An entry that is None, because it cannot be opened here, is taken from `held`.
    """
    settings = asdict(config) | {"holdout_percent": config.resolved_holdout_percent()}
    settings["tokenizer_megabytes"] = float(config.tokenizer_megabytes)
    del settings["weights"]  # they concern the training, not the files
    before = held["sources"] if held else []
    known = {file["stamp"]["name"]: file for entry in before for file in entry["files"] if file["stamp"] is not None}

    def describe(source: Source) -> dict[str, Any]:
        stamp = source.stamp()
        if stamp is not None and stamp["name"] in known and known[stamp["name"]]["stamp"] == stamp:
            return known[stamp["name"]]
        return {**source.describe(), "stamp": stamp}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        settings["sources"] = [
            before[place] if files is None else {"name": name, "files": list(pool.map(describe, files))}
            for place, (name, files) in enumerate(zip(_entry_names(config), entries, strict=True))
        ]
    return settings


def _entry_names(config: "DataConfig") -> list[str]:
    return list(config.sources) or ["Python's standard library"]


def open_what_is_here(config: "DataConfig", held: dict[str, Any]) -> list[list[Source] | None]:
    """Each entry opened; None for one that cannot be opened here but has the name that the corpus has in its place."""
    entries: list[list[Source] | None] = []
    recorded = [entry["name"] for entry in held["sources"]]
    for place, name in enumerate(_entry_names(config)):
        try:
            opened = open_sources(
                config.sources[place : place + 1], text_field=config.text_field, id_field=config.id_field
            )
            entries.extend(opened)
        except ValueError:
            if recorded[place : place + 1] != [name]:
                raise
            entries.append(None)
    return entries


def differences(held: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What differs between two requests, in words; nothing if they ask for the same corpus."""
    names = [name for name in asked if name != "sources" and asked[name] != held.get(name)]
    found = [f"{name} {held.get(name)!r}, asked for {asked[name]!r}" for name in names]
    if _contents(asked) != _contents(held):
        found.append("sources with other contents")
    return found


def _contents(asked: dict[str, Any]) -> list[list[Any]]:
    """What the sources contain, not where they lie."""
    return [
        [
            (file["format"], file["sha256"])
            if "sha256" in file
            else {name: value for name, value in file.items() if name != "stamp"}
            for file in entry["files"]
        ]
        for entry in asked["sources"]
    ]
