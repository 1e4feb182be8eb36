import dataclasses

import pytest
import torch

from memlayers import MemoryLayer, ProductKeys, RowAdam, ValueTable
from memlayers.bench import gate
from memlayers.bench.gate import GateError
from memlayers.bench.layers import make_table
from memlayers.bench.shapes import shape
from memlayers.keys import Hits
from memlayers.ops.row_step import row_adam_
from memlayers.ops.row_sum import Part

CPU = torch.device("cpu")


def test_the_gate_opens(tiny):
    gate.check(tiny, CPU)
    gate.check(dataclasses.replace(tiny, value_dim=24, heads=3, num_subkeys=7), CPU)


def test_smaller_shapes_have_every_size_of_the_shape_and_small_tables():
    for name in ("512x512", "1024x1024", "2048x2048"):
        whole = shape(name)
        smaller = gate.smaller_shapes(whole)
        for field in ("dim", "value_dim", "heads", "topk", "num_subkeys", "query_dim"):
            assert getattr(whole, field) in [getattr(one, field) for one in smaller], field
        assert all(one.table_bytes <= 4 * 2**25 for one in smaller)


def break_output(monkeypatch):
    forward = MemoryLayer.forward
    monkeypatch.setattr(MemoryLayer, "forward", lambda *arguments: forward(*arguments) * 1.01)


def break_evaluation_only(monkeypatch):
    forward = MemoryLayer.forward
    monkeypatch.setattr(MemoryLayer, "forward", lambda self, x: forward(self, x) * (1 if self.training else 1.01))


def break_gradient(monkeypatch):
    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    search = ProductKeys.forward
    monkeypatch.setattr(ProductKeys, "forward", lambda self, query: search(self, Skewed.apply(query)))


def break_nan(monkeypatch):
    forward = MemoryLayer.forward
    monkeypatch.setattr(MemoryLayer, "forward", lambda *arguments: forward(*arguments) * float("nan"))


def break_slots(monkeypatch):
    search = ProductKeys.forward

    def next_slot(self, query):
        hits = search(self, query)
        return Hits(hits.scores, (hits.slots + 1) % self.weight.shape[2] ** 2)

    monkeypatch.setattr(ProductKeys, "forward", next_slot)


def break_read(monkeypatch):
    read = ValueTable.forward
    monkeypatch.setattr(ValueTable, "forward", lambda self, slots, weights: read(self, slots[:, 1:], weights[:, 1:]))


def break_selection(monkeypatch):
    select = gate.select_pairs

    def misses_one(first, second, topk):
        return tuple(found[..., 1:] for found in select(first, second, topk + 1))

    monkeypatch.setattr(gate, "select_pairs", misses_one)


def break_step(monkeypatch):
    monkeypatch.setattr(RowAdam, "step", lambda self: None)


def break_learning_rate(monkeypatch):
    step = RowAdam.step

    def twice(self):
        self.param_groups[0]["value_lr"] = 2e-2
        step(self)

    monkeypatch.setattr(RowAdam, "step", twice)


def break_rows(monkeypatch):
    step = RowAdam.step

    def decays_all(self):
        step(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(0.999)

    monkeypatch.setattr(RowAdam, "step", decays_all)


@pytest.mark.parametrize(
    ("breaking", "what"),
    [
        (break_output, "output"),
        (break_evaluation_only, "output in evaluation"),
        (break_gradient, "gradient of x against the textbook layer"),
        (break_nan, "output"),
        (break_slots, "output"),
        (break_read, "read"),
        (break_selection, "scores of select"),
        (break_step, "steps of RowAdam"),
        (break_learning_rate, "steps of RowAdam"),
        (break_rows, "steps of RowAdam"),
    ],
)
def test_the_gate_stays_closed(tiny, monkeypatch, breaking, what):
    breaking(monkeypatch)
    with pytest.raises(GateError, match=f"wrong result, so no speeds.*{what}"):
        gate.check(tiny, CPU)


def test_a_parameter_without_a_gradient_is_seen(tiny, monkeypatch):
    search = ProductKeys.forward

    def detached(self, query):
        hits = search(self, query)
        return Hits(hits.scores.detach(), hits.slots)

    monkeypatch.setattr(ProductKeys, "forward", detached)
    with pytest.raises(GateError, match="no gradient of"):
        gate.check_layer(tiny, CPU)


@pytest.fixture
def row_step(tiny):
    """What `check_update` takes: half of the rows are read."""
    table_SV = make_table(tiny, CPU)
    states = torch.zeros_like(table_SV), torch.zeros_like(table_SV), torch.zeros(tiny.slots, dtype=torch.int32)
    slots_TR = torch.randint(tiny.slots // 2, (tiny.tokens, 6))
    return table_SV, states, Part(slots_TR, torch.rand(slots_TR.shape), torch.randn(tiny.tokens, tiny.value_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_step_passes(tiny, row_step, dtype):
    table_SV, states, part = row_step
    gate.check_update(tiny, table_SV.to(dtype), states, part)


def misses_an_entry(table, *rest, **settings):
    *states, slots, weights, grads = rest
    row_adam_(table, *states, [slots[0][1:]], [weights[0][1:]], [grads[0][1:]], **settings)


def leaves_the_table(table, *rest, **settings):
    row_adam_(table.clone(), *rest, **settings)


def steps_twice_as_far(table, *rest, lr, **settings):
    row_adam_(table, *rest, lr=2 * lr, **settings)


def touches_all(table, *rest, **settings):
    row_adam_(table, *rest, **settings)
    table.mul_(1.0078125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [misses_an_entry, leaves_the_table, steps_twice_as_far, touches_all])
def test_a_wrong_row_step_does_not(tiny, row_step, dtype, wrong, monkeypatch):
    table_SV, states, part = row_step
    monkeypatch.setattr(gate, "row_adam_", wrong)
    with pytest.raises(GateError, match="row step"):
        gate.check_update(tiny, table_SV.to(dtype), states, part)


def test_looking_does_not_train(tiny):
    from memlayers.bench.layers import make_table, make_textbook

    textbook = make_textbook(tiny, make_table(tiny, CPU)).train()
    before = {name: value.clone() for name, value in textbook.state_dict().items()}
    gate.clear_tokens(tiny, textbook, torch.randn(tiny.tokens, tiny.dim))
    for name, value in textbook.state_dict().items():
        assert torch.equal(value, before[name]), name
