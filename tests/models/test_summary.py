import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer, MemoryPlus
from memlayers.models import add_memory, freeze_base, memory_layers, memory_summary
from memlayers.models.wrappers import find_wrappers
from memlayers.optim import MemoryAdamW, RowAdagrad, RowAdam, RowSGD

IDS = torch.arange(24).view(2, 12)


def step(model, optimizer):
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data += 0.5
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()


def test_parameters_by_part(plain, memory_config):
    rest = sum(parameter.numel() for parameter in plain.parameters())
    model = add_memory(plain, memory_config, [2, 3], mode="parallel", share_values=True)
    summary = memory_summary(model)
    numbers = {name: part.parameters for name, part in summary.parts.items()}
    # Query: 16 x 16 and a bias, gain and bias of its norm; keys: 2 heads, 2 x 6 x 4; a table of 36 x 16.
    assert numbers == {
        "base": rest, "query": 2 * (16 * 16 + 3 * 16), "keys": 2 * 96, "values": 36 * 16, "gate and output": 2 * 16,
    }  # fmt: skip
    # Without the companion of the table, which is no weight.
    assert summary.total.parameters == sum(parameter.numel() for parameter in model.parameters()) - 1
    assert model.num_parameters() == model.num_parameters(only_trainable=True) == summary.total.parameters
    assert summary.total.trainable == summary.total.parameters
    assert (summary.tables, summary.row_tables, summary.optimizer) == (1, 0, None)


def test_other_parts_of_a_memory_are_not_forgotten():
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8, value_dim=12)
    model = nn.Sequential(nn.Linear(16, 16), MemoryPlus(config))
    numbers = {name: part.parameters for name, part in memory_summary(model).parts.items()}
    assert numbers["base"] == 16 * 16 + 16
    assert numbers["gate and output"] == 2 * 12 * 16
    assert sum(numbers.values()) == sum(parameter.numel() for parameter in model.parameters()) - 1


def test_bytes_are_those_of_the_real_dtypes(plain, memory_config):
    model = freeze_base(add_memory(plain.to(torch.bfloat16), memory_config, [2]))
    (memory,) = memory_layers(model).values()
    memory.values.to(torch.float32)
    summary = memory_summary(model)
    for name, part in summary.parts.items():
        size = 4 if name == "values" else 2
        assert part.weight_bytes == size * part.parameters, name
        assert part.gradient_bytes == size * part.trainable, name
    assert summary.parts["base"].trainable == summary.parts["base"].gradient_bytes == 0


def test_a_table_in_row_mode_has_no_gradient_of_its_size(plain, memory_config):
    model = add_memory(plain, memory_config, [2, 3], mode="parallel")
    first, second = memory_layers(model).values()
    optimizer = RowAdam([first.values])
    summary = memory_summary(model, optimizer)
    assert (summary.tables, summary.row_tables) == (2, 1)
    assert summary.parts["values"].gradient_bytes == 4 * 36 * 16
    assert "values (1 of 2 tables): gradients are recorded for the rows that were read" in str(summary)
    assert summary.total.parameters == sum(p.numel() for p in model.parameters()) - 2  # without companions
    RowAdam([second.values])


OPTIMIZERS = {
    "MemoryAdamW": lambda model: MemoryAdamW(model),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "AdamW, amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "RowAdam": lambda model: RowAdam(model),
    "RowAdagrad": lambda model: RowAdagrad(model),
    "RowAdagrad, per row": lambda model: RowAdagrad(model, per_row=True),
    "RowSGD": lambda model: RowSGD(model),
}


@pytest.mark.promise(
    "Export and counting", "`memory_summary`: what an optimizer will hold", "supported", "by part, in bytes"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_will_hold_is_what_it_holds(plain, memory_config, name, dtype):
    model = freeze_base(add_memory(plain.to(dtype), memory_config, [2, 3], mode="parallel", share_values=True))
    optimizer = OPTIMIZERS[name](model)
    foretold = memory_summary(model, optimizer)
    assert not optimizer.state
    step(model, optimizer)
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert foretold.total.optimizer_bytes == held
    assert (held == 0) is (name == "RowSGD")
    assert memory_summary(model, optimizer) == foretold


def test_the_state_of_an_optimizer_that_is_not_known(plain, memory_config):
    model = freeze_base(add_memory(plain, memory_config, [2], mode="parallel"))
    optimizer = torch.optim.RMSprop(model.parameters())
    before = memory_summary(model, optimizer)
    assert before.total.optimizer_bytes is None
    assert before.parts["base"].optimizer_bytes == 0  # nothing to train
    assert "unknown" in str(before)
    step(model, optimizer)
    after = memory_summary(model, optimizer)
    assert after.parts["values"].optimizer_bytes == 4 * 36 * 16 + 4 + 8  # and of the companion
    assert "unknown" not in str(after)


def test_the_table_for_people(memory_config):
    model = nn.Sequential(nn.Linear(16, 16), MemoryLayer(memory_config))
    model[0].requires_grad_(False)
    assert str(memory_summary(model, MemoryAdamW(model))).splitlines() == [
        "                 parameters  trainable  weights  gradients  optimizer",
        "base                    272          0     1 kB        0 B        0 B",
        "query                   304        304     1 kB       1 kB       2 kB",
        "keys                     96         96    384 B      384 B      772 B",
        "values                  576        576     2 kB        0 B       5 kB",
        "gate and output           0          0      0 B        0 B        0 B",
        "total                 1,248        976     5 kB       2 kB       8 kB",
        "trainable: 78.21 % of the parameters",
        "values: gradients are recorded for the rows that were read, none of a whole table",
        "optimizer: MemoryAdamW",
    ]
    assert "optimizer" not in str(memory_summary(model))


def test_a_table_that_no_machine_holds():
    config = MemoryConfig(dim=4096, heads=4, topk=32, num_subkeys=4096, query_dim=256)
    model = nn.Sequential(MemoryLayer(config, device="meta", dtype=torch.bfloat16))
    summary = memory_summary(model, RowAdam(model))
    assert summary.parts["values"].weight_bytes == 2 * 4096**3
    assert summary.parts["values"].optimizer_bytes == 2 * 4 * 4096**3 + 4 * 4096**2
    assert "137.44 GB" in str(summary)


def test_a_compiled_model_is_looked_into(plain, memory_config):
    model = add_memory(plain, memory_config, [2])
    assert memory_summary(torch.compile(model, backend="eager")) == memory_summary(model)


def test_a_model_without_memories_is_refused(plain):
    with pytest.raises(ValueError, match=rf"model must have memories \(add_memory\), got a {type(plain).__name__}"):
        memory_summary(plain)
