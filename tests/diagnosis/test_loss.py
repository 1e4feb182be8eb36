"""A loss that trains nothing."""

import torch

from memlayers import MemoryConfig, doctor
from memlayers.models import add_memory, causal_lm
from memlayers.optim import MemoryAdamW


def test_a_loss_that_trains_nothing(block, batch, found):
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    report = doctor(block, batch)
    assert found(report, "loss").state == "fail"
    report = doctor(block.requires_grad_(True), batch, loss=lambda model, x: model(x).sum() * float("nan"))
    assert found(report, "loss").message == "it is nan"


def test_a_batch_in_which_no_label_counts(found, only):
    model = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    ids = torch.randint(0, 40, (2, 16))
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 3
    report = doctor(model, {"input_ids": ids, "labels": labels}, optimizer=MemoryAdamW(model))
    only(report, "loss")
    assert "no label counts" in found(report, "loss").message
    assert found(report, "gradients").message == "not checked: no label counts"
