"""MemoryAdamW in transformers.Trainer, by both of its doors."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from memlayers import MemoryConfig, add_memory
from memlayers.models import causal_lm, memory_layers
from memlayers.optim import MemoryAdamW


class Tokens(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.randint(50, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def make():
    torch.manual_seed(0)
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=16)
    return add_memory(
        model, MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=8, query_dim=8, query_norm="rms"), layers=[2]
    )


def table_of(model):
    (layer,) = memory_layers(model).values()
    return layer.values


def arguments(folder, **settings):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


def trained(folder, door, *, settings=None, **train):
    model = make()
    options = {"lr": 1e-2, "value_lr": 0.05, "betas": (0.9, 0.98)}
    if door == "optimizers":
        optimizer = MemoryAdamW(model, **options)
        steps = (settings or {}).get("max_steps", 6)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (steps - step) / steps))
        doors = {"optimizers": (optimizer, schedule)}
    else:
        doors = {"optimizer_cls_and_kwargs": (MemoryAdamW, {"model": model, **options})}
    trainer = Trainer(model, arguments(folder, **(settings or {})), train_dataset=Tokens(), **doors)
    trainer.train(**train)
    return model, trainer


@pytest.mark.promise(
    "Trainers", "`optimizers=` or `optimizer_cls_and_kwargs=` of Trainer", "supported", "with `MemoryAdamW`"
)
@pytest.mark.parametrize("door", ["optimizers", "optimizer_cls_and_kwargs"])
def test_both_doors_train_the_table_and_the_rest(door, tmp_path):
    start = make()
    model, trainer = trained(tmp_path, door)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved == set(start.state_dict())
    assert table_of(model).weight.grad is None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_both_doors_give_the_same_model(tmp_path):
    one, _ = trained(tmp_path / "a", "optimizers")
    other, _ = trained(tmp_path / "b", "optimizer_cls_and_kwargs")
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.promise(
    "Trainers",
    "a scheduler of the learning rate",
    "supported",
    "it moves the rate of tables with `schedule_values=True` only",
)
def test_the_values_rate_is_constant_while_the_trainer_s_scheduler_falls(tmp_path):
    _, trainer = trained(tmp_path, "optimizer_cls_and_kwargs")
    groups = trainer.optimizer.param_groups
    assert groups[0]["lr"] == 0
    assert groups[-1]["value_lr"] == 0.05


def test_gradient_accumulation_equals_the_large_batch(tmp_path):
    whole, _ = trained(tmp_path / "a", "optimizers", settings={"max_grad_norm": 0.0, "max_steps": 3})
    parts, _ = trained(
        tmp_path / "b",
        "optimizers",
        settings={
            "max_grad_norm": 0.0,
            "max_steps": 3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
        },
    )
    # Adam divides rounding by rounding where a gradient is nearly zero, so a few entries may differ.
    near = torch.isclose(table_of(parts).weight, table_of(whole).weight, atol=2e-3)
    assert near.float().mean() > 0.98


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, tmp_path):
    plain, _ = trained(tmp_path / "a", "optimizers")
    recomputed, _ = trained(
        tmp_path / "b",
        "optimizers",
        settings={
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        },
    )
    torch.testing.assert_close(table_of(recomputed).weight, table_of(plain).weight, atol=1e-3, rtol=1e-3)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, _ = trained(tmp_path / "a", "optimizers", settings={"save_strategy": "steps", "save_steps": 3})
    resumed, trainer = trained(
        tmp_path / "b", "optimizers", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3")
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    state = next(iter(trainer.optimizer.optimizer._rows.state[table_of(resumed).weight].values()))
    assert state.dtype == torch.float32


def test_16_bit_autocast(tmp_path):
    model, trainer = trained(tmp_path, "optimizers", settings={"bf16": True})
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert table_of(model).weight.dtype == torch.float32


def test_a_copy_of_a_model_in_training_is_dense(tmp_path):
    model, _trainer = trained(tmp_path, "optimizers")
    copied = copy.deepcopy(model)
    tokens = torch.randint(50, (2, 8))
    copied(input_ids=tokens, labels=tokens).loss.backward()
    assert table_of(copied).weight.grad is not None
