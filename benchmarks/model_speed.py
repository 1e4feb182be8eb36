"""Speed of a whole model with a memory to that of the same model without: training, and writing a token at a time.

    python benchmarks/model_speed.py [--num_subkeys 1024] [--layers 12] [--dim 1024] [--rounds 11]
    python benchmarks/model_speed.py --num_subkeys 16 --layers 2 --dim 32 --heads 2 --query_dim 16 --vocab_size 128 \
        --context 32 --batch 2 --steps 1 --rounds 2 --new_tokens 8            # a toy, for a CPU

A GPT-2 of 12 blocks of width 1024 with random weights; its memory, of 4 heads and 32 rows a head, stands for the FFN of
the block at three quarters of the depth. Random tokens, interleaved rounds, ratios of the same round.

Training: float32 weights under bfloat16 autocast, as `transformers.Trainer(bf16=True)` trains, a table in float32;
`MemoryAdamW` for both models, its dense part fused. Time is on the wall, several steps at a time, with a busy queue.

Writing: weights and table cast to bfloat16, as one loads a model to use it (float32 on a CPU), a batch of one,
greedily, three ways: eager; eager with the memory as a captured graph (`memlayers.inference.captured_decoding`); the
model compiled with CUDA graphs and a static cache. The last two need a GPU.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from memlayers import MemoryConfig, inference
from memlayers.bench import gate
from memlayers.bench.machine import commit, gpu_of, kernels_on
from memlayers.bench.shapes import Shape
from memlayers.hardware import hardware, versions
from memlayers.lm.build import pick_device
from memlayers.models import add_memory, causal_lm
from memlayers.optim import MemoryAdamW
from memlayers.parameters import count_parameters
from memlayers.values import value_tables

WITH, WITHOUT = "with a memory", "without"


def main(
    num_subkeys: int = 1024,
    layers: int = 12,
    dim: int = 1024,
    heads: int = 16,
    query_dim: int = 512,
    vocab_size: int = 32_000,
    context: int = 1024,
    batch: int = 8,
    steps: int = 4,
    rounds: int = 11,
    new_tokens: int = 128,
    device: str | None = None,
) -> None:
    """Prints tokens a second of both models, and their ratio.

    Args:
        num_subkeys: of the memory, which has the square of it as slots
        layers: blocks of the model
        dim: width of the model
        heads: of attention
        query_dim: width of a query of the memory
        vocab_size: tokens of the vocabulary
        context: tokens of a sequence in training
        batch: sequences of a step
        steps: steps of a model in a round
        rounds: medians are over so many
        new_tokens: tokens written in a round
        device: cpu or cuda; null: the GPU if there is one
    """
    where = pick_device() if device is None else torch.device(device)
    memory = MemoryConfig(dim=dim, heads=4, topk=min(32, num_subkeys), num_subkeys=num_subkeys, query_dim=query_dim)
    _open_gate(memory, where)
    models = {}
    for name in (WITH, WITHOUT):
        torch.manual_seed(0)
        with torch.device(where):
            models[name] = causal_lm(
                "gpt2", layers=layers, dim=dim, heads=heads, context=context, vocab_size=vocab_size
            )
            if name == WITH:
                add_memory(models[name], memory)
    print(hardware(), versions(), gpu_of(where) if where.type == "cuda" else "", kernels_on(where), commit())
    for name, model in models.items():
        print(f"{name}: {count_parameters(model)['total'] / 1e6:.0f} M parameters")
    ids_BT = torch.randint(vocab_size, (batch, context), device=where)
    tokens = steps * ids_BT.numel()
    _report("training", _rounds(_training(models, ids_BT, steps), rounds, where), tokens)
    gc.collect()
    for model in models.values():
        model.zero_grad()
        for table in value_tables(model):
            table.release()
        model.eval().to(torch.bfloat16 if where.type == "cuda" else torch.float32)
    prompt_1T = ids_BT[:1, : min(16, context // 2)]
    new_tokens = min(new_tokens, context - prompt_1T.shape[1])
    for way, calls in _ways_to_write(models, prompt_1T, new_tokens, where):
        try:
            _report(f"writing, {way}", _rounds(calls, rounds, where), new_tokens)
        except Exception as error:  # of a compiler, say: the other ways are measured all the same
            print(f"writing, {way}: does not run: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")


def _open_gate(memory: MemoryConfig, device: torch.device) -> None:
    """No speed without a right result."""
    whole = Shape(
        name="the memory",
        dim=memory.dim,
        value_dim=memory.width,
        heads=memory.heads,
        topk=memory.topk,
        num_subkeys=memory.num_subkeys,
        query_dim=memory.query_dim,
    )
    for smaller in gate.smaller_shapes(whole):
        gate.check(smaller, device)


def _training(models: dict[str, nn.Module], ids_BT: Tensor, steps: int) -> dict[str, Callable[[], None]]:
    """Some steps of each model."""

    def steps_of(model: nn.Module) -> Callable[[], None]:
        optimizer = MemoryAdamW(model, lr=1e-4)
        for group in optimizer.param_groups:
            if "fused" in group:  # the dense part's
                group["fused"] = True

        def call() -> None:
            for _ in range(steps):
                with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=ids_BT.device.type == "cuda"):
                    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return call

    return {name: steps_of(model.train()) for name, model in models.items()}


def _ways_to_write(
    models: dict[str, nn.Module], prompt_1T: Tensor, new_tokens: int, device: torch.device
) -> Iterator[tuple[str, dict[str, Callable[[], Tensor]]]]:
    def eager(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: write(model, model, DynamicCache(config=model.config), prompt_1T, new_tokens)

    calls = {name: eager(model) for name, model in models.items()}
    yield "eager", calls
    if device.type != "cuda":
        return
    with inference.captured_decoding(models[WITH]):
        yield "eager, memory captured", calls
    yield "compiled, static cache", {name: _compiled(model, prompt_1T, new_tokens) for name, model in models.items()}


def _compiled(model: nn.Module, prompt_1T: Tensor, new_tokens: int) -> Callable[[], Tensor]:
    step = torch.compile(model, mode="reduce-overhead")
    cache = StaticCache(config=model.config, max_cache_len=prompt_1T.shape[1] + new_tokens)

    def call() -> Tensor:
        cache.reset()
        return write(model, step, cache, prompt_1T, new_tokens)

    return call


@torch.no_grad()
def write(model: nn.Module, step: nn.Module, cache: DynamicCache | StaticCache, prompt_1T: Tensor, new_tokens: int):
    """Tokens [1, new_tokens], each the most likely one; the first from the prompt, by `model`, the others by `step`."""
    chosen_11 = model(input_ids=prompt_1T, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    written = [chosen_11]
    for _ in range(new_tokens - 1):
        torch.compiler.cudagraph_mark_step_begin()
        # A graph of the compiled step gives its results in the same place each time.
        chosen_11 = step(input_ids=chosen_11, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1).clone()
        written.append(chosen_11)
    return torch.cat(written, 1)


def _rounds(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds on the wall of each call in each round; the first two rounds warm up and are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(-2, rounds):
        for name in names if number % 2 else names[::-1]:
            start = _now(device)
            calls[name]()
            seconds = _now(device) - start
            if number >= 0:
                samples[name].append(seconds)
    return samples


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _report(what: str, samples: dict[str, list[float]], tokens: int) -> None:
    speeds = ", ".join(f"{name} {tokens / statistics.median(seconds):,.1f}" for name, seconds in samples.items())
    ratio = statistics.median(other / own for own, other in zip(samples[WITH], samples[WITHOUT], strict=True))
    print(f"{what}: {speeds} tokens/s: {ratio:.3f} x the speed without")


if __name__ == "__main__":
    auto_cli(main)
