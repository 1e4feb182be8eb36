"""Damage the files of corpora, checkpoints and finished runs, and see whether each damage is refused by name.

    python benchmarks/corruption.py --files 200

A file is cut off, has a bit flipped, is swapped with another one of its kind, grows, or goes missing. Then what would
use it is asked to: opening the corpus, resuming the run, loading the model. Each time it must be a `ValueError` that
names the file, and no file may have changed by it.
"""

import dataclasses
import hashlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from kill_and_resume import small_run, write_text
from memlayers.hardware import hardware, versions
from memlayers.lm.data import encode as encoding
from memlayers.lm.data import open_corpus, prepare
from memlayers.lm.run import RunFolder
from memlayers.lm.train import Loop, train

KINDS = ("cut off", "bit flipped", "swapped", "grown", "missing")


class Scene:
    """A corpus of several shards, a run that was stopped after its second checkpoint, and a finished one."""

    def __init__(self, folder: Path) -> None:
        write_text(folder / "text.txt")
        config = small_run(steps=20)
        data = dataclasses.replace(config.data, sources=(str(folder / "text.txt"),))
        self.config = dataclasses.replace(config, data=data)
        self.corpus, self.stopped, self.finished = folder / "corpus", folder / "stopped", folder / "finished"
        encoding.SHARD_TOKENS, usual = 100_000, encoding.SHARD_TOKENS
        try:
            prepare(data, self.corpus, progress=False)
        finally:
            encoding.SHARD_TOKENS = usual
        train(self.config, self.finished, corpus=self.corpus, progress=False)
        self._stop_after(16)

    def files(self) -> dict[Path, Callable[[], Any]]:
        """Every file that is guarded, and what reads it."""
        checkpoint = max((self.stopped / "checkpoints").iterdir())
        readers: list[tuple[Path, Callable[[], Any]]] = [
            (self.corpus, lambda: open_corpus(self.corpus)),
            (checkpoint, lambda: train(self.config, self.stopped, corpus=self.corpus, resume=True, progress=False)),
            (self.finished / "model", lambda: RunFolder(self.finished).load_model()),
            (self.finished / "result.json", lambda: RunFolder(self.finished).load_model()),
        ]
        return {
            file: reader
            for place, reader in readers
            for file in ([place] if place.is_file() else sorted(place.rglob("*")))
            if file.is_file() and file.stat().st_size
        }

    def _stop_after(self, step: int) -> None:
        original = Loop.forward_backward

        def stop(self: Loop, *args: Any) -> float:
            if self.step == step:
                raise KeyboardInterrupt
            return original(self, *args)

        Loop.forward_backward = stop  # type: ignore[method-assign]
        try:
            train(self.config, self.stopped, corpus=self.corpus, progress=False)
        except KeyboardInterrupt:
            pass
        finally:
            Loop.forward_backward = original  # type: ignore[method-assign]


def damage(file: Path, kind: str, others: list[Path], draw: random.Random) -> tuple[str, dict[Path, bytes]]:
    """Damage a file. What was done, a flipped bit where there is nothing to swap with, and what to put back."""
    content = file.read_bytes()
    before = {file: content}
    if kind == "swapped":
        twins = [other for other in others if other.suffix == file.suffix and other.read_bytes() != content]
        if not twins:
            kind = "bit flipped"
        else:
            twin = draw.choice(twins)
            before[twin] = twin.read_bytes()
            file.write_bytes(before[twin])
            twin.write_bytes(content)
    if kind == "cut off":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "bit flipped":
        place = draw.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
    elif kind == "grown":
        file.write_bytes(content + draw.randbytes(draw.randint(1, 100)))
    elif kind == "missing":
        file.unlink()
    return kind, before


def run_damages(folder: Path, *, files: int, seed: int = 0) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Damage `files` files: how often each kind of damage met which place, and what went wrong."""
    scene = Scene(folder)
    draw = random.Random(seed)
    guarded = scene.files()
    met: Counter[tuple[str, str]] = Counter()
    wrong = []
    for number in range(files):
        file, kind = draw.choice(list(guarded)), KINDS[number % len(KINDS)]
        neighbours = [other for other in guarded if other.parent == file.parent and other != file]
        kind, before = damage(file, kind, neighbours, draw)
        damaged = _hash_all(folder)
        label = f"{kind}: {file.relative_to(folder)}"
        try:
            guarded[file]()
            wrong.append(f"{label}: accepted")
        except ValueError as error:
            if not any(path.name in str(error) for path in before):
                wrong.append(f"{label}: not named: {error}")
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {error}")
        if _hash_all(folder) != damaged:
            wrong.append(f"{label}: files were changed")
        for path, content in before.items():
            path.write_bytes(content)
        met[file.relative_to(folder).parts[0], kind] += 1
    for reader in set(guarded.values()):
        reader()  # all is as it was, so all works
    return met, wrong


def _hash_all(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def main(files: int = 200, seed: int = 0) -> None:
    """Damage and refuse.

    Args:
        files: how many files are damaged, one at a time.
        seed: of the choices.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        met, wrong = run_damages(Path(folder), files=files, seed=seed)
    for place in sorted({place for place, _ in met}):
        print(f"{place:<10} " + ", ".join(f"{met[place, kind]} {kind}" for kind in KINDS))
    seconds = time.perf_counter() - started
    print(f"{met.total()} files damaged, {met.total() - len(wrong)} refused by name, {seconds:.0f} s")
    print("\n".join(wrong), end="\n" if wrong else "")
    print(", ".join(f"{name} {version}" for name, version in versions().items()), "|", hardware()["cpu"])
    sys.exit(bool(wrong))


if __name__ == "__main__":
    auto_cli(main)
