"""A memory beside a frozen base, in the loops that people train with."""

import copy
import functools
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from memlayers import MemoryConfig, UsageMeter
from memlayers.models import add_memory, causal_lm, freeze_base, memory_layers, memory_summary
from memlayers.models.wrappers import find_wrappers
from memlayers.optim import MemoryAdamW, RowAdam

MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
# Its statistics do not depend on how tokens are split into batches.
ROWWISE = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8, query_norm="rms")


class Tokens(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(40, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


IDS = torch.stack([Tokens()[index]["input_ids"] for index in range(16)])


@pytest.fixture(autouse=True)
def _no_accelerator_of_before():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def build(family="llama", config=ROWWISE, dtype=None, layers=3):
    torch.manual_seed(0)
    model = causal_lm(family, vocab_size=40, layers=layers, dim=16, heads=2, context=32).to(dtype)
    add_memory(model, config, range(2, layers + 1), mode="parallel", share_values=True)
    return freeze_base(model)


def optimizer_of(model):
    return MemoryAdamW(model, lr=0.01, value_lr=0.01)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_near(first, second):
    """Adam divides rounding by rounding where a gradient is nearly zero, so a few entries may differ."""
    for name, value in weights(first).items():
        if name.endswith("query.projections.0.bias"):  # BatchNorm takes it away: all of its gradient is rounding
            continue
        near = torch.isclose(value, weights(second)[name], atol=1e-3)
        assert near.float().mean() > 0.98, name


def assert_only_memories_moved(model, start):
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert all(".memory." in name or name.endswith(".gate") for name in moved)
    for wrapper, _ in find_wrappers(model):
        assert {f"{wrapper}.gate", f"{wrapper}.memory.keys.weight", f"{wrapper}.memory.values.weight"} <= moved


def trained(folder, *, resume=None, **settings):
    """After six steps of `transformers.Trainer`, and their losses."""
    model = build()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    defaults = {"per_device_train_batch_size": 8, "max_steps": 6, "max_grad_norm": 0.5, "save_strategy": "no"}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        **{**defaults, **settings},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Tokens(), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.promise(
    "Trainers",
    "`transformers.Trainer` with `MemoryAdamW`: accumulation and clipping",
    "supported",
    "a frozen base stays as it is, bit for bit",
)
def test_trainer_clips_accumulates_and_leaves_the_base_alone(tmp_path):
    start = weights(build())
    whole, losses = trained(tmp_path / "a")
    assert losses[-1] < losses[0]
    assert_only_memories_moved(whole, start)
    parts, _ = trained(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_near(parts, whole)


@pytest.mark.promise(
    "Trainers",
    "`trainer.train(resume_from_checkpoint=...)`",
    "supported",
    "the same end as an uninterrupted run, bit for bit",
)
def test_trainer_resumes_where_it_stopped(tmp_path):
    whole, losses = trained(tmp_path / "a", save_strategy="steps", save_steps=3)
    resumed, later = trained(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert later[-3:] == losses[-3:]
    for name, value in weights(whole).items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-6")
    for name, value in weights(whole).items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.promise("Trainers", "`TrainingArguments(bf16=True)`", "supported", "")
def test_trainer_in_bfloat16(tmp_path):
    model, losses = trained(tmp_path, bf16=True)
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_only_memories_moved(model, weights(build()))


@pytest.mark.promise(
    "Trainers",
    "gradient checkpointing, `use_reentrant` or not",
    "supported",
    "recomputation neither records nor counts twice",
)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_checkpointing(use_reentrant, tmp_path):
    settings = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    plain, losses = trained(tmp_path / "a")
    recomputed, again = trained(tmp_path / "b", **settings)
    assert again == pytest.approx(losses, abs=1e-4)
    assert_near(recomputed, plain)


@pytest.mark.promise(
    "Trainers", "a plain loop: `backward`, `step`, `zero_grad`", "supported", "`MemoryAdamW(model)` in place of `AdamW`"
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_plain_loop(family):
    def run(parts):
        model = build(family).train()
        optimizer = optimizer_of(model)
        losses = []
        for _ in range(5):
            for ids in IDS.chunk(parts):
                loss = model(ids, labels=ids).loss / parts
                loss.backward()
                losses.append(loss.item() * parts)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0
            optimizer.step()
            optimizer.zero_grad()
        assert sum(losses[-parts:]) < sum(losses[:parts])
        return model

    assert_near(run(4), run(1))


@pytest.mark.promise("Trainers", "Accelerate: `prepare`, `accumulate`, mixed precision", "supported", "")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    start = weights(build())
    model = build()
    optimizer = optimizer_of(model)
    foretold = memory_summary(model, optimizer)
    loader = DataLoader(Tokens(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses, steps = [], 0
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                losses.append(loss.item())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    steps += 1
                optimizer.step()
                optimizer.zero_grad()
    assert steps == 6
    inner = accelerator.unwrap_model(model)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert_only_memories_moved(inner, start)
    (table,) = {memory.values for memory in memory_layers(inner).values()}
    assert int(optimizer.state[table.weight]["steps"].max()) == steps
    assert memory_summary(inner, optimizer) == foretold


def compiled_steps(family, backend):
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[2, 9:] = 0

    def run(wrap):
        model = build(family, MEMORY, layers=2).train()
        for _, wrapper in find_wrappers(model):
            wrapper.gate.data.fill_(1.0)
        optimizer = optimizer_of(model)
        wrapped, losses = wrap(model), []
        for step in range(3):
            ids = IDS[4 * step : 4 * step + 4]
            loss = wrapped(ids, attention_mask=mask, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return model, losses

    eager, expected = run(lambda model: model)
    compiled, losses = run(functools.partial(torch.compile, backend=backend, fullgraph=True))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert_near(compiled, eager)


@pytest.mark.promise("Trainers", "`torch.compile` of a model that is trained", "supported", "one graph")
@pytest.mark.slow
def test_compiled():
    compiled_steps("llama", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_by_inductor(family):
    compiled_steps(family, "inductor")


@pytest.mark.promise(
    "Masks",
    "left and right padding by `attention_mask`",
    "supported",
    "what stands in it changes no output, statistic or gradient",
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_changes_nothing(side):
    model = build(config=MEMORY).train()
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(1.0)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    seen = []
    for other in (1, 2):
        twin = copy.deepcopy(model)
        memory = [*memory_layers(twin).values()][-1]
        with UsageMeter(memory) as meter:
            ids = torch.where(mask.bool(), IDS[:3], other)
            logits = twin(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[mask.bool()]
            logits.square().sum().backward()
        assert meter.report().tokens == int(mask.sum())
        gradients = [parameter.grad for parameter in twin.parameters() if parameter.requires_grad]
        seen.append([logits, *gradients, *twin.buffers()])
    assert all(map(torch.equal, *seen))


@pytest.mark.promise(
    "Averages and copies",
    "`copy.deepcopy` and pickle of a model",
    "supported",
    "the copy has a table of its own and no owner: it is dense",
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(copied):
    model = build()
    optimizer_of(model).step()  # owns the table of this model, not that of a copy
    twin = copied(model)
    assert type(twin) is type(model)
    first, second = memory_layers(twin).values()
    assert first.values is second.values
    start = weights(model)
    for _, wrapper in find_wrappers(twin):
        wrapper.gate.data.fill_(1.0)
    optimizer = RowAdam(twin)
    twin(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(first.values.weight, start[next(name for name in start if name.endswith("values.weight"))])
    assert all(torch.equal(value, start[name]) for name, value in weights(model).items())


@pytest.mark.promise("Threads and servers", "two models with memories in one process", "supported", "")
def test_two_models_in_one_process():
    first, second = build("gpt2"), build("llama")
    twins = build("gpt2"), build("llama")

    def step(model):
        optimizer = optimizer_of(model)
        for _ in range(2):
            model.train()(IDS, labels=IDS).loss.backward()
            yield
            optimizer.step()
            optimizer.zero_grad()

    for _ in zip(step(first), step(second), strict=True):  # in turns
        pass
    for twin in twins:
        for _ in step(twin):
            pass
    for model, twin in zip((first, second), twins, strict=True):
        assert all(torch.equal(value, twin.state_dict()[name]) for name, value in weights(model).items())


@pytest.mark.promise("Trainers", "a base in bfloat16 or float16", "supported", "beside float16 a memory is float32")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_base_of_16_bits(family, dtype):
    torch.manual_seed(0)
    base = causal_lm(family, vocab_size=40, layers=3, dim=16, heads=2, context=32).to(dtype).eval()
    model = build(family, MEMORY, dtype).eval()
    with torch.no_grad():
        expected = base(IDS).logits
        assert expected.dtype == dtype
        assert torch.equal(model(IDS).logits, expected)
    of_memories = {p.dtype for _, wrapper in find_wrappers(model) for p in (wrapper.gate, *wrapper.memory.parameters())}
    assert of_memories == {torch.float32 if dtype == torch.float16 else dtype}
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(1.0)
    with torch.no_grad():
        found = model(IDS).logits
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["parallel", "replace"])
def test_training_beside_float16(mode):
    torch.manual_seed(0)
    model = causal_lm("llama", vocab_size=40, layers=3, dim=16, heads=2, context=32).half().train()
    freeze_base(add_memory(model, MEMORY, [2], mode=mode))
    optimizer = MemoryAdamW(model, lr=1e-2, value_lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["parallel", "replace"])
@pytest.mark.parametrize(
    ("of_base", "of_memory"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)],
)
def test_a_memory_that_was_cast_to_another_dtype_than_its_base_answers_and_trains(mode, of_base, of_memory):
    torch.manual_seed(0)
    model = causal_lm("llama", vocab_size=40, layers=3, dim=16, heads=2, context=32).to(of_base).train()
    freeze_base(add_memory(model, MEMORY, [2], mode=mode))
    (memory,) = (memory.to(of_memory) for memory in memory_layers(model).values())
    given, found = [], []
    ((_, wrapper),) = find_wrappers(model)
    if mode == "parallel":
        wrapper.gate.data.fill_(1.0)
    wrapper.register_forward_hook(lambda module, args, output: given.append(args[0]))
    wrapper.register_forward_hook(lambda module, args, output: found.append(output))
    model(IDS, labels=IDS).loss.backward()
    assert memory.values.weight.grad.any()
    model.eval()(IDS)
    assert [output.dtype for output in found] == [of_base] * 2
    if mode == "replace":
        assert torch.equal(found[1], memory(given[1].to(of_memory)).to(of_base))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_in_bfloat16(family):
    model = build(family, MEMORY, torch.bfloat16).train()
    start = weights(model)
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_only_memories_moved(model, start)
