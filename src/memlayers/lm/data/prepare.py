"""From sources to a prepared corpus, in a way that a kill does not undo.

    request.py     what is asked for, and whether a corpus is that
    survey.py      first pass: check, count, hash, draw a sample; then the tokenizer is trained
    encode.py      second pass: documents -> spans of tokens, read ahead by a thread
    spans.py       the files of a span; merging the held-out documents
    corpus.py      what comes out, opened

Each step leaves a sealed record when it is done, and a run with the same request resumes after the last of them.
"""

import errno
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memlayers.console import announce
from memlayers.files import (
    describe_files,
    find_damage,
    move_into_place,
    new_folder,
    read_if_whole,
    sole_user,
    write_sealed,
)
from memlayers.lm.data import encode
from memlayers.lm.data.corpus import (
    FORMAT,
    MANIFEST,
    SEVERAL_SOURCES,
    SPLITS,
    TOKENIZER,
    Corpus,
    described_files,
    open_corpus,
    progress_bar,
)
from memlayers.lm.data.request import describe_request, differences, open_what_is_here
from memlayers.lm.data.sources import Source, open_sources
from memlayers.lm.data.spans import HELD_OUT, Span, merge_parts, read_spans
from memlayers.lm.data.survey import survey_documents
from memlayers.lm.data.tokenize import (
    SMALLEST_VOCABULARY,
    copy_tokenizer,
    document_mark,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
    train_tokenizer,
)
from memlayers.version import __version__

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from memlayers.lm.data.config import DataConfig

SURVEY = "survey.json"
# What lies in a folder where a corpus is made, and may be removed there.
PARTS = (
    rf"\.?((survey|manifest|span-\d+)\.json|{TOKENIZER}|({'|'.join(SPLITS)})(-\d+)?\.(tokens|entries|documents\.npy))"
    r"(\.\w+)*"
)
# Of UTF-8 in a token, at the least: for a rough idea of the room that a corpus needs.
BYTES_OF_A_TOKEN = 3


class OtherRequestError(ValueError):
    """What was begun is of use to another request only."""


def prepare(config: "DataConfig", folder: str | Path, *, progress: bool = True) -> Corpus:
    """Tokenise the sources into `folder`, or open it if that is what it already holds.

    The work is done in `.<name>.partial` beside it, which is renamed at the end, so `folder` is complete or not there.
    A run that is killed, interrupted, or out of disk loses the shard that it was at; the same call again resumes at the
    last complete shard and ends with the same files. A second process waits for the first. Memory: the tokenizer's
    sample, a shard, a few batches, whatever the size of the text.

    A corpus that is there is verified, and compared with what is asked for; a source that cannot be read here is then
    taken to be the one of that name.

    Args:
        config: Which documents, and how they become tokens.
        folder: Where the corpus is, or will be.
        progress: Whether bars are shown on stderr.

    Returns:
        The corpus, opened.

    Raises:
        ValueError: Sources are missing, empty, malformed, or changed while they were read; a split is left without
            documents; the text does not have the vocabulary; `folder` holds anything else, or the beginning of another
            corpus lies beside it. What is there is left as it is.
    """
    folder = Path(os.path.realpath(folder))  # a link stays one, to the folder that is made
    if is_occupied(folder):
        return _reuse(folder, config, progress)
    if os.path.ismount(folder):
        raise ValueError(
            f"{folder} is a mount point, which a new corpus cannot take the place of: name a folder in it, such as "
            f"{folder / 'corpus'}"
        )
    entries = open_sources(config.sources, text_field=config.text_field, id_field=config.id_field)
    with working_folder(folder) as aside:
        if aside is not None:
            try:
                _make(aside, entries, config, progress)
                move_into_place(aside, folder)
                return open_corpus(folder, progress=progress)
            except OtherRequestError:
                raise
            except BaseException as error:
                if not isinstance(error, OSError) or not is_occupied(folder):
                    _give_up(aside, folder, error)
                    raise
                shutil.rmtree(aside, ignore_errors=True)  # another run was first: its corpus is compared as any other
    return _reuse(folder, config, progress)


def _reuse(folder: Path, config: "DataConfig", progress: bool) -> Corpus:
    corpus = open_corpus(folder, progress=progress)
    held = corpus.manifest["asked"]
    found = differences(held, describe_request(config, open_what_is_here(config, held), held, progress))
    if found:
        raise ValueError(
            f"{folder} holds a corpus that was prepared otherwise: {'; '.join(found)}. "
            "Name another folder, or remove this one"
        )
    return corpus


def _make(aside: Path, entries: list[list[Source]], config: "DataConfig", progress: bool) -> None:
    """Leave in `aside` everything that a corpus consists of, and nothing else."""
    if others := sorted(path.name for path in aside.iterdir() if not re.fullmatch(PARTS, path.name)):
        raise OtherRequestError(
            f"{aside} is where a corpus is made, and holds {others[0]!r}, which is no part of one: move it away"
        )
    made = read_if_whole(aside / MANIFEST)
    held = read_if_whole(aside / SURVEY)
    asked = describe_request(config, entries, (made or held).get("asked"), progress)
    _refuse_other_request(aside, made, held, asked)
    if not made or not _are_whole(aside, described_files(made)):
        if not held or not _are_whole(aside / TOKENIZER, _described_tokenizer(held)):
            keep_only(aside, set())
            held = _first_pass(aside, entries, config, asked, progress)
        made = _second_pass(aside, entries, config, held, progress) | {"asked": asked}
        write_sealed(aside / MANIFEST, made)
    keep_only(aside, {MANIFEST, TOKENIZER, *described_files(made)})


def _first_pass(
    aside: Path, entries: list[list[Source]], config: "DataConfig", asked: dict[str, Any], progress: bool
) -> dict[str, Any]:
    """Survey the documents and train the tokenizer; returns the record of both, which is written last."""
    survey = survey_documents(entries, config, progress)
    for files, described in zip(entries, asked["sources"], strict=True):
        for source, file in zip(files, described["files"], strict=True):
            if source.stamp() != file["stamp"]:  # else its hash might be that of something else than was read
                raise encode.ChangedError(f"{source.name} changed while it was read")
    for warning in (copies_text(survey.figures), strange_text(survey.figures)):
        if warning:
            announce(warning)
    if config.tokenizer is not None:
        with new_folder(aside / TOKENIZER) as tokenizer_folder:
            tokenizer = copy_tokenizer(config.tokenizer, tokenizer_folder)
    else:
        tokenizer = _new_tokenizer(aside, survey.sample, config, progress)
    vocab_size = 1 + max(tokenizer.get_vocab().values())  # of some tokenizers more than their tokens: numbers have gaps
    record = {
        "asked": asked,
        "shard_tokens": encode.SHARD_TOKENS,
        "versions": _versions(),
        **survey.figures,
        "vocab_size": vocab_size,
        "eot_id": document_mark(tokenizer, aside / TOKENIZER),
        "dtype": token_dtype(vocab_size).str,
        "tokenizer": {
            "files": {name: file["sha256"] for name, file in describe_files(aside / TOKENIZER).items()},
            "trained_on_bytes": 0 if config.tokenizer is not None else sum(map(len, survey.sample)),
        },
    }
    write_sealed(aside / SURVEY, record)
    return record


def _new_tokenizer(aside: Path, sample: list[bytes], config: "DataConfig", progress: bool) -> "Tokenizer":
    """Train a tokenizer on the sample, and leave it in its folder."""
    sample_bytes = sum(map(len, sample))
    # Every token beyond the smallest vocabulary merges some bytes. Room for more tokens than can be would be asked for
    # all the same, and the process would end where it cannot be had.
    most = SMALLEST_VOCABULARY + sample_bytes
    with progress_bar("training the tokenizer", sample_bytes, progress) as bar:
        tokenizer = train_tokenizer(_counted(sample, bar), min(config.vocab_size, most))
    vocab_size = tokenizer.get_vocab_size()
    _require_vocabulary(config, vocab_size, sample_bytes)
    with new_folder(aside / TOKENIZER) as tokenizer_folder:
        save_tokenizer(tokenizer, tokenizer_folder)
    return tokenizer


def copies_text(figures: Mapping[str, Any]) -> str:
    """In words, that held-out documents are trained on under other ids; nothing if none is."""
    if not (count := figures.get("copied_documents", 0)):
        return ""
    return (
        f"{count:,} held-out documents have the text of a training document with another id: data.id_field '' has the "
        f"texts decide, and copies stay together"
    )


def strange_text(figures: Mapping[str, Any]) -> str:
    """In words, that documents are hardly text; nothing if none is."""
    count = figures.get("strange_documents", 0)
    return f"{count:,} documents have zero bytes or many unreadable characters: are they text?" if count else ""


def _require_vocabulary(config: "DataConfig", most: int, sample_bytes: int) -> None:
    if config.vocab_size > most:
        raise ValueError(
            f"data.vocab_size must be at most {most} for this text, got {config.vocab_size} (no further pair "
            f"of tokens occurs twice in the {sample_bytes} bytes that the tokenizer is trained on; more of "
            "data.tokenizer_megabytes may have some, if there is more text)"
        )


def _counted(texts: list[bytes], bar: Any) -> Iterator[str]:
    for text in texts:
        yield text.decode()
        bar.update(len(text))


def _second_pass(
    aside: Path, entries: list[list[Source]], config: "DataConfig", held: dict[str, Any], progress: bool
) -> dict[str, Any]:
    """Write what is missing of the token files; returns the manifest, but for what was asked."""
    dtype = np.dtype(held["dtype"])
    spans = read_spans(aside)
    files = {name for span in spans for name in (span.record, *span.file_hashes())}
    keep_only(aside, {SURVEY, TOKENIZER, *files})
    spans = encode.encode_documents(
        entries,
        config,
        load_tokenizer(aside / TOKENIZER),
        dtype,
        held["files"],
        aside,
        spans,
        num_bytes=held["num_bytes"],
        eot_id=held["eot_id"],
        progress=progress,
    )
    kept = ("corpus_sha256", "vocab_size", "eot_id", "dtype", "tokenizer", "blank_documents", "malformed_records")
    return {
        "format": FORMAT,
        **{name: held[name] for name in kept},
        **{name: held.get(name, 0) for name in ("strange_documents", "copied_documents")},
        "splits": {split: _split_entry(aside, split, spans, dtype) for split in SPLITS},
        "versions": held["versions"],
    }


def _split_entry(aside: Path, split: str, spans: list[Span], dtype: np.dtype) -> dict[str, Any]:
    """Return what the manifest says of a split. The parts of a held-out one are merged for it."""
    counts = [span.counts[split] for span in spans]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    if split in HELD_OUT:
        shards = [(split, SEVERAL_SOURCES, total, merge_parts(aside, split, spans, dtype))]
    else:
        shards = [
            (f"{split}-{span.number:05}", span.source, span.counts[split], span.files[split])
            for span in spans
            if span.counts[split]["documents"]
        ]
    return {
        **total,
        "shards": [
            {"name": name, "source": source, **count, "sha256": {file.partition(".")[2]: files[file] for file in files}}
            for name, source, count, files in shards
        ],
    }


def _versions() -> dict[str, str]:
    return {
        "memlayers": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tokenizers": version("tokenizers"),
        "transformers": version("transformers"),
    }


def _refuse_other_request(aside: Path, made: dict[str, Any], held: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise `OtherRequestError` unless what lies in `aside` was begun for this request, by this version.

    It may be days of work, and the difference a letter: only its owner can say that it may be removed. What is finished
    but for its name is of use whatever version made it.
    """
    found = differences((made or held)["asked"], asked) if made or held else []
    if held and not made:
        versions = _versions()
        found += [
            f"{name} {held['versions'].get(name)}, now {version}"
            for name, version in versions.items()
            if held["versions"].get(name) != version
        ]
        if held["shard_tokens"] != encode.SHARD_TOKENS:
            found.append(f"shards of {held['shard_tokens']} tokens, now {encode.SHARD_TOKENS}")
    if found:
        raise OtherRequestError(
            f"{aside} holds the beginning of a corpus that was asked for otherwise ({'; '.join(found)}); remove it to "
            "start over, or name another folder"
        )


def _are_whole(folder: Path, described: dict[str, dict[str, Any]]) -> bool:
    return not list(find_damage(folder, described))


def _described_tokenizer(held: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"sha256": digest} for name, digest in held["tokenizer"]["files"].items()}


def _give_up(aside: Path, folder: Path, error: BaseException) -> None:
    """Keep, after a failure, what a restart can resume from, and say so; or leave nothing."""
    held = read_if_whole(aside / SURVEY)
    if not (held or read_if_whole(aside / MANIFEST)) or isinstance(error, encode.ChangedError):
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        error.add_note(f"What is done is kept in {aside}; the same command resumes there.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        free = shutil.disk_usage(folder.parent).free
        needed = f", and all of it about {_rough_size(held) / 1e6:,.0f} MB" if held else ""
        full = OSError(errno.ENOSPC, f"No space left on the device: {free / 1e6:,.0f} MB are free{needed}", str(folder))
        for note in getattr(error, "__notes__", ()):
            full.add_note(note)
        raise full from error


def _rough_size(held: dict[str, Any]) -> float:
    return held["num_bytes"] / BYTES_OF_A_TOKEN * np.dtype(held["dtype"]).itemsize


@contextmanager
def working_folder(folder: Path) -> Iterator[Path | None]:
    """Give `.<name>.partial` beside `folder`, held by this process alone; None if `folder` is there by then.

    Waits while another process holds it, and says so. The end of a process, however it comes, frees it.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    with ExitStack() as held:
        while not is_occupied(folder):
            aside.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(sole_user(aside, waiting=f"waiting for another process that prepares {folder}"))
            except FileNotFoundError:  # finished, or given up, by the process that held it
                continue
            if not is_occupied(folder):
                yield aside
                return
            if not any(aside.iterdir()):
                aside.rmdir()
        yield None


def is_occupied(folder: Path) -> bool:
    """Return whether there is anything that a new corpus would overwrite."""
    if folder.is_dir():
        return any(folder.iterdir())
    return folder.exists() or folder.is_symlink()


def keep_only(folder: Path, names: set[str]) -> None:
    """Remove everything in `folder` but these files and folders."""
    for path in folder.iterdir():
        if path.name in names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
