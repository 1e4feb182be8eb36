import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer, MemoryPlus
from memlayers.models import add_memory, freeze_base, memory_layers
from memlayers.models.wrappers import find_wrappers
from memlayers.optim import MemoryAdamW, RowAdam

IDS = torch.arange(24).view(2, 12)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("mode", ["parallel", "replace"])
def test_memories_and_their_gates_are_what_is_trained(plain, memory_config, mode):
    model = add_memory(plain, memory_config, [2, 3], mode=mode, share_values=True)
    assert freeze_base(model) is model
    expected = set()
    for name, wrapper in find_wrappers(model):
        expected |= {f"{name}.memory.{part}" for part, _ in wrapper.memory.named_parameters()}
        expected |= {f"{name}.gate"} if mode == "parallel" else set()
    for part in ("values.weight", "values.companion.row_mark"):  # one parameter, under its first name
        expected -= {max(name for name in expected if name.endswith(part))}
    assert trainable(model) == expected
    assert len(trainable(model)) == 12 + (2 if mode == "parallel" else 0)


@pytest.mark.promise("Gradients by hand", "`freeze_base`: training memories alone", "supported", "")
def test_only_they_move(plain, memory_config):
    model = freeze_base(add_memory(plain, memory_config, [2], mode="parallel")).train()
    (name,) = (name for name, _ in find_wrappers(model))
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = MemoryAdamW(model, lr=0.1, value_lr=0.1)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is None for key, parameter in model.named_parameters() if key not in trainable(model))
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in before.items() if not torch.equal(value, model.get_parameter(key))}
    expected = {key for key in before if key.startswith((f"{name}.memory.", f"{name}.gate"))}
    assert moved == expected - {f"{name}.memory.values.companion.row_mark"}  # which stays zero


def test_what_was_frozen_before_is_trained_if_it_is_of_a_memory(plain, memory_config):
    model = add_memory(plain, memory_config, [2], mode="parallel")
    expected = trainable(freeze_base(model))
    model.requires_grad_(False)
    assert trainable(freeze_base(model)) == expected


def test_a_memory_that_somebody_put_in_by_hand(memory_config):
    model = nn.Sequential(nn.Linear(16, 16), MemoryLayer(memory_config))
    freeze_base(model)
    assert trainable(model) == {f"1.{name}" for name, _ in model[1].named_parameters()}


def test_a_table_in_row_mode_stays_in_it(plain, memory_config):
    model = add_memory(plain, memory_config, [2], mode="parallel")
    optimizer = RowAdam(model)
    freeze_base(model).train()
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data += 1
    (memory,) = memory_layers(model).values()
    before = memory.values.weight.clone()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert memory.values.weight.grad is None
    assert not torch.equal(memory.values.weight, before)


def test_a_compiled_model(plain, memory_config):
    model = add_memory(plain, memory_config, [2], mode="parallel")
    compiled = torch.compile(model, backend="eager")
    assert freeze_base(compiled) is compiled
    assert trainable(model)
    assert all(".memory." in name or name.endswith(".gate") for name in trainable(model))


def test_a_model_without_memories_is_refused(plain):
    before = trainable(plain)
    with pytest.raises(ValueError, match=rf"model must have memories \(add_memory\), got a {type(plain).__name__}"):
        freeze_base(plain)
    assert trainable(plain) == before


def test_subclass_parts_are_trained():
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8, value_dim=12)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    add_memory(model, config, "1", mode="parallel", kind=MemoryPlus)
    assert {"1.gate", "1.memory.gate.weight", "1.memory.output.weight"} < trainable(freeze_base(model))
