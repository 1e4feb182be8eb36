"""What 8 and 4 bits cost a trained run: its loss with tables of floats, of few bits, and with its memory at zero.

    python benchmarks/low_bits.py RUN [--corpus FOLDER] [--split validation] [--tokens 200000]

All on the same text and in float32 but for the tables. Perplexity is compared with that of the floats; the loss at zero
says what the memory is worth, and so what there is to lose.
"""

import math

import torch
from jsonargparse import auto_cli
from torch import nn

from memlayers import quantize_memory
from memlayers.lm.build import pick_device
from memlayers.lm.data import open_corpus
from memlayers.lm.evaluate import evaluate
from memlayers.lm.run import RunFolder
from memlayers.values import value_tables


def main(run: str, corpus: str | None = None, split: str = "validation", tokens: int = 200_000) -> None:
    """Prints a line for each."""
    folder, device = RunFolder(run), pick_device()
    context = folder.read_config().model.context
    text = getattr(open_corpus(corpus or folder.read_result()["data"]["folder"]), split)
    losses: dict[str, float] = {}
    for name in ("float", "int8", "int4", "zero"):
        model = folder.load_model(device)
        if name.startswith("int"):
            quantize_memory(model, int(name.removeprefix("int")))
        elif name == "zero":
            set_to_zero(model)
        losses[name] = evaluate(model, text, tokens=tokens, context=context).loss
        change = 100 * math.expm1(losses[name] - losses["float"])
        perplexity = math.exp(losses[name])
        print(f"{name:5}  loss {losses[name]:.6f}  perplexity {perplexity:.4f}  {change:+.4f} %", flush=True)
    print(f"the memory is worth {losses['zero'] - losses['float']:.4f} nats a token")


@torch.no_grad()
def set_to_zero(model: nn.Module) -> None:
    """Of the memories, what they say."""
    for table in value_tables(model):
        table.weight.zero_()


if __name__ == "__main__":
    auto_cli(main)
