"""Where the time of a training step goes: the demo's model with a memory and without, on random tokens.

    python benchmarks/profile_training.py [--preset demo] [--steps 25] [--lines 20]

Steps of the two models alternate; then the operations of the one with a memory, by their own time on the CPU.
"""

import dataclasses
import itertools
import statistics
import time

import torch
from jsonargparse import auto_cli
from torch.profiler import ProfilerActivity, profile

from memlayers.hardware import hardware, versions
from memlayers.lm.build import build_model
from memlayers.lm.presets import preset as preset_of
from memlayers.ops import cpu
from memlayers.optim import MemoryAdamW


def main(preset: str = "demo", steps: int = 25, lines: int = 20) -> None:
    """Prints milliseconds of forward, backward and update, and the profile."""
    cpu.compile_all()
    with_memory = preset_of(preset).run()
    vocab_size, context = with_memory.data.vocab_size, with_memory.model.context
    configs = {"with memory": with_memory, "without": dataclasses.replace(with_memory, memory_layers=())}
    models, optimizers = {}, {}
    for name, config in configs.items():
        torch.manual_seed(0)
        models[name] = build_model(config, vocab_size=vocab_size, eot_id=0).train()
        optimizers[name] = MemoryAdamW(models[name])
    tokens = torch.randint(vocab_size, (with_memory.training.batch_tokens // context, context))

    def step(name: str) -> list[float]:
        marks = [time.perf_counter()]
        loss = models[name](input_ids=tokens, labels=tokens).loss
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizers[name].step()
        optimizers[name].zero_grad()
        marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]

    samples: dict[str, list[list[float]]] = {name: [] for name in models}
    for number in range(steps + 3):
        for name in models:
            times = step(name)
            if number >= 3:
                samples[name].append(times)
    print(hardware(), versions())
    for name, rows in samples.items():
        forward, backward, update = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:12} forward {forward:6.1f}  backward {backward:6.1f}  update {update:6.1f} ms")
    ratio = statistics.median(
        sum(other) / sum(own) for own, other in zip(samples["with memory"], samples["without"], strict=True)
    )
    print(f"with a memory it trains at {ratio:.2f} x the speed of the same model without")
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        for _ in range(10):
            step("with memory")
    print(measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=lines, max_name_column_width=50))


if __name__ == "__main__":
    auto_cli(main)
