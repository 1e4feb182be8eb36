"""Generation with a table that is mapped from its folder, beside the same in memory, each in a process of its own.

    python benchmarks/mapped_generation.py FOLDER [--num_subkeys 1024] [--width 1024] [--prompts 16,512] [--bits 0]

FOLDER gets a base and a memory of random weights, once: 4.3 GB with the sizes above. Before the mapped table is read,
the system drops what it has of its file in memory. Printed are the time to the first token and the tokens a second
after it, the most memory that the process had, and whether both generate the same tokens. Loading, and the check of the
file's SHA-256 with it, come before.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from transformers.generation import BaseStreamer

from memlayers import MemoryConfig, add_memory, load_memory, quantize_memory, save_memory
from memlayers.hardware import peak_bytes
from memlayers.models import causal_lm
from memlayers.storage.saved import SavedTable
from memlayers.values import value_tables

SIZES = {"vocab_size": 8192, "layers": 6, "dim": 1024, "heads": 16, "context": 1024}


def main(
    folder: str,
    num_subkeys: int = 1024,
    width: int = 1024,
    prompts: str = "16,512",
    tokens: int = 64,
    bits: int = 0,
    values: str | None = None,
) -> None:
    """With `values` the measurement in this process; without, both and what they come to."""
    place = Path(folder)
    if values is not None:
        print(json.dumps(measure(place, values, [int(length) for length in prompts.split(",")], tokens)))
        return
    if not (place / "memory_config.json").exists():
        make(place, MemoryConfig(dim=1024, value_dim=width, num_subkeys=num_subkeys, heads=4, topk=32), bits)
    found = {}
    for values in ("memory", "mapped"):
        own = [sys.executable, __file__, folder, f"--prompts={prompts}", f"--tokens={tokens}", f"--values={values}"]
        found[values] = json.loads(subprocess.run(own, check=True, capture_output=True, text=True).stdout)
    for length, in_memory in found["memory"].items():
        mapped = found["mapped"][length]
        print(f"prompt of {length} tokens")
        for name, one in (("memory", in_memory), ("mapped", mapped)):
            print(f"  {name}: first token {one['first']:.2f} s, {one['rate']:.1f} tokens/s, {one['peak_gb']:.2f} GB")
        same = "the same tokens" if mapped["ids"] == in_memory["ids"] else "OTHER TOKENS"
        print(f"  mapped at {100 * mapped['rate'] / in_memory['rate']:.0f} % of the rate, {same}")


def make(place: Path, config: MemoryConfig, bits: int) -> None:
    """A base with a memory in its fourth block."""
    model = add_memory(base(), config, [4], mode="parallel")
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            parameter.data.fill_(1.0)
    save_memory(quantize_memory(model, bits) if bits else model, place)


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return causal_lm("llama", **SIZES).eval()  # type: ignore[arg-type]


def measure(place: Path, values: str, lengths: list[int], tokens: int) -> dict[str, dict[str, object]]:
    """Of each length of the prompt, times and tokens; mapped, each from a cold file."""
    model = load_memory(base(), place, values=values)  # type: ignore[arg-type]
    found: dict[str, dict[str, object]] = {}
    drop(place, model)  # of a file that is in the system's cache, each read maps the pages around a row as well
    generate(model, 3, 2)  # kernels are compiled, or taken from the disk
    for length in lengths:
        drop(place, model)
        times, ids = generate(model, length, tokens + 1)
        found[str(length)] = {
            "first": times[1] - times[0],
            "rate": tokens / (times[-1] - times[1]),
            "peak_gb": peak_bytes(torch.device("cpu")) / 1e9,
            "ids": ids,
        }
    return found


def generate(model: Any, length: int, tokens: int) -> tuple[list[float], list[int]]:
    """The time before a random prompt of that length, the times of the tokens after it, and these."""
    ids = torch.randint(SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    clock = Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        text = model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clock
        )
    return [start, *clock.times[1:]], text[0, length:].tolist()  # the first that it is given is the prompt


class Clock(BaseStreamer):
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def drop(place: Path, model: torch.nn.Module) -> None:
    """Has the process and the system forget the rows of the folder."""
    for table in value_tables(model):
        if isinstance(table, SavedTable):
            table.give_back()
    for file in place.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    auto_cli(main)
