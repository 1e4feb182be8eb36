"""Memories in TRL's trainers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from memlayers import MemoryConfig
from memlayers.models import add_memory, causal_lm, freeze_base, memory_layers
from memlayers.optim import MemoryAdamW

pytestmark = [
    pytest.mark.slow,  # importing TRL takes seconds
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore::DeprecationWarning"),
]

LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def model_with_memory():
    model = causal_lm("llama", vocab_size=10, layers=2, dim=16, heads=2, context=32)
    memory = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
    add_memory(model, memory, [1], mode="parallel")
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.ones_(parameter)
    return model


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate("abcdefgh?.")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".", pad_token=".", unk_token="?")


def settings(kind, folder, **more):
    return kind(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


@pytest.fixture
def trainer_of(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": "a b c d e f g h"}] * 8)
    config = settings(trl.SFTConfig, tmp_path)

    def make(model, **options):
        return trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, **options)

    return make


def moved(trainer):
    (memory,) = memory_layers(trainer.model).values()
    before = memory.values.weight.detach().clone()
    trainer.train()
    return not torch.equal(memory.values.weight, before)


@pytest.mark.promise(
    "Trainers",
    "TRL: `SFTTrainer(memory_model, peft_config=LoraConfig(...))`",
    "supported",
    "it freezes the memory, which is said; `freeze_base(trainer.model)` before `trainer.train()` has both trained",
)
def test_a_trainer_that_is_given_peft_config_says_that_it_freezes_the_memory(trainer_of):
    trainer = trainer_of(model_with_memory(), peft_config=LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="in a trainer on trainer.model before trainer.train"):
        assert not moved(trainer)
    trainer = trainer_of(model_with_memory(), peft_config=LoraConfig(**LORA))
    freeze_base(trainer.model)
    assert moved(trainer)


@pytest.mark.promise(
    "Trainers",
    "TRL's `SFTTrainer` of a memory, alone or beside adapters that are there already",
    "supported",
    "with its own optimizer (dense) or `MemoryAdamW`",
)
def test_a_trainer_that_is_given_a_prepared_model_trains_the_memory(trainer_of):
    assert moved(trainer_of(freeze_base(model_with_memory())))
    model = freeze_base(get_peft_model(model_with_memory(), LoraConfig(**LORA)))
    assert moved(trainer_of(model, optimizers=(MemoryAdamW(model, lr=0.1, value_lr=0.1), None)))


@pytest.mark.promise(
    "Trainers",
    "TRL's `DPOTrainer` of a memory",
    "supported",
    "`precompute_ref_log_probs=True` asks the model as it is before the first step, and holds no second one",
)
def test_preferences_train_the_memory_and_the_reference_is_the_model_before(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = freeze_base(model_with_memory())
    pairs = datasets.Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}] * 8)
    config = settings(trl.DPOConfig, tmp_path, precompute_ref_log_probs=True, logging_steps=1)
    optimizer = MemoryAdamW(model, lr=0.1, value_lr=0.1)
    trainer = trl.DPOTrainer(
        model,
        args=config,
        train_dataset=pairs,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    base = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    assert moved(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # chosen and rejected are as likely as the reference has them
    assert losses[1] < losses[0]
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in base.items())
