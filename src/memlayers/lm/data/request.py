"""What a corpus is asked to be, in the words of its manifest, and whether one is that."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from memlayers.files import file_sha256
from memlayers.lm.data.corpus import SHOWN_BYTES, progress_bar
from memlayers.lm.data.sources import Source, open_sources
from memlayers.lm.data.tokenize import tokenizer_file

if TYPE_CHECKING:
    from memlayers.lm.data.config import DataConfig

Stamp = dict[str, Any] | None


def describe_request(
    config: "DataConfig", entries: Sequence[list[Source] | None], held: dict[str, Any] | None, progress: bool
) -> dict[str, Any]:
    """Return the settings, and what the sources contain.

    A file of equal stamp in `held`, an earlier request, is not read. An entry that is None, because it cannot be opened
    here, is taken from `held`, and so is one of the same name that cannot be read. `progress` shows a bar if over a
    gigabyte has to be read.
    """
    settings = asdict(config) | {"holdout_percent": config.resolved_holdout_percent()}
    settings["tokenizer_megabytes"] = float(config.tokenizer_megabytes)
    settings["tokenizer"] = None if config.tokenizer is None else file_sha256(tokenizer_file(config.tokenizer))
    del settings["weights"]  # they concern the training, not the files
    before = held["sources"] if held else []
    known = {file["stamp"]["name"]: file for entry in before for file in entry["files"] if file["stamp"] is not None}

    def recorded(stamp: Stamp) -> dict[str, Any] | None:
        found = known.get(stamp["name"]) if stamp else None
        return found if found and found["stamp"] == stamp else None

    def size(source: Source) -> int:
        """Bytes that have to be read of it, as far as is known."""
        try:
            stamp = source.stamp()
        except OSError:  # which is for `describe` to raise
            return 0
        return 0 if stamp is None or recorded(stamp) else stamp["bytes"]

    total = sum(size(source) for files in entries for source in files or ())
    lock, stopped = threading.Lock(), threading.Event()

    def count(read: int) -> None:
        if stopped.is_set():  # or an interruption would wait for all that is being read
            raise InterruptedError
        with lock:
            bar.update(read)

    def describe(source: Source) -> dict[str, Any]:
        stamp = source.stamp()  # before it is read: a later change must show
        return recorded(stamp) or {**source.describe(read=count), "stamp": stamp}

    settings["sources"] = described = []
    bar = progress_bar("hashing", total, progress and total > SHOWN_BYTES)
    with bar as bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for place, (name, files) in enumerate(zip(_entry_names(config), entries, strict=True)):
                try:
                    described.append(
                        before[place] if files is None else {"name": name, "files": list(pool.map(describe, files))}
                    )
                except OSError:
                    if not _is_recorded(before, place, name):
                        raise
                    described.append(before[place])
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    return settings


def _is_recorded(before: list[dict[str, Any]], place: int, name: str) -> bool:
    return [entry["name"] for entry in before[place : place + 1]] == [name]


def _entry_names(config: "DataConfig") -> list[str]:
    return list(config.sources) or ["PyTorch's Python sources"]


def open_what_is_here(config: "DataConfig", held: dict[str, Any]) -> list[list[Source] | None]:
    """Open each entry; None stands for one that cannot be opened here but has the name that `held` has in its place."""
    entries: list[list[Source] | None] = []
    for place, name in enumerate(_entry_names(config)):
        try:
            opened = open_sources(
                config.sources[place : place + 1], text_field=config.text_field, id_field=config.id_field
            )
            entries.extend(opened)
        except (ValueError, OSError):
            if not _is_recorded(held["sources"], place, name):
                raise
            entries.append(None)
    return entries


def differences(held: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return what differs between two requests, in words; nothing if they ask for the same corpus."""
    no_matter = {"sources", *(("vocab_size", "tokenizer_megabytes") if asked["tokenizer"] is not None else ())}
    names = [name for name in asked if name not in no_matter and asked[name] != held.get(name)]
    found = [f"{name} {held.get(name)!r}, asked for {asked[name]!r}" for name in names]
    if _contents(asked) != _contents(held):
        files = ([file["name"] for entry in request["sources"] for file in entry["files"]] for request in (held, asked))
        renamed = [f" ({before}, asked for {now})" for before, now in zip(*files, strict=False) if before != now]
        found.append("sources with other contents" + "".join(renamed[:1]))
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
