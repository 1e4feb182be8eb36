"""What a corpus is asked to be, in the words of its manifest, and whether one is that."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from memlayers.lm.data.corpus import SHOWN_BYTES
from memlayers.lm.data.progress import progress_bar
from memlayers.lm.data.sources import Source, open_sources

if TYPE_CHECKING:
    from memlayers.lm.data.config import DataConfig


def describe_request(
    config: "DataConfig", entries: Sequence[list[Source] | None], held: dict[str, Any] | None, progress: bool
) -> dict[str, Any]:
    """The settings, and what the sources contain. A file of equal stamp in `held`, an earlier request, is not read.

    An entry that is None, because it cannot be opened here, is taken from `held`, and so is one of the same name that
    cannot be read. `progress` shows a bar if over a gigabyte has to be read.
    """
    settings = asdict(config) | {"holdout_percent": config.resolved_holdout_percent()}
    settings["tokenizer_megabytes"] = float(config.tokenizer_megabytes)
    del settings["weights"]  # they concern the training, not the files
    before = held["sources"] if held else []
    settings["sources"] = described = []
    with _Describer(before, entries, progress) as describer:
        for place, (name, files) in enumerate(zip(_entry_names(config), entries, strict=True)):
            try:
                described.append(before[place] if files is None else {"name": name, "files": describer.describe(files)})
            except OSError:
                if not _is_recorded(before, place, name):
                    raise
                described.append(before[place])
    return settings


class _Describer:
    """Describes sources, several at a time; those of which the contents are known are not read."""

    def __init__(self, before: list[dict[str, Any]], entries: Sequence[list[Source] | None], progress: bool) -> None:
        stamped = (file for entry in before for file in entry["files"] if file["stamp"] is not None)
        self._known = {file["stamp"]["name"]: file for file in stamped}
        total = sum(self._size(source) for files in entries for source in files or ())
        self._bar = progress_bar("hashing", total, progress and total > SHOWN_BYTES)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._lock, self._stopped = threading.Lock(), False

    def __enter__(self) -> "_Describer":
        self._bar.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)
        self._bar.__exit__(*raised)

    def describe(self, files: list[Source]) -> list[dict[str, Any]]:
        return list(self._pool.map(self._describe, files))

    def _describe(self, source: Source) -> dict[str, Any]:
        stamp = source.stamp()  # before it is read: a later change must show
        return self._recorded(stamp) or {**source.describe(read=self._read), "stamp": stamp}

    def _recorded(self, stamp: dict[str, Any] | None) -> dict[str, Any] | None:
        known = self._known.get(stamp["name"]) if stamp is not None else None
        return known if known is not None and known["stamp"] == stamp else None

    def _size(self, source: Source) -> int:
        """Bytes that have to be read of it, as far as is known."""
        try:
            stamp = source.stamp()
            return 0 if stamp is None or self._recorded(stamp) is not None else stamp["bytes"]
        except OSError:  # which is for `describe` to raise
            return 0

    def _read(self, count: int) -> None:
        if self._stopped:  # or an interruption would wait for all that is being read
            raise InterruptedError
        with self._lock:
            self._bar.update(count)


def _is_recorded(before: list[dict[str, Any]], place: int, name: str) -> bool:
    return [entry["name"] for entry in before[place : place + 1]] == [name]


def _entry_names(config: "DataConfig") -> list[str]:
    return list(config.sources) or ["Python's standard library"]


def open_what_is_here(config: "DataConfig", held: dict[str, Any]) -> list[list[Source] | None]:
    """Each entry opened; None for one that cannot be opened here but has the name that the corpus has in its place."""
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
