"""`doctor` leaves everything as it was, bit for bit, also when it fails half-way."""

import gc
import random

import numpy as np
import pytest
import torch

from memlayers import MappedFile, MemoryConfig, MemoryLayer, RowAdagrad, RowAdam, UsageMeter, doctor
from memlayers.diagnosis.alarms import Monitor
from memlayers.diagnosis.subjects import find_subjects
from memlayers.models import add_memory, causal_lm, memory_layers
from memlayers.optim import MemoryAdamW


def copied(value):
    """A deep copy of what holds tensors, with the identity of those parts that must stay the same objects."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [copied(inner) for inner in value]
    return value


def same(a, b):
    if isinstance(a, torch.Tensor):
        kept = a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad
        return kept and bool(torch.equal(*(one.contiguous().view(-1).view(torch.uint8) for one in (a, b))))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or bool(a == b)


def everything(model, optimizers):
    rows = []
    for memory in memory_layers(model).values():
        if (gradient := memory.values.row_gradient) is not None:
            summed = gradient.summed()
            rows += [gradient.is_empty, copied(gradient.handle), [] if summed is None else copied(list(summed))]
    return {
        "parameters": copied(dict(model.named_parameters())),
        "buffers": copied(dict(model.named_buffers())),
        "gradients": [(id(one.grad), copied(one.grad)) for one in model.parameters()],
        "trainable": [one.requires_grad for one in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [
                list(getattr(module, name).items())
                for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            ]
            + [list(module._forward_pre_hooks_with_kwargs), list(module._forward_hooks_always_called)]
            for module in model.modules()
        ],
        "rows": rows,
        "groups": [[copied(group) for group in one.param_groups] for one in optimizers],
        "groups are the same": [[(id(group), id(group["params"])) for group in one.param_groups] for one in optimizers],
        "state": [[(id(key), id(held), copied(held)) for key, held in one.state.items()] for one in optimizers],
        "attributes": [sorted((name, id(value)) for name, value in vars(one).items()) for one in optimizers],
        "random": [random.getstate(), copied(torch.get_rng_state()), np.random.get_state()[1].tobytes()],
    }


def compare(before, after):
    for what, held in before.items():
        assert same(held, after[what]), what


def row(model):
    return [MemoryAdamW(model, weight_decay=0.1)]


def dense(model):
    return [torch.optim.AdamW(model.parameters(), weight_decay=0.1, amsgrad=True)]


def momentum(model):
    return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)]


def two(model):
    owner = RowAdagrad(model, per_row=True)
    others = [one for name, one in model.named_parameters() if "values" not in name]
    return [owner, torch.optim.AdamW(others)]


def wrong(model):
    """A table owned by one, and in a group of another, which decays it."""
    owner = RowAdam(model)
    return [owner, torch.optim.AdamW([one for name, one in model.named_parameters() if "mark" not in name])]


@pytest.mark.parametrize("stage", ["fresh", "trained", "gradients pending"])
@pytest.mark.parametrize("make", [row, dense, momentum, two, wrong], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_changes(make_block, batch, make, stage, dtype):
    block = make_block(parallel=True, num_subkeys=16)
    block.memory.values.to(dtype)
    optimizers = make(block)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizers[0])
    steps = {"fresh": 0, "trained": 2, "gradients pending": 2}[stage]
    for step in range(steps + 1):
        if step or stage != "fresh":
            block(batch[:2] + step).square().sum().backward()
            if step < steps:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            elif stage != "gradients pending":
                block.zero_grad()
    if stage == "trained":
        scheduler.step()
    block.norm.eval()
    block.memory.query.eval()
    with UsageMeter(block.memory) as meter:
        block(batch)
        heard = copied(meter.state_dict())
        before = everything(block, optimizers)
        report = doctor(block, batch, optimizer=optimizers)
        compare(before, everything(block, optimizers))
        assert same(heard, copied(meter.state_dict()))
        block(batch)
        assert int(meter.state_dict()["tokens"]) == 2 * int(heard["tokens"])  # it listens again
    assert report.findings


def test_a_frozen_companion_stays_frozen(block, batch):
    optimizer = MemoryAdamW(block)
    block.mlp.values.row_mark.requires_grad_(False)
    assert doctor(block, batch, optimizer=optimizer).ok
    assert not block.mlp.values.row_mark.requires_grad


@pytest.mark.parametrize("make", [row, dense], ids=lambda make: make.__name__)
def test_training_goes_on_as_without(make_block, batch, make):
    ends = []
    for look in (False, True):
        torch.manual_seed(0)
        block = make_block(num_subkeys=16)
        (optimizer,) = make(block)
        for step in range(4):
            block(batch + step).square().mean().backward()
            if look:
                doctor(block, batch, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(copied(block.state_dict()))
    assert same(*ends)


class PlantedError(Exception):
    pass


def failing_loss(model, batch):
    (model(batch).sum()).backward()
    np.random.rand()
    random.random()
    raise PlantedError


def failing_forward(model, batch):
    handle = model.outer.register_forward_pre_hook(fail)
    try:
        return model(batch).sum()
    finally:
        handle.remove()


def fail(*_):
    raise PlantedError


def failing_backward(model, batch):
    loss = model(batch).sum()
    loss.register_hook(fail)
    return loss


class FailingStep(torch.optim.AdamW):
    def step(self, closure=None):
        super().step()
        raise PlantedError


@pytest.mark.parametrize("loss", [failing_loss, failing_forward, failing_backward, None])
def test_nothing_changes_when_it_fails(make_block, batch, loss):
    block = make_block(parallel=True)
    optimizers = [RowAdam(block)]
    others = [one for name, one in block.named_parameters() if "values" not in name]
    optimizers.append((torch.optim.AdamW if loss else FailingStep)(others))
    block(batch).sum().backward()
    optimizers[0].step()
    block(batch).sum().backward()
    before = everything(block, optimizers)
    with pytest.raises(PlantedError):
        doctor(block, batch, optimizer=optimizers, loss=loss)
    compare(before, everything(block, optimizers))


def test_hooks_of_steps_are_for_real_ones(block, batch):
    optimizer = MemoryAdamW(block)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    doctor(block, batch, optimizer=optimizer)
    assert not steps
    optimizer.step()
    assert steps == [1]


def test_rows_of_another_model_stay_pending(make_block, batch):
    block, other = make_block(), make_block()
    owner = RowAdam([block.mlp.values, other.mlp.values])
    other(batch).sum().backward()
    before = everything(other, [])
    doctor(block, batch, optimizer=owner)
    compare(before, everything(other, []))
    assert not other.mlp.values.row_gradient.is_empty


def test_only_rows_that_are_looked_at_are_copied(make_block, batch, monkeypatch):
    """Of a table in row mode, that is; a dense one is copied as a whole."""
    block = make_block(num_subkeys=256)
    weight = block.mlp.values.weight
    sizes = []
    clone, index = torch.Tensor.clone, torch.Tensor.__getitem__

    def watched_clone(self, *args, **settings):
        sizes.append(self.numel())
        return clone(self, *args, **settings)

    def watched_index(self, key):
        found = index(self, key)
        sizes.append(found.numel() if isinstance(key, torch.Tensor) else 0)
        return found

    optimizer = MemoryAdamW(block)
    block(batch).sum().backward()
    optimizer.step()
    monkeypatch.setattr(torch.Tensor, "clone", watched_clone)
    monkeypatch.setattr(torch.Tensor, "__getitem__", watched_index)
    assert doctor(block, batch[:2], optimizer=optimizer).ok
    assert max(sizes) < weight.numel() / 8
    optimizer.release()
    assert doctor(block, batch[:2], optimizer=torch.optim.SGD(block.parameters(), lr=1.0)).ok
    assert max(sizes) == weight.numel()


def test_hugging_face_model_with_padding_and_a_shared_table():
    for family in ("gpt2", "llama"):
        model = causal_lm(family, vocab_size=40, layers=3, dim=16, heads=2, context=32, dropout=0.1)
        add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [1, 3], share_values=True)
        optimizer = MemoryAdamW(model)
        ids = torch.randint(0, 40, (4, 32))
        mask = (torch.arange(32) < torch.tensor([[32], [20], [7], [1]])).long()
        before = everything(model, [optimizer])
        report = doctor(model.eval(), {"input_ids": ids, "attention_mask": mask}, optimizer=optimizer)
        model.train()
        compare(before, everything(model, [optimizer]))
        assert report.ok, report
        said = [finding.message for finding in report.findings if finding.check == "reached"]
        assert said == ["1 call, 60 tokens; the loss depends on its output"] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(batch, reentrant):
    model = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    model.config.use_cache = False
    optimizer, ids = MemoryAdamW(model), torch.randint(0, 40, (4, 32))
    before = everything(model, [optimizer])
    report = doctor(model, {"input_ids": ids}, optimizer=optimizer)
    compare(before, everything(model, [optimizer]))
    assert report.ok, report
    assert "1 call, 128 tokens" in str(report)


def test_compiled_model(block, batch):
    compiled = torch.compile(block, backend="aot_eager")
    optimizer = MemoryAdamW(compiled)
    compiled(batch).sum().backward()
    optimizer.step()
    before = everything(block, [optimizer])
    report = doctor(compiled, batch, optimizer=optimizer)
    compare(before, everything(block, [optimizer]))
    assert report.ok, report
    assert {finding.memory for finding in report.findings} == {None, "mlp"}
    block.mlp = torch.compile(block.mlp, backend="aot_eager")
    assert doctor(block, batch, optimizer=optimizer).ok


def test_a_table_that_lost_its_owner_stays_as_it_is(block, batch):
    optimizer = RowAdam(block)
    del optimizer
    gc.collect()
    before = everything(block, [])
    doctor(block, batch)
    compare(before, everything(block, []))


def test_a_model_in_evaluation_is_examined_in_training_mode(block, batch):
    modes = []
    block.mlp.register_forward_hook(lambda memory, args, output: modes.append(memory.training))
    assert doctor(block.eval(), batch).ok
    assert modes == [True]
    assert not any(module.training for module in block.modules())


def test_without_gradients_around(block, batch):
    with torch.no_grad():
        assert doctor(block, batch).ok


def test_a_buffer_that_the_model_replaces(block, batch):
    block.register_buffer("count", torch.zeros(()))

    def counting(x):
        block.count = block.count + 1
        block.register_buffer("extra", torch.ones(()), persistent=False)
        return type(block).forward(block, x)

    block.forward = counting
    held = block.count
    assert doctor(block, batch).ok
    assert block.count is held
    assert not hasattr(block, "extra")
    assert not block._non_persistent_buffers_set


@pytest.mark.parametrize("make", [row, dense], ids=lambda make: make.__name__)
def test_a_forward_pass_that_waits_for_its_backward(block, batch, make):
    optimizers = make(block)
    value = block(batch).square().mean()
    doctor(block, batch, optimizer=optimizers)
    value.backward()
    assert block.mlp.keys.weight.grad.any()


def test_optimizers_that_step_in_the_backward_pass_do_not(block, batch):
    stepped = []

    def step(parameter):
        stepped.append(parameter)
        if parameter.grad is not None:  # that of a table in row mode is
            parameter.data.add_(parameter.grad, alpha=-1)

    for parameter in block.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = MemoryAdamW(block)
    before = everything(block, [optimizer])
    assert doctor(block, batch, optimizer=optimizer).ok
    compare(before, everything(block, [optimizer]))
    assert not stepped
    block(batch).sum().backward()
    assert stepped


class Lists(torch.optim.SGD):
    """Its state is a list."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    sums = self.state[parameter].setdefault("sums", [torch.zeros_like(parameter), {}])
                    sums[0] += parameter.grad
                    sums[1]["last"] = parameter.grad.clone()
                    parameter.sub_(sums[0])


def test_state_in_lists(block, batch):
    optimizer = Lists(block.parameters(), lr=0.1)
    block(batch).sum().backward()
    optimizer.step()
    before = everything(block, [optimizer])
    doctor(block, 2 * batch, optimizer=optimizer)
    compare(before, everything(block, [optimizer]))


def test_devices_that_are_not_in_use_get_no_seed(block, batch, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    assert doctor(block, batch).ok
    assert not seeded


def test_an_expanded_buffer(block, batch):
    block.register_buffer("places", torch.arange(4).expand(3, 4))
    assert doctor(block, batch).ok


def test_who_listens_to_the_network_beside_a_memory(make_block, batch):
    block = make_block(parallel=True)
    monitor = Monitor(find_subjects(block)[0], window=64)
    monitor.attach()
    block(batch)
    heard = monitor._squares.clone()
    doctor(block, batch)
    assert torch.equal(monitor._squares, heard)
    monitor.detach()


def test_a_table_in_files_trains_on_as_if_it_had_not_been_examined(tmp_path):
    """Also with an optimizer that has not made a step yet: its moments are in the files, and stay there."""
    rows = {}
    for name in ("examined", "other"):
        torch.manual_seed(0)
        config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8, query_norm="rms")
        layer = MemoryLayer(config, values=MappedFile(tmp_path / name))
        optimizer = RowAdam(layer)
        if name == "examined":
            report = doctor(layer, torch.randn(1, 64, 16), optimizer=optimizer)
            assert [one.state for one in report.findings if one.check == "written"] == ["pass"]
            assert not any(state.any() for state in layer.values.held_states().values())
        torch.manual_seed(1)
        for _ in range(2):
            layer(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
        layer.values.fill()
        rows[name] = layer.values.weight.detach().clone()
    assert torch.equal(rows["examined"], rows["other"])


def test_a_table_in_files_stays_the_checkpoint_that_it_was(tmp_path, caplog):
    """An optimizer that is saved after the examination says which moment its states are of."""
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8, query_norm="rms")
    layer = MemoryLayer(config, values=MappedFile(tmp_path / "table"))
    optimizer = RowAdam(layer)
    for _ in range(2):
        layer(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
    number = layer.values.checkpoint()
    rows = layer.values.weight.detach().clone()
    states = {name: state.clone() for name, state in layer.values.held_states().items()}
    doctor(layer, torch.randn(1, 64, 16), optimizer=optimizer)
    assert layer.values.unchanged_since == number
    assert torch.equal(layer.values.weight.detach(), rows)
    assert all(torch.equal(state, states[name]) for name, state in layer.values.held_states().items())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not caplog.records
