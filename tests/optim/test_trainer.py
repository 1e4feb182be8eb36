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
    elif door == "for_trainer":
        doors = {"optimizer_cls_and_kwargs": (MemoryAdamW.for_trainer, options)}
    else:
        doors = {"optimizer_cls_and_kwargs": (MemoryAdamW, {"model": model, **options})}
    trainer = Trainer(model, arguments(folder, **(settings or {})), train_dataset=Tokens(), **doors)
    trainer.train(**train)
    return model, trainer


@pytest.mark.promise(
    "Trainers", "`optimizers=` or `optimizer_cls_and_kwargs=` of Trainer", "supported", "with `MemoryAdamW`"
)
@pytest.mark.parametrize("door", ["optimizers", "optimizer_cls_and_kwargs", "for_trainer"])
def test_each_door_trains_the_table_and_the_rest(door, tmp_path):
    start = make()
    model, trainer = trained(tmp_path, door)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved == set(start.state_dict())
    assert table_of(model).weight.grad is None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("door", ["optimizer_cls_and_kwargs", "for_trainer"])
def test_all_doors_give_the_same_model(door, tmp_path):
    one, _ = trained(tmp_path / "a", "optimizers")
    other, _ = trained(tmp_path / "b", door)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.promise(
    "Trainers", "`Trainer(model_init=...)`", "supported", "`optimizer_cls_and_kwargs=(MemoryAdamW.for_trainer, {...})`"
)
def test_the_model_of_model_init_is_trained(tmp_path):
    settings = (MemoryAdamW.for_trainer, {"lr": 1e-2, "value_lr": 0.05})
    trainer = Trainer(
        model_init=make, args=arguments(tmp_path), train_dataset=Tokens(), optimizer_cls_and_kwargs=settings
    )
    for _ in range(2):  # each begins with another model, and another optimizer
        trainer.train()
        start = make().state_dict()
        assert {n for n, value in trainer.model.state_dict().items() if not torch.equal(value, start[n])} == set(start)


@pytest.mark.promise(
    "Trainers", "an optimizer built on another model than the Trainer's", "refused", "`MemoryAdamW.for_trainer`"
)
def test_an_optimizer_of_another_model_says_so(tmp_path):
    settings = (MemoryAdamW, {"model": make(), "lr": 1e-2})
    trainer = Trainer(
        model_init=make, args=arguments(tmp_path), train_dataset=Tokens(), optimizer_cls_and_kwargs=settings
    )
    with pytest.raises(RuntimeError, match="not the one that it was built on.*for_trainer"):
        trainer.train()


@pytest.mark.promise("Trainers", "Lightning with `bf16-mixed` and `gradient_clip_val`", "supported", "")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightning_clips_in_bfloat16(algorithm, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return MemoryAdamW(self.model, lr=1e-2, value_lr=0.05)

    module = Lit()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", precision="bf16-mixed", gradient_clip_val=1.0,
        gradient_clip_algorithm=algorithm, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Tokens(), batch_size=8))
    assert not torch.equal(table_of(module.model).weight, table_of(make()).weight)


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
