"""Kill an experiment at random moments, start it again, and see whether its report is that of one that was not killed.

    python benchmarks/kill_grid.py --kills 10

A small grid runs in processes of its own. At random moments the process of the grid is ended, by SIGKILL or SIGTERM, or
that of one of its runs by SIGKILL. In the end the report and the records must be bit for bit those of a grid that was
left alone, but for times; and no process may be left.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jsonargparse import auto_cli

PROGRAM = """
import json, sys
from memlayers.experiments import scales
from memlayers.cli import main

laptop = scales._laptop()
fields = {"model.layers": 1, "model.dim": 16, "model.heads": 2, "model.context": 16, "memory.heads": 2,
          "memory.topk": 4, "memory.num_subkeys": 8, "memory.query_dim": 8, "model.dropout": 0.1,
          "training.batch_tokens": 64, "training.eval_tokens": 300, "training.save_every_tokens": 64 * 20}
small = {"base": scales.changed(laptop["base"], fields), "layer": 1, "several": (), "grid_tokens": 64 * 400,
         "final_tokens": 64 * 400, "noise_seeds": 2, "seeds": 1}
scales._laptop = lambda: {**laptop, **small}
sys.exit(main(sys.argv[1:]))
"""


def write_text(file: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(50)]
    with open(file, "w") as stream:
        for number in range(3000):
            stream.write(json.dumps({"id": number, "text": " ".join(draw.choices(words, k=60))}) + "\n")


def start(folder: Path, output: str) -> "subprocess.Popen[bytes]":
    """The grid, in a process of its own."""
    words = ["reproduce", "noise", "--output", str(folder / output), "--corpus", str(folder / "corpus")]
    with open(folder / f"{output}.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stdout=log, stderr=log)


def workers(folder: Path) -> list[int]:
    """The processes of runs whose files lie in the folder (of Linux)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            place = os.readlink(process / "fd" / "1")
        except OSError:
            continue
        if b"memlayers.experiments.worker" in command and place.startswith(str(folder)):
            found.append(int(process.name))
    return found


def outcome(folder: Path) -> dict[str, object]:
    """All that must be equal: the report's files, and the records without their times."""
    reports = {path.name: path.read_bytes() for path in sorted((folder / "noise").iterdir())}
    records = {}
    for path in sorted((folder / "results").iterdir()):
        record = json.loads(path.read_bytes())
        del record["time"], record["sha256"]
        records[path.name] = record
    return {**reports, **records}


def main(kills: int = 10, seed: int = 0) -> None:
    """Kill a grid and start it again.

    Args:
        kills: in all.
        seed: of the moments, and of what is killed.
    """
    draw, done = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.jsonl")
        prepare = ["prepare", "--output", str(folder / "corpus"), "--data.sources", str(folder / "text.jsonl")]
        subprocess.run([sys.executable, "-m", "memlayers", *prepare, "--data.vocab_size", "300"], check=True)
        started = time.perf_counter()
        assert start(folder, "whole").wait() == 0, (folder / "whole.log").read_text()
        usual = time.perf_counter() - started
        whole, differing, grids, left = outcome(folder / "whole"), set[str](), 0, list[int]()
        while done.total() < kills:
            output, grid = f"killed-{grids}", None
            while True:
                grid = start(folder, output) if grid is None else grid
                try:
                    is_last = done.total() >= kills
                    status = grid.wait(None if is_last else draw.uniform(0.1, 0.6) * usual)
                    assert status == 0, (folder / f"{output}.log").read_text()[-2000:]
                    break
                except subprocess.TimeoutExpired:
                    pass
                running = workers(folder / output)
                what = draw.choice(["grid by SIGKILL", "grid by SIGTERM", "run by SIGKILL"])
                if what.startswith("run"):
                    if running:
                        os.kill(draw.choice(running), signal.SIGKILL)
                        done[what] += 1
                    continue
                number = signal.SIGKILL if what.endswith("KILL") else signal.SIGTERM
                grid.send_signal(number)
                status = grid.wait()
                assert status in (-number, 128 + number), f"{what}: status {status}"
                grid, done[what] = None, done[what] + 1
            killed = outcome(folder / output)
            differing |= {name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name)}
            grids += 1
            time.sleep(1)
            left += workers(folder)
    print(f"kills: {dict(done)}")
    print(f"grids: {grids}; files that differ: {sorted(differing) or 'none'} of {len(whole)}; left: {left or 'none'}")
    sys.exit(bool(differing or left))


if __name__ == "__main__":
    auto_cli(main)
