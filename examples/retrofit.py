"""A memory beside a pretrained model's FFN, trained by `transformers.Trainer` while the model stays as it is.

    python examples/retrofit.py [--base gpt2] [--output runs/retrofitted] [--steps 60]

Without --base a tiny random Llama stands in for the pretrained model, so that it runs anywhere in seconds.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from memlayers import add_memory, doctor, save_memory
from memlayers.diagnosis.trainer_callback import MemoryAlarms
from memlayers.models import freeze_base, memory_preset, memory_summary
from memlayers.optim import MemoryAdamW


def load(base: str | None):
    if base is not None:
        return AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=64, **sizes))


def main(base: str | None = None, output: str = "runs/retrofitted", steps: int = 60) -> float:
    """Returns the last loss."""
    model = load(base)
    add_memory(model, **memory_preset("retrofit", model, num_subkeys=64))
    freeze_base(model)
    optimizer = MemoryAdamW(model, lr=1e-2, value_lr=3e-2)
    print(memory_summary(model, optimizer))

    # Your own texts, tokenised. Here: some sequences to learn by heart.
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(model.config.vocab_size, (32, 24), generator=draw)
    examples = [{"input_ids": text, "labels": text} for text in texts]
    batch = {"input_ids": texts[:8], "labels": texts[:8]}
    doctor(model, batch, optimizer=optimizer).raise_for_failures()

    arguments = TrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=8, logging_steps=20, save_strategy="no", report_to=[],
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        optimizers=(optimizer, scheduler),
        callbacks=[MemoryAlarms()],
    )
    trainer.train()
    save_memory(model, f"{output}/memory")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--output", default="runs/retrofitted")
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
