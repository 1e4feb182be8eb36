"""A memory saved by itself, loaded into its base, and text written with it.

    python examples/load_and_generate.py [--base FOLDER_OR_HUB_ID --memory FOLDER_OR_HUB_ID]

Without arguments a tiny base and a memory for it are made first.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from memlayers import load_memory, save_memory
from memlayers.models import add_memory, memory_preset


def make(folder: Path) -> tuple[str, str]:
    """A base and a memory whose gate is open, as after training."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64, "vocab_size": 100}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    add_memory(model, **memory_preset("retrofit", model, num_subkeys=64, query_dim=32))
    torch.nn.init.ones_(model.transformer.h[2].mlp.gate)
    save_memory(model, folder / "memory")
    return str(folder / "base"), str(folder / "memory")


def write(model) -> list[int]:
    prompt = torch.tensor([[1, 2, 3]])
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, num_beams=2, do_sample=False, pad_token_id=0
    )[0].tolist()


def main(base: str | None = None, memory: str | None = None) -> tuple[list[int], list[int]]:
    """Returns what is written by the two ways of loading."""
    with tempfile.TemporaryDirectory() as folder:
        if base is None or memory is None:
            base, memory = make(Path(folder))
        model = load_memory(AutoModelForCausalLM.from_pretrained(base), memory)
        first = write(model)
        # The folder knows its base. Without `import memlayers.models`, by trust_remote_code=True.
        second = write(AutoModelForCausalLM.from_pretrained(memory))
    print(first, second, sep="\n")
    return first, second


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--memory")
    main(**vars(parser.parse_args()))
