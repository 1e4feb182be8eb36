"""`SaveMemory`: the memory of a PEFT model is in Trainer's checkpoints, and a resumed run goes on with it."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from memlayers import MemoryConfig, load_memory
from memlayers.models import SaveMemory, add_memory, causal_lm, freeze_base, memory_layers, save_memory
from memlayers.models.checkpoints import holds_adapters_alone
from memlayers.optim import MemoryAdamW

# peft asks transformers by a name that was renamed there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)  # with statistics, which are saved, too
STEPS, SAVED = 4, 2


class Tokens(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(40, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def base():
    torch.manual_seed(0)
    return causal_lm("llama", vocab_size=40, layers=3, dim=16, heads=2, context=32, dropout=0.1)


def build(mode="parallel", **lora):
    model = add_memory(base(), MEMORY, [1, 2], mode=mode, share_values=True)
    model = get_peft_model(
        model, LoraConfig(**{"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM", **lora})
    )
    return freeze_base(model)


def trainer(folder, model, *, callbacks=(SaveMemory,), **settings):
    optimizer = MemoryAdamW(model, lr=0.02, value_lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no", max_steps=STEPS,
        per_device_train_batch_size=4, save_steps=SAVED, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=Tokens(), eval_dataset=Tokens(), optimizers=(optimizer, schedule),
        callbacks=[kind() for kind in callbacks],
    )  # fmt: skip


def resumed(folder, model, **options):
    mine = trainer(folder, model, **options)
    mine.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
    return mine


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(first, second):
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


@pytest.mark.promise("Trainers", "a run with LoRA and a memory, resumed", "supported", "with the callback `SaveMemory`")
@pytest.mark.parametrize("mode", ["parallel", "replace"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, mode):
    whole = build(mode)
    start = state(whole)
    trainer(tmp_path, whole).train()
    moved = differing(start, state(whole))
    assert any("lora_B" in name for name in moved)
    assert any(name.endswith("values.weight") for name in moved)
    assert any(name.endswith("running_mean") for name in moved)
    again = build(mode)
    before = dict(again.named_parameters())
    mine = resumed(tmp_path, again)
    assert differing(state(whole), state(again)) == []
    assert all(again.get_parameter(name) is parameter for name, parameter in before.items())
    assert mine.state.global_step == STEPS
    first, second = memory_layers(again).values()
    assert first.values.weight is second.values.weight


def test_without_it_the_memory_is_lost(tmp_path):
    # What this callback is for; should Trainer or PEFT learn to save memories, this test says so.
    whole = build()
    trainer(tmp_path, whole, callbacks=()).train()
    assert not (tmp_path / f"checkpoint-{SAVED}" / "memory").exists()
    again = build()
    resumed(tmp_path, again, callbacks=())
    assert any(".memory." in name for name in differing(state(whole), state(again)))


def test_what_is_in_a_checkpoint_is_what_save_memory_writes(tmp_path):
    model = build()
    trainer(tmp_path / "run", model).train()
    save_memory(model, tmp_path / "alone")
    for file in ("memory.safetensors", "memory_config.json"):
        written = (tmp_path / "run" / f"checkpoint-{STEPS}" / "memory" / file).read_bytes()
        assert written == (tmp_path / "alone" / file).read_bytes()
    loaded = load_memory(base(), tmp_path / "run" / f"checkpoint-{STEPS}" / "memory")
    expected = {name.removeprefix("base_model.model."): tensor for name, tensor in state(model).items()}
    assert [name for name, tensor in memory_state(loaded).items() if not torch.equal(tensor, expected[name])] == []


def memory_state(model):
    return {name: tensor for name, tensor in state(model).items() if ".memory." in name or name.endswith(".gate")}


def test_the_best_memory_comes_back(tmp_path):
    model = build()
    # The highest loss, so that it is the first checkpoint and not what the model holds at the end.
    mine = trainer(
        tmp_path, model, eval_strategy="steps", eval_steps=SAVED, load_best_model_at_end=True, greater_is_better=True
    )
    mine.train()
    best = tmp_path / f"checkpoint-{SAVED}"
    assert mine.state.best_model_checkpoint == str(best)
    kept = memory_state(load_memory(base(), best / "memory"))
    last = memory_state(load_memory(base(), tmp_path / f"checkpoint-{STEPS}" / "memory"))
    now = {name.removeprefix("base_model.model."): tensor for name, tensor in memory_state(model).items()}
    assert kept.keys() == now.keys()
    assert differing(kept, now) == []
    assert differing(last, now) != []


@pytest.mark.parametrize("folder", ["memory", "memory-news"])
def test_a_checkpoint_of_adapters_alone_is_told_from_one_with_memories(tmp_path, folder):
    checkpoint = tmp_path / "checkpoint-2"
    assert not holds_adapters_alone(checkpoint)
    (checkpoint / "second").mkdir(parents=True)
    (checkpoint / folder).mkdir()
    assert not holds_adapters_alone(checkpoint)
    (checkpoint / "second" / "adapter_config.json").touch()
    assert holds_adapters_alone(checkpoint)
    (checkpoint / folder / "memory_config.json").touch()
    assert not holds_adapters_alone(checkpoint)


@pytest.mark.promise(
    "Trainers", "resuming such a run from a checkpoint without a memory", "refused", "one that `SaveMemory` has written"
)
def test_a_checkpoint_without_memories_is_refused(tmp_path):
    trainer(tmp_path, build()).train()
    folder = tmp_path / f"checkpoint-{SAVED}" / "memory"
    shutil.move(folder, tmp_path / "elsewhere")
    model = build()
    before = memory_state(model)
    with pytest.raises(ValueError, match=r"must hold the memories in '\S+checkpoint-2/memory', which is not there"):
        resumed(tmp_path, model)
    assert differing(before, memory_state(model)) == []
    shutil.move(tmp_path / "elsewhere", folder)
    (folder / "memory.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged: it has 4 bytes"):
        resumed(tmp_path, model)
    assert differing(before, memory_state(model)) == []


def test_other_memories_and_another_base_are_refused(tmp_path):
    trainer(tmp_path, build()).train()
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    for layers, config in (([2, 3], MEMORY), ([1, 2], MemoryConfig.from_dict({**MEMORY.to_dict(), "topk": 2}))):
        other = add_memory(base(), config, layers, mode="parallel", share_values=True)
        with pytest.raises(ValueError, match=r"must have the memories that are saved in .*memory', at model.layers.0"):
            resumed(tmp_path, freeze_base(get_peft_model(other, lora)))
    changed = base()
    changed.model.norm.weight.data += 1.0
    other = add_memory(changed, MEMORY, [1, 2], mode="parallel", share_values=True)
    with pytest.raises(ValueError, match=r"must have the base that the memory .* 1 tensors differ, .*norm.weight"):
        resumed(tmp_path, freeze_base(get_peft_model(other, lora)))


def test_what_could_not_be_saved_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="model must have memories that add_memory put there"):
        trainer(tmp_path, base()).train()
    with pytest.raises(ValueError, match="must hold what a new MemoryLayer holds, .* merge or unload adapters"):
        trainer(tmp_path, build(target_modules="all-linear")).train()
    with pytest.raises(ValueError, match=r"must have a frozen base for SaveMemory, .* 29 parameters of the base"):
        trainer(tmp_path, add_memory(base(), MEMORY, [2], mode="parallel")).train()
    assert not any(tmp_path.glob("checkpoint-*"))
