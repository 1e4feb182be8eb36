"""One model in several processes: `torchrun --nproc-per-node 2 examples/several_processes.py`, on CPUs or GPUs.

`accelerate launch --multi_gpu --num_processes 2 examples/several_processes.py` does the same. Nothing but the launch is
another than in one process; each process reads its own part of the data.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from memlayers import MemoryConfig, add_memory
from memlayers.models import causal_lm
from memlayers.optim import MemoryAdamW


def main(steps: int = 40) -> float:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = causal_lm("gpt2", vocab_size=100, layers=3, dim=64, heads=4, context=32)
    add_memory(model, MemoryConfig(dim=64, heads=2, topk=8, num_subkeys=64, query_dim=32), layers=[1])
    text = torch.randint(100, (8, 32)).repeat(2 * steps, 1)
    # The optimizer before the wrapper: accelerate has DistributedDataParallel leave the tables to it.
    optimizer = MemoryAdamW(model, lr=3e-3, value_lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, DataLoader(list(text), batch_size=8))
    for step, tokens in zip(range(steps), loader, strict=False):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(f"step {step:3d}: loss {loss.item():.3f} in {accelerator.num_processes} process(es)")
    loss = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.end_training()
    return loss


if __name__ == "__main__":
    main()
