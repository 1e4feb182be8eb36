"""A memory that the model does not call, or whose output is dropped."""

import torch

from memlayers import MemoryConfig, doctor, quantize_memory
from memlayers.models import add_memory, causal_lm, freeze_base, set_active
from memlayers.optim import MemoryAdamW


def test_never_called(block, batch, fails, only):
    block.mlp.forward = lambda x: x  # a patch that forgot the memory
    block.forward = lambda x: block.outer(x)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "reached", "bypassed")
    only(report, "reached")  # what follows from it is not said again


def test_called_but_dropped(block, batch, fails, only):
    block.forward = lambda x: block.outer(x + 0 * block.mlp(block.inner(x)))
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "reached", "its output is dropped")
    only(report, "reached")
    block.forward = lambda x: (block.mlp(block.inner(x)), block.outer(x))[1]
    fails(doctor(block, batch), "reached", "its output is dropped")


def test_called_without_gradients(block, batch, fails):
    def forward(x):
        with torch.no_grad():
            y = block.mlp(x)
        return block.outer(x + y)

    block.forward = forward
    fails(doctor(block, batch), "reached", "outside of any gradient")


def test_a_gate_at_zero_hides_nothing(make_block, batch, found, fails):
    block = make_block(parallel=True)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    assert report.ok, report
    assert "its gate is still zero" in found(report, "reached").message
    assert not block.mlp.gate.any()
    block.mlp.base.forward = lambda x: x
    block.mlp.forward = lambda x: block.mlp.base(x)
    fails(doctor(block, batch), "reached", "bypassed")


def with_two():
    torch.manual_seed(0)
    model = causal_lm("llama", vocab_size=50, layers=2, dim=16, heads=2, context=64)
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8)
    for name in ("news", "law"):
        add_memory(model, config, [1], mode="parallel", name=name)
    return model


def test_of_named_memories_those_that_are_active_are_examined():
    model, batch = freeze_base(with_two()), {"input_ids": torch.randint(50, (8, 64))}
    set_active(model, "law")
    report = doctor(model, batch, optimizer=MemoryAdamW(model))
    assert report.ok, report
    assert {finding.memory for finding in report.findings} == {None, "model.layers.0.mlp.memory"}  # the outer one
    set_active(model, [])
    for memory in ("model.layers.0.mlp.memory", "model.layers.0.mlp.base.memory"):
        found = [one for one in doctor(model, batch).findings if (one.memory, one.check) == (memory, "reached")]
        assert [(one.state, one.message) for one in found] == [("fail", "the memory is not active")]
        assert "set_active" in found[0].advice


def test_a_memory_of_few_bits_beside_one_that_is_trained_is_left_out():
    model = with_two()
    quantize_memory(model.model.layers[0].mlp.base)
    report = doctor(model, {"input_ids": torch.randint(50, (8, 64))}, optimizer=MemoryAdamW(model))
    assert report.ok, report
    assert {finding.memory for finding in report.findings} == {None, "model.layers.0.mlp.memory"}
