"""What rounding a bfloat16 table costs: a table learns another one from weighted sums of its rows.

    python benchmarks/rounding.py [--steps 4000] [--seeds 3]

Four tables are trained by RowAdam from the same start: float32; bfloat16 rounded to the nearest; bfloat16 rounded
stochastically; and a float32 master that is rounded to bfloat16 for each read. Prints the mean squared error on sums
that were not trained on, a mean over seeds. Takes three minutes on one core.
"""

import statistics

import torch
from jsonargparse import auto_cli
from torch import Tensor

from memlayers import RowAdam, ValueTable

SLOTS, WIDTH, TOKENS, READS = 512, 16, 64, 8
KINDS = ("float32", "bfloat16, nearest", "bfloat16, stochastic", "bfloat16, float32 master")


def weighted_sum(table_SV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return (table_SV[slots_TK] * weights_TK[..., None]).sum(1)


def draw(generator: torch.Generator, tokens: int) -> tuple[Tensor, Tensor]:
    """Slots and weights of some tokens."""
    slots_TK = torch.randint(SLOTS, (tokens, READS), generator=generator)
    return slots_TK, torch.randn(tokens, READS, generator=generator).softmax(-1)


@torch.no_grad()
def train(kind: str, lr: float, steps: int, seed: int) -> float:
    """The error at the end."""
    generator = torch.Generator().manual_seed(seed)
    target_SV, start_SV = torch.randn(2, SLOTS, WIDTH, generator=generator) / WIDTH**0.5
    dtype = torch.bfloat16 if kind in KINDS[1:3] else torch.float32
    table = ValueTable(SLOTS, WIDTH, dtype=dtype)
    table.weight.copy_(start_SV.bfloat16())
    optimizer = RowAdam([table], lr=lr, rounding="nearest" if kind == KINDS[1] else "stochastic")
    as_read = torch.float32 if kind == KINDS[0] else torch.bfloat16
    for _ in range(steps):
        slots_TK, weights_TK = draw(generator, TOKENS)
        error_TV = weighted_sum(table.weight.to(as_read).float() - target_SV, slots_TK, weights_TK)
        table.row_gradient.add(slots_TK, weights_TK, 2 * error_TV / error_TV.numel())
        optimizer.step()
        optimizer.zero_grad()
    hits = draw(torch.Generator().manual_seed(2**31), 8192)
    return weighted_sum(table.weight.to(as_read).float() - target_SV, *hits).square().mean().item()


def main(steps: int = 4000, seeds: int = 3) -> None:
    """Prints a line of Markdown a learning rate."""
    torch.set_num_threads(1)
    print("| learning rate | " + " | ".join(KINDS) + " |\n|" + "---:|" * (len(KINDS) + 1))
    for lr in (1e-2, 1e-3, 3e-4, 1e-4):
        errors = [statistics.mean(train(kind, lr, steps, seed) for seed in range(seeds)) for kind in KINDS]
        print(f"| {lr:g} | " + " | ".join(f"{error:.2e}" for error in errors) + " |", flush=True)


if __name__ == "__main__":
    auto_cli(main)
