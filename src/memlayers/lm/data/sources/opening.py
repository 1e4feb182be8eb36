"""From what a user names to sources: files, folders, globs, Hugging Face datasets."""

import fnmatch
import glob
import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from memlayers.lm.data.sources.base import Source
from memlayers.lm.data.sources.huggingface import PREFIX, HuggingFace
from memlayers.lm.data.sources.jsonlines import JsonLines
from memlayers.lm.data.sources.parquet import Parquet
from memlayers.lm.data.sources.pytorch import PyTorchSources
from memlayers.lm.data.sources.streams import SUFFIXES
from memlayers.lm.data.sources.text import TextFile

# What is taken from a folder; a file that is named is plain text with any other suffix too.
JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")
FOLDER_SUFFIXES = (
    ".parquet",
    *(kind + packed for kind in (".txt", *JSON_LINES) for packed in ("", *SUFFIXES)),
)


def open_sources(sources: Sequence[str], *, text_field: str, id_field: str) -> list[list[Source]]:
    """The sources behind each entry, in a fixed order; without an entry, the Python sources of PyTorch.

    An entry is a file, a folder (all of `FOLDER_SUFFIXES` below it, hidden ones left out), a glob (`**` for any depth)
    or a dataset (`hf:NAME`, see `HuggingFace`); `~` is the home folder. Files are JSON lines (`JSON_LINES`) or plain
    text, each plain, `.gz`, `.xz` or `.zst`, or Parquet (`.parquet`).

    Raises `ValueError`, before anything is read, for an entry that is or matches nothing, an empty file, one of another
    format, one that is given twice, and a format whose package is not installed.
    """
    if not sources:
        return [[PyTorchSources()]]
    opened = [list(_open_entry(entry, text_field, id_field)) for entry in sources]
    seen: set[str] = set()
    for source in (source for group in opened for source in group):
        identity = source.name if isinstance(source, HuggingFace) else os.path.realpath(source.name)
        if identity in seen:
            raise ValueError(f"sources: {source.name} is given twice")
        seen.add(identity)
    return opened


def _open_entry(entry: str, text_field: str, id_field: str) -> Iterator[Source]:
    if entry.startswith(PREFIX):
        _require("datasets", entry)
        yield HuggingFace.parse(entry, text_field=text_field, id_field=id_field)
        return
    if not entry.strip():
        raise ValueError(f"sources: {entry!r} is not the path of a file or folder")
    entry = os.path.expanduser(entry)
    path = Path(entry)
    if path.is_dir():
        found = _below(path)
    elif path.exists() or not glob.has_magic(entry):
        found = {path.name: path}
    else:
        found = _matching(entry)
    for relative, file in found.items():
        yield _open_file(file, relative, text_field, id_field)


def _below(folder: Path) -> dict[str, Path]:
    """The files of `FOLDER_SUFFIXES` below a folder by their relative paths, sorted."""
    files = [file for file in _walk(folder) if file.name.lower().endswith(FOLDER_SUFFIXES)]
    if not files:
        raise ValueError(f"sources: no file of {', '.join(FOLDER_SUFFIXES)} in the folder {folder}")
    return _by_relative_path(files, folder)


def _walk(folder: Path, *, hidden: bool = False) -> Iterator[Path]:
    """Yield the files below a folder. Links are followed, but each folder is looked at once.

    Links that lead to each other would have endless paths. A folder goes by its own name where it has one in `folder`,
    else by the first link to it.
    """

    def fail(error: OSError) -> None:  # else a folder that cannot be listed would be left out without a word
        raise error

    seen = {str(above) for above in Path(os.path.realpath(folder)).parents}
    starts = [folder]
    while starts:
        links = []
        for start in starts:
            for parent, folders, names in os.walk(start, onerror=fail):
                real = os.path.realpath(parent)
                folders[:] = [] if real in seen else sorted(n for n in folders if hidden or not n.startswith("."))
                if real not in seen:
                    yield from (Path(parent, name) for name in names if hidden or not name.startswith("."))
                    links += [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
                seen.add(real)
        starts = links


def _matching(pattern: str) -> dict[str, Path]:
    parts = Path(pattern).parts
    fixed = next(count for count, part in enumerate(parts) if glob.has_magic(part))
    root, wanted = Path(*parts[:fixed]), parts[fixed:]
    if "**" not in wanted:
        files = [Path(name) for name in glob.glob(pattern) if not os.path.isdir(name)]
    elif root.is_dir():  # `glob` would follow links that lead to each other for ever
        hidden = any(part.startswith(".") for part in wanted)
        files = [file for file in _walk(root, hidden=hidden) if _matches(file.relative_to(root).parts, wanted)]
    else:
        files = []
    if not files:
        raise ValueError(f"sources: no file matches {pattern}")
    return _by_relative_path(files, root)


def _matches(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the parts of a path are those of a pattern; ``**`` stands for any folders that are not hidden."""
    if not wanted:
        return not names
    if wanted[0] != "**":
        shown = wanted[0].startswith(".") or not "".join(names[:1]).startswith(".")
        return bool(names) and shown and fnmatch.fnmatch(names[0], wanted[0]) and _matches(names[1:], wanted[1:])
    visible = list(itertools.takewhile(lambda name: not name.startswith("."), names))
    if len(wanted) == 1:
        return bool(names) and len(visible) == len(names)
    return any(_matches(names[count:], wanted[1:]) for count in range(len(visible) + 1))


def _by_relative_path(files: list[Path], folder: Path) -> dict[str, Path]:
    return dict(sorted((file.relative_to(folder).as_posix(), file) for file in files))


def _open_file(file: Path, relative: str, text_field: str, id_field: str) -> Source:
    if not file.exists():
        raise ValueError(f"sources: no such file or folder: {file}")
    if not file.is_file():
        raise ValueError(f"sources: {file} is neither a file nor a folder; it has to be read more than once")
    if file.stat().st_size == 0:
        raise ValueError(f"sources: {file} is empty")
    packed = file.suffix.lower()
    suffix = Path(file.stem).suffix.lower() if packed in SUFFIXES else packed
    if suffix == ".parquet" and suffix != packed:
        raise ValueError(f"sources: {file}: Parquet is compressed inside; give the .parquet file")
    if suffix in (".json", ".bz2", ".zip"):
        raise ValueError(
            f"sources: {file} is neither plain text nor JSON lines (.jsonl), plain, .gz, .xz or .zst, nor Parquet "
            "(.parquet). If it has one JSON object a line, name it .jsonl"
        )
    if packed == ".zst":
        _require("zstandard", file)
    if suffix == ".parquet":
        _require("pyarrow", file)
        return Parquet(file, relative, text_field, id_field)
    if suffix in JSON_LINES:
        return JsonLines(file, relative, text_field, id_field)
    return TextFile(file, relative)


def _require(package: str, reading: str | Path) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"sources: reading {reading} needs {package}: pip install 'memlayers[data]'")
