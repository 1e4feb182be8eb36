"""transformers.Trainer in two processes."""

import os

import pytest
import torch

from memlayers import MemoryConfig, SlotCounts, add_memory
from memlayers.models import causal_lm, memory_layers
from memlayers.optim import MemoryAdamW


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.randint(50, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": torch.where(torch.arange(12) < 4, -100, tokens)}


def train(rank, folder, steps, resume, slots=None):
    # Here and not above: who only collects these tests need not wait for it.
    from transformers import Trainer, TrainingArguments

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }
    torch.manual_seed(rank if slots is None else 0)  # tables that begin differently, or old text that reads the same
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=16)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=20, query_dim=8, query_norm="rms"), layers=[2])
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=steps,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",  # which does not know of a later end
    )
    settings = {"lr": 1e-3, "value_lr": 1e-2, "value_max_grad_norm": 0.1}
    callbacks = []
    if slots is not None:
        from memlayers.finetuning import MemoryFinetuning  # as above

        with SlotCounts(model) as counts, torch.no_grad():
            model(torch.arange(48).view(4, 12))
        callbacks = [MemoryFinetuning(counts, method="kl", slots=slots)]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=(MemoryAdamW.for_trainer, settings),
        callbacks=callbacks,
    )
    assert arguments.world_size == 2
    trainer.train(resume_from_checkpoint=resume)
    (layer,) = memory_layers(model).values()
    state = trainer.optimizer.optimizer.state[layer.values.weight]
    return {**model.state_dict(), **state}


@pytest.mark.slow
@pytest.mark.promise(
    "Several processes", "`transformers.Trainer` in several processes, with resume", "supported", "bit for bit"
)
def test_replicas_of_a_trainer_are_the_same_and_a_run_is_resumed(pair, tmp_path):
    one, other = pair(train, str(tmp_path / "whole"), 4, None)
    pair(train, str(tmp_path / "halves"), 2, None)
    resumed, _ = pair(train, str(tmp_path / "halves"), 4, True)
    assert int(one["steps"].max()) > 1
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
def test_all_ranks_choose_the_rows_that_the_batches_of_all_of_them_read(pair, tmp_path):
    one, other = pair(train, str(tmp_path), 3, None, 5)
    assert 0 < int((one["steps"] > 0).sum()) <= 15
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
