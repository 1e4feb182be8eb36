"""A memory that the model does not call, or whose output is dropped."""

import torch

from memlayers import doctor
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
