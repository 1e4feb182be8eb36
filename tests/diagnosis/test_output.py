"""Outputs that are zero, not finite, or far off."""

import pytest
import torch

from memlayers import MemoryConfig, doctor
from memlayers.diagnosis.output import far_off
from memlayers.diagnosis.watch import Squares
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


def sizes_seen(modules):
    """What forward hooks put in: the root mean square of what each of these modules returned last."""
    sizes = {}

    def note(name, output):
        sizes[name] = float(output.detach().double().square().mean().sqrt())

    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: note(name, output))
    return sizes


def test_sizes_are_root_mean_squares(make_block, batch, found):
    block = make_block(parallel=True)
    torch.nn.init.constant_(block.norm.weight, 3.0)
    sizes = sizes_seen({"own": block.memory, "beside": block.mlp.base, "input": block.norm})
    said = found(doctor(block, batch), "output").message
    own = sizes["own"]
    assert said == (
        f"root mean square {own:.3g}, {own / sizes['input']:.3g} times that of its input, "
        f"{own / sizes['beside']:.3g} times that of the network beside it"
    )
    for parameter in block.mlp.base.parameters():
        torch.nn.init.zeros_(parameter)
    said = found(doctor(block, batch), "output").message
    own = sizes["own"]
    assert said == f"root mean square {own:.3g}, {own / sizes['input']:.3g} times that of its input"


def test_a_root_mean_square_is_over_all_parts():
    squares = Squares()
    assert squares.rms == 0
    squares.add(torch.tensor([[3.0]]))
    squares.add(torch.tensor([[4.0, 5.0]]))
    assert squares.rms == pytest.approx((50 / 3) ** 0.5)


def test_compared_with_the_middle_one_of_other_blocks(found):
    model = causal_lm("gpt2", vocab_size=40, layers=5, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    with torch.no_grad():
        for number, block in enumerate(model.transformer.h):
            if number != 1:
                block.mlp.c_proj.weight.mul_(10**number)
    sizes = sizes_seen(dict(enumerate(block.mlp for block in model.transformer.h)))
    said = found(doctor(model, {"input_ids": torch.randint(0, 40, (8, 32))}), "output").message
    middle = sorted(sizes[number] for number in (0, 2, 3, 4))[2]
    assert said.endswith(f", {sizes[1] / middle:.3g} times that of other blocks' networks")


@pytest.mark.parametrize(
    ("ratios", "is_far"),
    [([0.0011], False), ([0.0009], True), ([99.0], False), ([101.0], True), ([1e4, 1.0], False), ([1e4, 1e-4], True)],
)
def test_what_is_far_off(ratios, is_far):
    assert far_off(ratios) is is_far
