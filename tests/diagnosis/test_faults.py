"""`doctor` as a whole: what is healthy passes, also in wrappers and subclasses; what it cannot examine it refuses."""

import copy

import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer, ValueTable, doctor
from memlayers.models import add_memory, causal_lm
from memlayers.optim import MemoryAdamW


def test_a_healthy_memory_passes(make_block, batch):
    for parallel in (False, True):
        for norm in ("batch", "rms", "none"):
            block = make_block(parallel=parallel, query_norm=norm)
            for optimizer in (MemoryAdamW(block, weight_decay=0.1), None):
                report = doctor(block, batch, optimizer=optimizer)
                assert {finding.state for finding in report.findings} <= {"pass", "skip"}, report
                assert ("skip" in {finding.state for finding in report.findings}) == (optimizer is None)


# peft asks models for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft(batch, found):
    peft = pytest.importorskip("peft")
    model = causal_lm("llama", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    config = {"r": 2, "target_modules": ["q_proj", "projections.0"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    ids = {"input_ids": torch.randint(0, 40, (8, 32))}
    report = doctor(wrapped, ids, optimizer=MemoryAdamW(wrapped))
    assert [finding.check for finding in report.failures] == ["frozen"]  # PEFT freezes the table
    table = next(module for module in wrapped.modules() if isinstance(module, ValueTable))
    table.weight.requires_grad_(True)
    report = doctor(wrapped, ids, optimizer=MemoryAdamW(wrapped))
    assert report.ok, report
    assert "query.projections.0.base_layer.weight" in found(report, "frozen").message
    saved = peft.get_peft_model(
        model, peft.LoraConfig(**{**config, "target_modules": ["q_proj"]}, modules_to_save=["memory"])
    )
    report = doctor(saved, ids, optimizer=MemoryAdamW(saved))  # of the copy that PEFT trains, not of the original
    assert {finding.state for finding in report.findings} == {"pass"}, report


def test_no_memory_at_all(batch):
    with pytest.raises(ValueError, match="model must have at least one memory"):
        doctor(nn.Linear(16, 16), batch)


def test_no_optimizer(block, batch):
    with pytest.raises(ValueError, match="optimizer must be one torch.optim.Optimizer or several, got str"):
        doctor(block, batch, optimizer="adam")
    with pytest.raises(ValueError, match="loss must be a tensor of one number, got shape"):
        doctor(block, batch, loss=lambda model, x: model(x))


class SecondTable(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.second = ValueTable(config.slots, config.width)

    def read(self, x_TD, slots_THK, weights_THK):
        return super().read(x_TD, slots_THK, weights_THK) + self.second.read(
            slots_THK.flatten(1), weights_THK.flatten(1)
        )


class Keywords(MemoryLayer):
    def read(self, x_TD, slots_THK, weights_THK):
        return self.values(weights=weights_THK.flatten(1), slots=slots_THK.flatten(1))


@pytest.mark.parametrize("layer", [SecondTable, Keywords])
def test_layers_of_other_kinds_are_healthy(make_block, batch, layer):
    block = make_block(layer=layer)
    optimizer = MemoryAdamW(block)
    before = copy.deepcopy(block.state_dict())
    report = doctor(block, batch, optimizer=optimizer)
    assert {finding.state for finding in report.findings} == {"pass"}, report
    assert all(map(torch.equal, before.values(), block.state_dict().values()))
