"""MemoryFinetuning in transformers.Trainer."""

import copy
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from memlayers import MemoryConfig, SlotCounts, add_memory, select_slots
from memlayers.diagnosis import MemoryAlarms, MemoryWarning
from memlayers.finetuning import MemoryFinetuning, memory_diff
from memlayers.models import causal_lm, freeze_base
from memlayers.optim import MemoryAdamW
from memlayers.values import value_tables


def ids_of(count, seed):
    return torch.randint(10, 49, (count, 12), generator=torch.Generator().manual_seed(seed))


def make():
    torch.manual_seed(0)
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=96)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=8, query_dim=8, query_norm="rms"), layers=[1])
    model.config.bos_token_id = 49
    freeze_base(model)
    for table in value_tables(model):
        model.requires_grad_(False)
        table.weight.requires_grad_(True)
    return model.eval()


@pytest.fixture(scope="module")
def counts():
    model = make()
    with SlotCounts(model) as counts, torch.no_grad():
        for seed in range(3):
            model(ids_of(4, seed))
    return counts


def facts(count=16):
    return [{"input_ids": ids, "labels": torch.where(torch.arange(12) < 9, -100, ids)} for ids in ids_of(count, 9)]


def train(folder, callbacks, data=None, resume=None, **settings):
    model = make()
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **settings})
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data or facts(),
        optimizer_cls_and_kwargs=(MemoryAdamW.for_trainer, {"value_lr": 0.1}),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def chosen(trainer):
    (rows,) = trainer.optimizer.optimizer.chosen_rows.values()
    return set(rows.tolist())


def test_each_step_moves_the_slots_of_its_batch(counts, tmp_path):
    """Of all micro-batches, and not those that an evaluation reads."""
    seen = []

    class Look(MemoryFinetuning):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            super().on_pre_optimizer_step(args, state, control, model=model, optimizer=optimizer, **kwargs)
            (reads,), (rows,) = self._new.reads.values(), optimizer.optimizer.chosen_rows.values()
            expected = select_slots(model, counts, self._new, slots=3)
            seen.append((int(reads.sum()), rows.tolist(), *(one.tolist() for one in expected.values())))

    alarms = MemoryAlarms(every=1)
    model, _ = train(tmp_path, [alarms, Look(counts, slots=3)])
    assert [reads for reads, _, _ in seen] == [4 * 12 * 4] * 4  # rows, tokens, slots of a token
    assert all(rows == expected and len(rows) == 3 for _, rows, expected in seen)
    assert alarms.raised == {}
    moved = {slot for one in memory_diff(model, make()).tables.values() for slot in one.slots_R.tolist()}
    assert moved
    assert moved <= {slot for _, rows, _ in seen for slot in rows}
    assert [*model._forward_hooks, *model._forward_pre_hooks] == []


def test_rows_that_were_chosen_before_hold_for_the_run_and_for_one_that_is_resumed(counts, tmp_path):
    plain = make()
    new = select_slots(plain, counts, {"input_ids": ids_of(16, 9)}, method="kl", slots=5)

    def callback(model_rows):
        class AtBegin(MemoryFinetuning):
            def on_train_begin(self, args, state, control, model=None, **kwargs):
                self.rows = dict(zip(value_tables(model), model_rows, strict=True))
                super().on_train_begin(args, state, control, model=model, **kwargs)

        return AtBegin(rows=new)

    model, trainer = train(tmp_path, [callback(new.values())], save_strategy="steps", save_steps=2)
    assert chosen(trainer) == {int(slot) for rows in new.values() for slot in rows}
    resumed, again = train(tmp_path, [callback([[0]])], resume=str(tmp_path / "checkpoint-2"))
    assert chosen(again) == chosen(trainer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_labels_that_teach_nothing_are_a_warning_once(counts, tmp_path):
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in facts()]
    with pytest.warns(MemoryWarning, match="the loss covers all tokens of 2 rows of at most 12") as said:
        train(tmp_path, [MemoryFinetuning(counts, slots=3)], whole, max_steps=2)
    assert len([one for one in said if issubclass(one.category, MemoryWarning)]) == 1
    packed = copy.deepcopy(facts())
    for row in packed:
        row["input_ids"][::4] = 49
    with pytest.warns(MemoryWarning, match="6 short texts are packed into 2 rows"):
        train(tmp_path, [MemoryFinetuning(counts, slots=3)], packed, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryWarning)
        train(tmp_path, [MemoryFinetuning(counts, slots=3)], max_steps=1)


def test_other_optimizers_and_arguments_that_do_not_go_together_are_refused(counts, tmp_path):
    for how, named in (
        ({}, "either counts of background text must be given, or rows"),
        ({"counts": counts, "rows": {}, "slots": 3}, "and not both"),
        ({"counts": counts}, "slots must be an integer of at least 1, got None"),
        ({"rows": {}, "slots": 3}, "slots must be None with rows, which were chosen already, got 3"),
    ):
        with pytest.raises(ValueError, match=named):
            MemoryFinetuning(**how)
    callback = MemoryFinetuning(counts, slots=3)
    with pytest.raises(ValueError, match="must train value tables by rows .* got a AdamW without"):
        callback.on_train_begin(None, None, None, model=make(), optimizer=torch.optim.AdamW(make().parameters()))
