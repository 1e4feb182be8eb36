"""The process of one run: reads what to do from its standard input, and ends when that is closed.

Its parent holds the other end, which the system closes however the parent ends: the run then writes a checkpoint and
goes on another time. Exit status 0: the result is on the disk.
"""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from memlayers.experiments.records import FORMAT, Record
from memlayers.files import sole_user, write_sealed
from memlayers.hardware import hardware, versions
from memlayers.lm.config import RunConfig
from memlayers.lm.data import open_corpus
from memlayers.lm.faults import Diverged
from memlayers.lm.run import RunFolder
from memlayers.lm.train import train


def work(request: dict[str, Any]) -> None:
    """Train a run, from where it was left, and leave its record."""
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    folder, result = Path(request["folder"]), Path(request["result"])
    config = RunConfig.from_dict(request["config"])
    corpus = open_corpus(request["corpus"])
    folder.mkdir(parents=True, exist_ok=True)
    with sole_user(folder, waiting=f"waiting for another process, which ends its work on {folder}"):
        if not result.exists():
            try:
                found = train(config, folder / "run", corpus=corpus, resume=True, progress=False)
                record = record_of(found)
            except Diverged as fault:  # a result, too: at these settings there is no model
                record = {
                    "config": config.to_dict(),
                    "failed": str(fault).rpartition("; ")[0],
                    "versions": versions(),
                    "hardware": hardware(),
                }
            write_sealed(result, {"format": FORMAT, "key": request["key"], **record})
        if not (request["keep_models"] and RunFolder(folder / "run").finished):
            shutil.rmtree(folder)


def record_of(result: Record) -> Record:
    """What is kept of a run's `result.json`. All that two equal runs differ in stands under ``time``."""
    names = ("config", "precision", "device", "parameters", "versions", "hardware")
    data, training = dict(result["data"]), result["training"]
    del data["folder"]
    validation = result["validation"]
    usage = {
        name: {"tokens": memory["tokens"], "slots": memory["slots"], "overall": memory["overall"]}
        for name, memory in validation["usage"].items()
    }
    curve = [{name: value for name, value in place.items() if name != "seconds"} for place in result["curve"]]
    return {
        **{name: result[name] for name in names},
        "data": data,
        "tokens": training["tokens"],
        "steps": training["steps"],
        "curve": curve,
        "validation": {**validation, "usage": usage},
        "failed": None,
        "time": {
            "finished": result["finished"],
            **{name: training[name] for name in ("seconds", "tokens_per_s", "words_per_s")},
            "curve_seconds": [place["seconds"] for place in result["curve"]],
        },
    }


def end_with_parent() -> None:
    """Have this process asked to end, as by a signal, once nobody holds the other end of its standard input."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # not of the buffer, whose lock the end of the process would wait for
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    asked = json.loads(sys.stdin.buffer.readline())
    end_with_parent()
    work(asked)
