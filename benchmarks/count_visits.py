"""How many files of the package a reader visits who follows what runs.

    python benchmarks/count_visits.py

Counted are the files with a function called: from `memlayers train --corpus READY` to the first optimizer step, in a
`save_pretrained` and a `save_memory` of a small model with memories, and in a `doctor`; for the saves also how often a
function in one of them calls one in another, directly or through others' code. Functions that are called while a module
is imported count, as the command meets them.
"""

import contextlib
import inspect
import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import memlayers
import memlayers.cli
import memlayers.optim

PACKAGE = f"{Path(memlayers.__file__).parent}/"
TINY = {
    "model.layers": 1, "model.dim": 16, "model.heads": 2, "model.context": 16, "memory_layers": "[1]",
    "memory.heads": 1, "memory.topk": 2, "memory.num_subkeys": 4, "memory.query_dim": 8, "training.tokens": 64,
    "training.batch_tokens": 64, "training.eval_every_tokens": 64, "training.eval_tokens": 100,
}  # fmt: skip


class Walk:
    """The files of the package whose functions are called, and the calls from one of them to another."""

    def __init__(self, until: str | None = None) -> None:
        self.until = until  # the name of a method of an optimizer, at whose first call the walk ends
        self.files: set[str] = set()
        self.crossings = 0
        self._open = True

    @contextlib.contextmanager
    def followed(self) -> Iterator["Walk"]:
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        try:
            yield self
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        file = _file(frame) if self._open and event == "call" else None
        if file is None:
            return
        if frame.f_code.co_name == self.until and file.startswith("optim/"):
            self._open = False
        self.files.add(file)
        caller = frame.f_back
        while caller is not None and _file(caller) is None:
            caller = caller.f_back
        self.crossings += caller is not None and _file(caller) != file


def _file(frame: FrameType) -> str | None:
    """The file of ours whose function this is; None for others' functions, and for bodies of modules and classes."""
    name = frame.f_code.co_filename
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED or not name.startswith(PACKAGE):
        return None
    return name.removeprefix(PACKAGE)


def small() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from memlayers.models import causal_lm  # imported in its turn by the command that is followed

    torch.manual_seed(0)
    model = causal_lm("gpt2", vocab_size=64, layers=2, dim=16, heads=2, context=16)
    config = memlayers.MemoryConfig(dim=16, heads=1, topk=2, num_subkeys=8, query_dim=8)
    memlayers.add_memory(model, config, layers=[2], mode="parallel")
    tokens = torch.randint(64, (8, 16))
    return model, {"input_ids": tokens, "labels": tokens}


def quietly(*arguments: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = memlayers.cli.main([*arguments])
    if status:
        raise SystemExit(f"memlayers {arguments[0]}: {said.getvalue()}")


def prepare_tokens(folder: Path) -> None:
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"id": i, "text": f"tea cup pot milk {i} " * 20}) + "\n" for i in range(100)))
    data = ["--data.sources", json.dumps([str(text)]), "--data.vocab_size", "270", "--data.holdout_percent", "10"]
    quietly("prepare", "--output", str(folder / "corpus"), *data)


def to_the_first_step(folder: Path) -> None:
    settings = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    with Walk(until="step").followed() as walk:
        quietly("train", "--corpus", str(folder / "corpus"), "--output", str(folder / "run"), *settings)
    print(f"memlayers train --corpus READY, to the first step: {len(walk.files)} files")
    print("  " + " ".join(sorted(walk.files)))


def main() -> None:
    if len(sys.argv) > 1:  # in a process of its own, where `main` still has everything to import
        to_the_first_step(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_tokens(folder)
        subprocess.run([sys.executable, __file__, name], check=True)
        model, batch = small()
        model.save_pretrained(folder / "first")  # imports what saving takes, which passes through our import hook
        with Walk().followed() as walk:
            model.save_pretrained(folder / "whole")
        print(f"save_pretrained: {len(walk.files)} files, {walk.crossings} calls from one to another")
        with Walk().followed() as walk:
            memlayers.save_memory(model, folder / "memory")
        print(f"save_memory: {len(walk.files)} files, {walk.crossings} calls from one to another")
        optimizer = memlayers.optim.MemoryAdamW(model, lr=1e-3, value_lr=1e-2)
        with Walk().followed() as walk:
            memlayers.doctor(model, batch, optimizer=optimizer)
        print(f"doctor: {len(walk.files)} files")


if __name__ == "__main__":
    main()
