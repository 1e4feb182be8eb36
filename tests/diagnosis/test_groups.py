"""Tables and parameters that nobody trains, or two do."""

import gc

import torch

from memlayers import MemoryConfig, RowAdam, doctor
from memlayers.models import add_memory, causal_lm
from memlayers.optim import MemoryAdamW


def test_table_without_an_owner(block, batch, found, fails):
    optimizer = RowAdam(block)
    del optimizer
    gc.collect()
    for given in (None, torch.optim.AdamW(block.parameters(), weight_decay=0)):
        report = doctor(block, batch, optimizer=given)
        fails(report, "owner", "has no owner")
        assert found(report, "gradients").state == "pass"  # of all other parameters
        assert found(report, "written").state == "skip"
    assert block.mlp.values.weight.requires_grad


def test_table_whose_owner_is_not_stepped(block, batch, fails):
    owner = RowAdam(block)
    report = doctor(block, batch, optimizer=torch.optim.AdamW(block.parameters(), weight_decay=0))
    fails(report, "owner", "owned by a RowAdam that is not among the optimizers given (AdamW)")
    fails(report, "written", "never written")
    dense = [parameter for name, parameter in block.named_parameters() if "values" not in name]
    assert doctor(block, batch, optimizer=[owner, torch.optim.AdamW(dense)]).ok


def test_table_in_the_group_of_another_optimizer(block, batch, fails):
    owner = RowAdam(block)
    others = [parameter for parameter in block.parameters() if parameter is not block.mlp.values.row_mark]
    report = doctor(block, batch, optimizer=(owner, torch.optim.AdamW(others, weight_decay=0.0)))
    fails(report, "owner", "in the wrong group: a RowAdam owns it, and it is in a group of AdamW too")
    fails(report, "groups", "values.weight is in more than one group")


def test_table_in_no_group(block, batch, fails):
    others = [parameter for name, parameter in block.named_parameters() if "values" not in name]
    report = doctor(block, batch, optimizer=torch.optim.AdamW(others))
    fails(report, "groups", "values.weight is in no group")
    fails(report, "written", "never written")
    owner = RowAdam(block)
    owner.param_groups[0]["params"].clear()
    fails(doctor(block, batch, optimizer=[owner, torch.optim.AdamW(others)]), "owner", "in no group of its owner")


def test_an_optimizer_made_before_the_memory(batch, found):
    model = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    optimizer = torch.optim.AdamW(model.parameters())
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [1])
    ids = torch.randint(0, 40, (8, 32))
    report = doctor(model, {"input_ids": ids}, optimizer=optimizer)
    finding = found(report, "groups")
    assert finding.state == "fail"
    assert "values.weight" in finding.message
    assert "that the model does not have" in found(report, "parameters").message


def test_a_parameter_in_two_groups(block, batch, found, fails):
    twice = [block.mlp.query.projections[0].weight]
    others = [parameter for parameter in block.parameters()]
    optimizers = [torch.optim.AdamW(others, weight_decay=0.0), torch.optim.SGD(twice)]
    finding = fails(doctor(block, batch, optimizer=optimizers), "groups", "more than one group")
    assert "query.projections.0.weight" in finding.message
    optimizers[1] = torch.optim.SGD([block.outer.weight])
    report = doctor(block, batch, optimizer=optimizers)
    assert found(report, "parameters").state == "fail"
    assert "outer.weight is in more than one group" in found(report, "parameters").message


def test_a_selector_with_groups_of_its_own_is_in_one_each(block, batch, found):
    for rate in (0.0, 1e-3):
        optimizer = MemoryAdamW(block, selector_lr=rate)
        report = doctor(block, batch, optimizer=optimizer)
        assert found(report, "groups").state == "pass"
        assert found(report, "parameters").state == "pass"
        optimizer.release()


def test_weight_decay_on_the_table(block, batch, found, fails):
    report = doctor(block, batch, optimizer=torch.optim.AdamW(block.parameters(), weight_decay=0.05))
    fails(report, "decay", "weight decay of 0.05")
    assert found(report, "unread").state in ("warn", "pass")


def test_a_hook_on_a_table_in_row_mode_is_named(block, batch, found):
    optimizer = MemoryAdamW(block)
    block.mlp.values.weight.register_post_accumulate_grad_hook(lambda weight: None)
    finding = found(doctor(block, batch, optimizer=optimizer), "owner")
    assert (finding.state, "a hook is registered on the weight" in finding.message) == ("warn", True)
    assert "register_row_hook" in finding.advice


def test_a_plain_tensor_in_the_place_of_a_row_gradient_is_named(block, batch, found):
    optimizer = MemoryAdamW(block)
    block.mlp.values.row_mark.grad = torch.ones(1)
    finding = found(doctor(block, batch, optimizer=optimizer), "owner")
    assert (finding.state, "replaced by a plain tensor" in finding.message) == ("warn", True)
    assert "row gradients can be" in finding.advice
