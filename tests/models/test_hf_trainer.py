import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from memlayers.models import memory_layers

IDS = torch.arange(24).view(2, 12)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(0, 40, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.arange(12) < 12 - index}


def trainer(model, folder, *, checkpointing=False, **options):
    # Renamed in transformers 5; the old name warns.
    name = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    options[f"{name}_checkpointing"] = checkpointing
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        learning_rate=1e-3, save_steps=1, eval_steps=1, eval_strategy="steps", report_to="none", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.promise("Saving and loading", "`trainer.save_model` and `from_pretrained`", "supported", "the same logits")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trained_saved_and_loaded(with_memory, tmp_path, checkpointing):
    before = logits(with_memory)
    mine = trainer(with_memory, tmp_path / "run", checkpointing=checkpointing)
    mine.train()
    mine.save_model(tmp_path / "saved")
    assert not torch.equal(logits(with_memory), before)
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-3"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(loaded), logits(with_memory))
        first, second = memory_layers(loaded).values()
        assert first.values is second.values


@pytest.mark.promise("Trainers", "`load_best_model_at_end`", "supported", "")
def test_the_best_model_comes_back(with_memory, tmp_path):
    # The highest loss, so that it is the first checkpoint and not what the model holds at the end.
    mine = trainer(with_memory, tmp_path, load_best_model_at_end=True, greater_is_better=True)
    mine.train()
    best = mine.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-1")
    assert torch.equal(logits(with_memory), logits(AutoModelForCausalLM.from_pretrained(best)))
    first, second = memory_layers(with_memory).values()
    assert first.values.weight is second.values.weight


def test_resumed_from_a_checkpoint(with_memory, tmp_path):
    trainer(with_memory, tmp_path).train()
    finished = logits(with_memory)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    for parameter in fresh.parameters():
        parameter.data.normal_()
    resumed = trainer(fresh, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(fresh), finished)
