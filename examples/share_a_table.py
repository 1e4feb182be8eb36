"""Memory+: three layers with queries and keys of their own read one table of values.

    python examples/share_a_table.py [--steps 60]

The model is trained from scratch, for seconds.
"""

import argparse

import torch

from memlayers import UsageMeter, add_memory
from memlayers.models import causal_lm, memory_layers, memory_preset
from memlayers.optim import MemoryAdamW


def main(steps: int = 60) -> float:
    """Returns the last loss."""
    torch.manual_seed(0)
    model = causal_lm("llama", vocab_size=100, layers=6, dim=32, heads=2, context=24)
    add_memory(model, **memory_preset("memory_plus", model, num_subkeys=64, query_dim=32, topk=8))
    memories = memory_layers(model)
    tables = {memory.values for memory in memories.values()}
    print(f"{len(memories)} memories, {len(tables)} table of {[*next(iter(tables)).weight.shape]}")

    optimizer = MemoryAdamW(model, lr=3e-3, value_lr=1e-2)
    texts = torch.randint(100, (16, 24))
    for step in range(steps):
        loss = model(input_ids=texts, labels=texts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    for name, memory in memories.items():
        with UsageMeter(memory) as meter, torch.no_grad():
            model(input_ids=texts)
        print(f"{name}: {meter.report().overall.usage:.0f} % of the slots")
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
