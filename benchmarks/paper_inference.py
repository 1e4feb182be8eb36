"""Inference speed of the paper's 12-layer model with a memory against 24 layers without, on random weights.

    python benchmarks/paper_inference.py [--num_subkeys '[128,256,512,1024]'] [--batch_windows 2] [--repeats 5]

One run, interleaved: `paper-12x1024` with memories of 16k to 1M slots, the same without a memory (the most that one
could reach), and `paper-24x1024`. The 12-layer models share all weights but the memory's. Random tokens; speeds in
tokens, which have the ratios of words. Needs 12 GB of memory.
"""

import dataclasses

import numpy as np
import torch
from jsonargparse import auto_cli

from memlayers import MemoryLayer
from memlayers.hardware import hardware, versions
from memlayers.layer import memory_layers
from memlayers.lm.build import build_model, pick_device, resolve_precision
from memlayers.lm.data import DOCUMENT, Split
from memlayers.lm.evaluate import measure_speed
from memlayers.lm.presets import preset
from memlayers.minimal import MinimalMemory
from memlayers.parameters import count_parameters


@torch.no_grad()
def check(layer: MemoryLayer) -> None:
    """No speed without a right result: the layer must be the one-page layer, which has the same weights here."""
    config = layer.config
    with torch.device("meta"):
        minimal = MinimalMemory(config.dim, config.heads, config.topk, config.num_subkeys, config.query_dim)
    weights = {
        "query.weight": layer.query.projections[0].weight,
        "query.bias": layer.query.projections[0].bias,
        "norm.weight": layer.query.norm.weight.flatten(),
        "norm.bias": layer.query.norm.bias.flatten(),
        "norm.running_mean": layer.query.norm.running_mean.flatten(),
        "norm.running_var": layer.query.norm.running_var.flatten(),
        "norm.num_batches_tracked": torch.tensor(0),
        "keys": layer.keys.weight,
        "values": layer.values.weight,
    }
    minimal.load_state_dict(weights, assign=True)
    x = torch.randn(64, config.dim, device=layer.values.weight.device)
    torch.testing.assert_close(layer.eval()(x), minimal.eval()(x), rtol=1e-4, atol=1e-4)


def share_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Give `model` the weights of `other` wherever both have a weight of that name and shape."""
    weights = dict(other.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            same = weights.get(f"{path}.{name}")
            if same is not None and same.shape == weight.shape:
                setattr(module, name, same)


def main(
    num_subkeys: tuple[int, ...] = (128, 256, 512, 1024),
    batch_windows: int = 2,
    repeats: int = 5,
    new_tokens: int = 64,
) -> None:
    """Prints one line a model.

    Args:
        num_subkeys: a memory of so many squared slots each
        batch_windows: windows read at a time
        repeats: medians are over so many runs of each model
        new_tokens: tokens written
    """
    with_memory, deep = preset("paper-12x1024").run(), preset("paper-24x1024").run()
    configs = {"12 layers": dataclasses.replace(with_memory, memory_layers=()), "24 layers": deep}
    for number in num_subkeys:
        memory = dataclasses.replace(with_memory.memory, num_subkeys=number)
        configs[f"12 layers + {memory.slots:,} slots"] = dataclasses.replace(with_memory, memory=memory)
    device = pick_device()
    vocab_size, context = with_memory.data.vocab_size, with_memory.model.context
    models = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        models[name] = build_model(config, vocab_size=vocab_size, eot_id=0).to(device).eval()
        if config.memory_layers:
            share_weights(models[name], models["12 layers"])
        for layer in memory_layers(models[name]).values():
            check(layer)
    tokens = np.random.default_rng(0).integers(vocab_size, size=batch_windows * context, dtype=np.uint16)
    text = Split(tokens=tokens, documents=np.array([(0, len(tokens), len(tokens))], dtype=DOCUMENT))
    speeds = measure_speed(
        models,
        text,
        context=context,
        precision=resolve_precision("auto", device),
        batch_windows=batch_windows,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    print(hardware(), versions())
    for name, speed in speeds.items():
        reads = [
            speed.prefill_tokens_per_s / speeds[other].prefill_tokens_per_s for other in ("12 layers", "24 layers")
        ]
        writes = [speed.decode_tokens_per_s / speeds[other].decode_tokens_per_s for other in ("12 layers", "24 layers")]
        print(
            f"{name:28} {count_parameters(models[name])['total'] / 1e6:6.0f} M parameters"
            f"  reads {speed.prefill_tokens_per_s:8.1f} tokens/s = {reads[0]:.3f} x 12 layers, {reads[1]:.2f} x 24"
            f"  writes {speed.decode_tokens_per_s:6.2f} tokens/s = {writes[0]:.3f} x 12 layers, {writes[1]:.2f} x 24"
        )


if __name__ == "__main__":
    auto_cli(main)
