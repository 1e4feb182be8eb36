"""`MemoryAlarms` in real training: quiet while all is well, one warning for each thing that is not."""

import gc
import re
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from torch.utils import checkpoint as checkpointing
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from memlayers import MemoryConfig, RowAdam
from memlayers.diagnosis import MemoryAlarms, MemoryWarning, doctor
from memlayers.diagnosis.alarms import Monitor
from memlayers.diagnosis.subjects import find_subjects
from memlayers.models import SaveMemory, add_memory, causal_lm, freeze_base, memory_layers, set_active
from memlayers.models.wrappers import ParallelMemory
from memlayers.optim import MemoryAdamW


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


class Tokens(Dataset):
    def __init__(self, length=32):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        ids = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": (torch.arange(16) < 16 - index % 4).long()}


@pytest.fixture
def model():
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=16)
    return add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])


@pytest.fixture
def train(tmp_path):
    """Trains for six steps; the alarms, and what was warned."""

    def run(model, optimizer, *, every=2, window=64, data=None, warm_up=False, **settings):
        alarms = MemoryAlarms(every=every, window=window)
        settings = {"max_steps": 6, "per_device_train_batch_size": 4, **settings}
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
            save_strategy="no", **settings,
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4 if warm_up else 1.0)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data or Tokens(), optimizers=(optimizer, scheduler),
            callbacks=[alarms],
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MemoryWarning)
            error = None
            try:
                trainer.train()
            except RuntimeError as raised:
                error = raised
        said = [str(one.message) for one in caught if issubclass(one.category, MemoryWarning)]
        assert len(said) == len(alarms.raised)
        alarms.detach()
        return alarms, said, error

    return run


def hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def memory_of(model):
    (memory,) = memory_layers(model).values()
    return memory


def only(result, check, says):
    """One alarm, once, of this check, and in these words; it names the memory."""
    alarms, said, error = result
    assert [name for _, name in alarms.raised] == [check], alarms.raised
    (line,) = said
    assert says in line
    assert line.startswith("transformer.h.1.mlp")
    return error


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_a_healthy_run_raises_none(model, train, settings):
    before = hooks(model)
    alarms, said, error = train(model, MemoryAdamW(model, lr=1e-3), every=1, **settings)
    assert (alarms.raised, said, error) == ({}, [], None)
    assert hooks(model) == before


def test_replicas_that_have_drifted_apart_are_said_at_a_look(model, train, monkeypatch):
    optimizer, asked = MemoryAdamW(model, lr=1e-3), []

    def check_replicas(layer, of):
        asked.append((layer, memory_of(model).values.weight in of.state))
        return ["values.weight"]

    monkeypatch.setattr("memlayers.diagnosis.alarms.check_replicas", check_replicas)
    only(train(model, optimizer, every=3), "replicas", "have drifted apart, and differ in values.weight")
    assert asked == [(memory_of(model), True)] * 2


def test_a_gate_at_zero_is_healthy(train):
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=16)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    block = model.transformer.h[1]
    block.mlp = ParallelMemory(torch.nn.Linear(16, 16), memory_of(model))
    alarms, _, error = train(model, MemoryAdamW(model), every=1)
    assert (alarms.raised, error) == ({}, None)
    assert block.mlp.gate.any()


def test_a_memory_that_is_not_active_raises_none(train):
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=16)
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8)
    for name in ("news", "law"):
        add_memory(model, config, [2], mode="parallel", name=name)
    set_active(model, "law")
    alarms, _, error = train(freeze_base(model), MemoryAdamW(model), every=1)
    assert (alarms.raised, error) == ({}, None)


def test_not_reached(model, train):
    optimizer, block = MemoryAdamW(model), model.transformer.h[1]
    block.forward = lambda hidden, *args, **kwargs: hidden
    only(train(model, optimizer), "reached", "the model did not call it in 2 steps")


def test_not_reached_in_one_step(model, train):
    optimizer, block, forward = MemoryAdamW(model), model.transformer.h[1], model.transformer.h[1].forward
    calls = []

    def third_is_bypassed(hidden, *args, **kwargs):
        calls.append(1)
        return hidden if len(calls) == 3 else forward(hidden, *args, **kwargs)

    block.forward = third_is_bypassed
    only(train(model, optimizer), "reached", "in 1 step:")


def test_a_few_sequences_over_and_over_are_no_collapse(train):
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=16)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=256, query_dim=8), [2])
    optimizer = MemoryAdamW(model, lr=1e-5, value_lr=1e-5)
    alarms, _, _ = train(model, optimizer, every=5, window=2048, data=Tokens(2), max_steps=70)
    assert not alarms.raised


def test_a_warm_up_that_begins_at_zero_is_healthy(model, train):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    alarms, _, error = train(model, optimizer, every=1, warm_up=True)
    assert (alarms.raised, error) == ({}, None)


def test_a_step_that_a_scaler_skips_is_healthy(model):
    class Skipped(torch.optim.SGD):
        step_was_skipped = True

    ids = torch.randint(0, 50, (4, 16))
    for kind, is_heard in ((Skipped, False), (torch.optim.SGD, True)):
        (monitor,) = (Monitor(subject, window=64) for subject in find_subjects(model))
        monitor.attach()
        model.train()(input_ids=ids)
        optimizer = kind(model.parameters(), lr=0.1)
        monitor.note_rows(optimizer)
        assert (monitor.written(optimizer) is not None) == is_heard
        monitor.detach()


@pytest.mark.slow
def test_it_listens_where_a_compiled_memory_is_checkpointed(model):
    (monitor,) = (Monitor(subject, window=64) for subject in find_subjects(model))
    monitor.attach()
    memory, x = memory_of(model).train(), torch.randn(5, 16, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1])

    def run(x):
        return checkpointing.checkpoint(memory, x, mask, use_reentrant=False)

    output = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    output.sum().backward()
    assert int(monitor._tokens) == 5
    assert (monitor._slots_WHK[:6, 0, 0] >= 0).tolist() == [True, True, False, True, True, False]
    assert monitor._squares[:2].tolist() == pytest.approx(
        [one.detach().square().sum().item() for one in (output, x[mask == 1])], rel=1e-5
    )
    assert int(monitor._reached) == 1
    monitor.detach()


class Skipping(torch.optim.AdamW):
    """Its step skips tables."""

    def __init__(self, model):
        tables = {memory.values.weight for memory in memory_layers(model).values()}
        super().__init__([one for one in model.parameters() if one not in tables])


def test_no_rows_written(model, train):
    only(train(model, Skipping(model)), "written", "wrote none of")
    model.requires_grad_(True)
    only(train(model, MemoryAdamW(model, value_lr=0.0)), "written", "wrote none of")
    memory_of(model).values.release()
    memory_of(model).values.weight.requires_grad_(False)
    only(train(model, torch.optim.AdamW(model.parameters())), "written", "its table is frozen")


def test_output_that_is_not_finite(model, train):
    memory = memory_of(model)
    memory.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),))
    alarms, said, _ = train(model, MemoryAdamW(model))
    assert "output" in [check for _, check in alarms.raised]
    assert sum("its output is not finite" in line for line in said) == 1


def test_output_that_is_far_off(model, train):
    memory_of(model).values.weight.data.mul_(1e5)
    only(train(model, MemoryAdamW(model)), "output", "times that of its input")


def test_collapsed_query(model, train):
    query = memory_of(model).query
    query.norm.weight.data.fill_(1e-5)
    query.norm.bias.data.normal_()
    query.requires_grad_(False)
    only(train(model, MemoryAdamW(model)), "usage", "its query has collapsed over the last")


def test_nothing_is_said_of_usage_before_the_window_is_full(model, train):
    query = memory_of(model).query
    query.norm.weight.data.fill_(1e-5)
    query.norm.bias.data.normal_()
    query.requires_grad_(False)
    alarms, _, _ = train(model, MemoryAdamW(model), window=10_000)
    assert not alarms.raised


def test_owner_is_gone(model, train):
    owner = RowAdam(model)
    del owner
    gc.collect()
    error = only(train(model, Skipping(model)), "owner", "its row optimizer is gone")
    assert "row optimizer is gone" in str(error)  # of the backward pass, after the alarm


@pytest.fixture
def train_adapters(tmp_path):
    """As `train`, a model with LoRA and checkpoints, and other callbacks before or after the alarms."""

    def run(*others, resume=None):
        torch.manual_seed(0)
        model = causal_lm("llama", vocab_size=50, layers=2, dim=16, heads=2, context=16)
        add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2], mode="parallel")
        lora = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
        model = freeze_base(peft.get_peft_model(model, lora))
        alarms = MemoryAlarms(every=2, window=64)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
            max_steps=4, save_steps=2, per_device_train_batch_size=4,
        )  # fmt: skip
        optimizer = MemoryAdamW(model, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Tokens(), optimizers=(optimizer, scheduler),
            callbacks=[alarms, *others],
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MemoryWarning)
            trainer.train(resume_from_checkpoint=resume)
        assert len([one for one in caught if issubclass(one.category, MemoryWarning)]) == len(alarms.raised)
        return alarms.raised

    return run


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_checkpoints_without_the_memory(train_adapters, tmp_path):
    assert train_adapters(SaveMemory()) == {}
    assert train_adapters(SaveMemory(), resume=str(tmp_path / "checkpoint-2")) == {}
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    ((key, message),) = train_adapters().items()
    assert key[1] == "saved"
    assert re.search(r"checkpoint-2 holds the adapters and not the memory: .* add memlayers.models.SaveMemory", message)
    ((_, message),) = train_adapters(resume=str(tmp_path / "checkpoint-4")).items()
    assert "checkpoint-4 holds the adapters" in message


def test_an_alarm_can_stop_the_run(model, train, tmp_path):
    memory_of(model).values.weight.data.mul_(1e5)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=3, save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[MemoryAlarms(every=1)])
    trainer.optimizer = MemoryAdamW(model)
    with pytest.raises(MemoryWarning, match="times that of its input"):  # warnings are errors here
        trainer.train()


def test_an_examination_in_the_middle_is_not_heard(model):
    alarms = MemoryAlarms(every=1, window=64)
    alarms.on_train_begin(None, None, None, model=model)
    (monitor,) = alarms._monitors
    doctor(model, {"input_ids": torch.randint(0, 50, (4, 16))})
    assert int(monitor._tokens) == 0
    model.train()(input_ids=torch.randint(0, 50, (4, 16)))
    model.eval()(input_ids=torch.randint(0, 50, (4, 16)))
    assert int(monitor._tokens) == 64
    monitor.end_step()
    model(input_ids=torch.randint(0, 50, (4, 16)))  # an evaluation does not make up for a step without the memory
    monitor.end_step()
    assert monitor.reached() is not None
    alarms.detach()


def test_it_needs_a_memory_and_sensible_settings():
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        MemoryAlarms(every=0)
    with pytest.raises(ValueError, match="window must be an integer of at least 2, got 1"):
        MemoryAlarms(window=1)
    with pytest.raises(ValueError, match="model must have at least one memory"):
        MemoryAlarms().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


def test_a_gate_that_stays_at_zero(train, tmp_path):
    model = causal_lm("gpt2", vocab_size=50, layers=2, dim=16, heads=2, context=16)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2], mode="parallel")
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate"):
            parameter.requires_grad_(False)
    only(train(model, MemoryAdamW(model, lr=1e-3)), "gate", "its gate is still zero")


def test_a_closed_gate_is_said_at_the_second_look_and_once(model):
    memory = memory_of(model)
    model.transformer.h[1].mlp = ParallelMemory(torch.nn.Linear(16, 16), memory)
    (monitor,) = (Monitor(subject, window=64) for subject in find_subjects(model))
    gate = model.transformer.h[1].mlp.gate
    assert [monitor.gate() is not None for _ in range(4)] == [False, True, False, False]
    with torch.no_grad():
        gate.fill_(0.1)
        assert monitor.gate() is None
        gate.zero_()
    assert [monitor.gate() is not None for _ in range(2)] == [False, True]


def test_a_look_is_at_what_came_since_the_last_one(model):
    (monitor,) = (Monitor(subject, window=64) for subject in find_subjects(model))
    monitor.end_step()
    assert monitor.reached() is not None
    assert monitor.reached() is None
    with monitor:
        model.train()(input_ids=torch.randint(0, 50, (4, 16)))
    assert monitor._squares.any()
    monitor.output()
    assert not monitor._squares.any()
