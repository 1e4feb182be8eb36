"""Peak memory of one training step, in a process of its own: `python -m memlayers.bench.peak '{...}'`.

What is reported is the peak less what the process held before, with torch and this package imported.
"""

import dataclasses
import json
import subprocess
import sys

import torch

from memlayers.bench.machine import threads
from memlayers.bench.shapes import Shape
from memlayers.bench.training import make_steps
from memlayers.hardware import peak_bytes

_STEPS = 3


def measure(name: str, shape: Shape, device: torch.device) -> tuple[int | None, str]:
    """Peak bytes of a contender of `memlayers.bench.training`, or None and why there are none."""
    order = {
        "name": name,
        "shape": dataclasses.asdict(shape),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "memlayers.bench.peak", json.dumps(order)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return None, f"{name}: {lines[-1]}"
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["bytes"], "; ".join(answer["notes"])


def main(order: dict) -> dict:
    """In the process of its own."""
    device = torch.device(order["device"])
    with threads(order["threads"]):
        torch.zeros(1, device=device)
        before = peak_bytes(device)
        steps, notes = make_steps((order["name"],), Shape(**order["shape"]), device)
        for step in steps.values():
            for _ in range(_STEPS):
                step()
        return {"bytes": peak_bytes(device) - before if steps else None, "notes": notes}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
