"""Outputs that are zero, not finite, or far off."""

import pytest
import torch

from memlayers import MemoryConfig, doctor
from memlayers.diagnosis.output import far_off
from memlayers.models import add_memory, causal_lm


def test_output_that_is_wrong(make_block, batch, found):
    for parallel, beside in ((False, "its input"), (True, "the network beside it")):
        block = make_block(parallel=parallel)
        values = block.memory.values.weight
        with torch.no_grad():
            values.mul_(1e6)
            finding = found(doctor(block, batch), "output")
            assert finding.state == "warn"
            assert beside in finding.message
            values.zero_()
            finding = found(doctor(block, batch), "output")
            assert (finding.state, finding.message) == ("fail", "its output is zero")
            values.fill_(float("nan"))
            finding = found(doctor(block, batch), "output")
            assert (finding.state, finding.message) == ("fail", "its output is not finite")


def test_compared_with_other_blocks(batch, found):
    model = causal_lm("gpt2", vocab_size=40, layers=3, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    report = doctor(model, {"input_ids": torch.randint(0, 40, (8, 32))})
    assert "other blocks' networks" in found(report, "output").message


@pytest.mark.parametrize(
    ("ratios", "is_far"),
    [([0.0011], False), ([0.0009], True), ([99.0], False), ([101.0], True), ([1e4, 1.0], False), ([1e4, 1e-4], True)],
)
def test_what_is_far_off(ratios, is_far):
    assert far_off(ratios) is is_far
