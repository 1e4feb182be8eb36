"""Each silent fault, planted: `doctor` fails, and its message names the fault and the memory."""

import copy
import gc

import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer, RowAdam, RowSGD, ValueTable, doctor
from memlayers.models import add_memory, causal_lm
from memlayers.optim import MemoryAdamW


def found(report, check):
    (finding,) = [finding for finding in report.findings if finding.check == check]
    return finding


def fails(report, check, says):
    """The check failed, says so in these words, and names the memory."""
    finding = found(report, check)
    assert finding.state == "fail", report
    assert says in finding.message
    assert finding.memory in ("mlp", "mlp.memory")
    assert finding.advice
    assert not report.ok
    return finding


def only(report, *checks):
    assert {finding.check for finding in report.failures} == set(checks), report


def test_a_healthy_memory_passes(make_block, batch):
    for parallel in (False, True):
        for norm in ("batch", "rms", "none"):
            block = make_block(parallel=parallel, query_norm=norm)
            for optimizer in (MemoryAdamW(block, weight_decay=0.1), None):
                report = doctor(block, batch, optimizer=optimizer)
                assert {finding.state for finding in report.findings} <= {"pass", "skip"}, report
                assert ("skip" in {finding.state for finding in report.findings}) == (optimizer is None)


def test_never_called(block, batch):
    block.mlp.forward = lambda x: x  # a patch that forgot the memory
    block.forward = lambda x: block.outer(x)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "reached", "bypassed")
    only(report, "reached")  # what follows from it is not said again


def test_called_but_dropped(block, batch):
    block.forward = lambda x: block.outer(x + 0 * block.mlp(block.inner(x)))
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "reached", "its output is dropped")
    only(report, "reached")
    block.forward = lambda x: (block.mlp(block.inner(x)), block.outer(x))[1]
    fails(doctor(block, batch), "reached", "its output is dropped")


def test_called_without_gradients(block, batch):
    def forward(x):
        with torch.no_grad():
            y = block.mlp(x)
        return block.outer(x + y)

    block.forward = forward
    fails(doctor(block, batch), "reached", "outside of any gradient")


def test_a_gate_at_zero_hides_nothing(make_block, batch):
    block = make_block(parallel=True)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    assert report.ok, report
    assert "its gate is still zero" in found(report, "reached").message
    assert not block.mlp.gate.any()
    block.mlp.base.forward = lambda x: x
    block.mlp.forward = lambda x: block.mlp.base(x)
    fails(doctor(block, batch), "reached", "bypassed")


def test_table_without_an_owner(block, batch):
    optimizer = RowAdam(block)
    del optimizer
    gc.collect()
    for given in (None, torch.optim.AdamW(block.parameters(), weight_decay=0)):
        report = doctor(block, batch, optimizer=given)
        fails(report, "owner", "has no owner")
        assert found(report, "gradients").state == "pass"  # of all other parameters
        assert found(report, "written").state == "skip"
    assert block.mlp.values.weight.requires_grad


def test_table_whose_owner_is_not_stepped(block, batch):
    owner = RowAdam(block)
    report = doctor(block, batch, optimizer=torch.optim.AdamW(block.parameters(), weight_decay=0))
    fails(report, "owner", "owned by a RowAdam that is not among the optimizers given (AdamW)")
    fails(report, "written", "never written")
    dense = [parameter for name, parameter in block.named_parameters() if "values" not in name]
    assert doctor(block, batch, optimizer=[owner, torch.optim.AdamW(dense)]).ok


def test_table_in_the_group_of_another_optimizer(block, batch):
    owner = RowAdam(block)
    others = [parameter for parameter in block.parameters() if parameter is not block.mlp.values.row_mark]
    report = doctor(block, batch, optimizer=(owner, torch.optim.AdamW(others, weight_decay=0.0)))
    fails(report, "owner", "in the wrong group: a RowAdam owns it, and it is in a group of AdamW too")
    fails(report, "groups", "values.weight is in more than one group")


def test_table_in_no_group(block, batch):
    others = [parameter for name, parameter in block.named_parameters() if "values" not in name]
    report = doctor(block, batch, optimizer=torch.optim.AdamW(others))
    fails(report, "groups", "values.weight is in no group")
    fails(report, "written", "never written")
    owner = RowAdam(block)
    owner.param_groups[0]["params"].clear()
    fails(doctor(block, batch, optimizer=[owner, torch.optim.AdamW(others)]), "owner", "in no group of its owner")


def test_an_optimizer_made_before_the_memory(batch):
    model = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    optimizer = torch.optim.AdamW(model.parameters())
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [1])
    ids = torch.randint(0, 40, (8, 32))
    report = doctor(model, {"input_ids": ids}, optimizer=optimizer)
    finding = found(report, "groups")
    assert finding.state == "fail"
    assert "values.weight" in finding.message
    assert "that the model does not have" in found(report, "parameters").message


def test_a_parameter_in_two_groups(block, batch):
    twice = [block.mlp.query.projections[0].weight]
    others = [parameter for parameter in block.parameters()]
    optimizers = [torch.optim.AdamW(others, weight_decay=0.0), torch.optim.SGD(twice)]
    finding = fails(doctor(block, batch, optimizer=optimizers), "groups", "more than one group")
    assert "query.projections.0.weight" in finding.message
    optimizers[1] = torch.optim.SGD([block.outer.weight])
    report = doctor(block, batch, optimizer=optimizers)
    assert found(report, "parameters").state == "fail"
    assert "outer.weight is in more than one group" in found(report, "parameters").message


def test_frozen_table(block, batch):
    block.mlp.values.weight.requires_grad_(False)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "frozen", "the table is frozen")
    only(report, "frozen")


def test_frozen_gate_at_zero(make_block, batch):
    block = make_block(parallel=True)
    block.mlp.gate.requires_grad_(False)
    fails(doctor(block, batch, optimizer=MemoryAdamW(block)), "frozen", "the gate is zero and frozen")
    block.mlp.gate.fill_(0.5)
    assert found(doctor(block, batch), "frozen").state == "warn"


# peft asks models for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft(batch):
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


def test_frozen_queries_are_a_warning(block, batch):
    block.mlp.query.requires_grad_(False)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    assert report.ok
    assert found(report, "frozen").state == "warn"
    assert "query.projections.0.weight" in found(report, "frozen").message


class FewerKeys(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.keys.topk = 2


class FewerRows(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.values.register_forward_pre_hook(lambda module, args: (args[0][..., :2], args[1][..., :2]))


class OneWeight(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.values.register_forward_pre_hook(
            lambda module, args: (args[0], torch.where(args[1] == args[1].amax(-1, keepdim=True), args[1], 0))
        )


class SameSlots(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.keys.register_forward_hook(
            lambda module, args, hits: hits._replace(slots=hits.slots[..., :1].expand_as(hits.slots).contiguous())
        )


class BestSlotAgain(MemoryLayer):
    def read(self, x_TD, slots_THK, weights_THK):
        return super().read(x_TD, slots_THK[..., :1].expand_as(slots_THK), weights_THK)


class SlotsOfOneHead(MemoryLayer):
    def read(self, x_TD, slots_THK, weights_THK):
        return super().read(x_TD, slots_THK[:, :1].expand_as(slots_THK), weights_THK)


class AlmostOneWeight(MemoryLayer):
    def weigh(self, scores_THK):
        return torch.cat([scores_THK[..., :1].softmax(-1), 1e-30 * scores_THK[..., 1:].exp()], -1)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (BestSlotAgain, "distinct rows a token are read where the search found"),
        (SlotsOfOneHead, "distinct rows a token are read where the search found"),
        (AlmostOneWeight, "66.7% of the weights of neighbours are zero"),
        (FewerKeys, "search 2 slots, the configuration says topk = 3"),
        (FewerRows, "2 rows a token are read instead of 2 x 3"),
        (OneWeight, "of the weights of neighbours are zero"),
        (SameSlots, "the same slot twice"),
    ],
)
def test_k_is_ignored(make_block, batch, layer, says):
    report = doctor(make_block(layer=layer), batch)
    assert found(report, "neighbours").message.startswith("K is ignored")
    fails(report, "neighbours", says)


@pytest.mark.parametrize("norm", ["batch", "rms", "none"])
@pytest.mark.parametrize("num_subkeys", [6, 64])
def test_collapsed_query(make_block, batch, norm, num_subkeys):
    block = make_block(query_norm=norm, num_subkeys=num_subkeys)
    with torch.no_grad():  # all queries almost equal
        if norm == "batch":
            block.mlp.query.norm.weight.fill_(1e-4)
            block.mlp.query.norm.bias.normal_()
        else:
            block.mlp.query.projections[0].weight.mul_(1e-4)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "usage", "the query has collapsed")
    only(report, "usage")


def test_equal_tokens_are_no_collapse(block):
    block.dropout.p = 0.0
    report = doctor(block, torch.ones(8, 16, 16))
    assert found(report, "usage").state == "skip"


def test_weight_decay_on_the_table(block, batch):
    report = doctor(block, batch, optimizer=torch.optim.AdamW(block.parameters(), weight_decay=0.05))
    fails(report, "decay", "weight decay of 0.05")
    assert found(report, "unread").state in ("warn", "pass")


def test_momentum_on_unread_rows_is_a_warning(make_block, batch):
    block = make_block(num_subkeys=32)
    optimizer = torch.optim.AdamW(block.parameters(), weight_decay=0.0)
    block(torch.randn(64, 16)).sum().backward()
    optimizer.step()
    report = doctor(block, batch[:2], optimizer=optimizer)
    assert report.ok
    assert found(report, "unread").state == "warn"
    assert found(report, "written").state == "pass"


class Forgetful(torch.optim.SGD):
    """Its step skips tables."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and len(parameter) != 64:
                    parameter.data -= group["lr"] * parameter.grad


class Spilling(RowSGD):
    def update(self, weight_SV, *args, **settings):
        weight_SV += 1


def test_rows_are_never_written(block, batch):
    report = doctor(block, batch, optimizer=Forgetful(block.parameters(), lr=0.1))
    fails(report, "written", "rows are never written")
    only(report, "written")
    finding = fails(doctor(block, batch, optimizer=torch.optim.SGD(block.parameters(), lr=0.0)), "written", "never")
    assert "lr of its group is 0" in finding.advice
    finding = fails(doctor(block, batch, optimizer=MemoryAdamW(block, value_lr=0.0)), "written", "never")
    assert "value_lr of its group is 0" in finding.advice


def test_updates_that_round_to_nothing(block, batch):
    block.mlp.values.to(torch.bfloat16)
    lost = MemoryAdamW(block, value_lr=1e-7, value_rounding="nearest")
    finding = fails(doctor(block, batch, optimizer=lost), "written", "never written")
    assert "stochastic" in finding.advice


def test_rows_without_a_gradient_need_not_be_written(make_block, batch):
    block = make_block(num_subkeys=64)  # half of the tokens have no part in the loss
    report = doctor(block, batch, optimizer=MemoryAdamW(block), loss=lambda model, x: model(x)[:, :8].sum())
    assert found(report, "written").state == "pass", report


def test_rows_that_were_not_read_are_written(make_block, batch):
    block = make_block(num_subkeys=32)
    dense = [parameter for name, parameter in block.named_parameters() if "values" not in name]
    optimizers = [Spilling(block, lr=0.1), torch.optim.SGD(dense)]
    fails(doctor(block, batch[:2], optimizer=optimizers), "unread", "rows that were not read")


def test_gradients_that_are_not_there(block, batch):
    block.mlp.keys.register_forward_hook(lambda module, args, hits: hits._replace(scores=hits.scores.detach()))
    finding = fails(doctor(block, batch), "gradients", "missing")
    assert "keys.weight" in finding.message
    assert "values.weight" not in finding.message


def test_gradients_that_are_not_finite(block, batch):
    block.mlp.values.register_full_backward_hook(lambda module, into, out: (into[0], into[1] * float("inf")))
    assert "not finite" in fails(doctor(block, batch), "gradients", "keys.weight").message


def test_one_neighbour_trains_no_query(make_block, batch):
    finding = found(doctor(make_block(topk=1), batch), "gradients")
    assert finding.state == "warn"
    assert "keys.weight" in finding.message


def test_output_that_is_wrong(make_block, batch):
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


def test_compared_with_other_blocks(batch):
    model = causal_lm("gpt2", vocab_size=40, layers=3, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    report = doctor(model, {"input_ids": torch.randint(0, 40, (8, 32))})
    assert "other blocks' networks" in found(report, "output").message


def test_a_loss_that_trains_nothing(block, batch):
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    report = doctor(block, batch)
    assert found(report, "loss").state == "fail"
    report = doctor(block.requires_grad_(True), batch, loss=lambda model, x: model(x).sum() * float("nan"))
    assert found(report, "loss").message == "it is nan"


def test_no_memory_at_all(batch):
    with pytest.raises(ValueError, match="model must have at least one memory"):
        doctor(nn.Linear(16, 16), batch)


def test_no_optimizer(block, batch):
    with pytest.raises(ValueError, match="optimizer must be one torch.optim.Optimizer or several, got str"):
        doctor(block, batch, optimizer="adam")
    with pytest.raises(ValueError, match="loss must be a tensor of one number, got shape"):
        doctor(block, batch, loss=lambda model, x: model(x))


class Experts(MemoryLayer):
    """A weight is a score that a relu may set to zero."""

    def read(self, x_TD, slots_THK, weights_THK):
        return super().read(x_TD, slots_THK, weights_THK * x_TD[:, :1, None].relu())


def test_weights_that_are_zero_by_design_are_a_warning(make_block, batch):
    block = make_block(layer=Experts)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    assert report.ok, report
    assert found(report, "neighbours").state == "warn"
    assert "which `read` sets to zero" in found(report, "neighbours").message


def test_one_collapsed_head_and_half_a_query_are_seen(make_block, batch):
    for first, last, says in ((0, 8, "of head 0 alone"), (8, 12, "in the first codebook of head 1")):
        block = make_block(heads=4, num_subkeys=16, query_norm="rms")
        with torch.no_grad():
            block.mlp.query.projections[0].weight[first:last] = 0
        finding = fails(doctor(block, batch), "usage", says)
        assert "query_norm='batch'" in finding.advice


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


class Odd(torch.optim.Optimizer):
    """Without a learning rate, or with one that is None; it looks at the first parameter of each group."""

    def step(self, closure=None):
        assert all(group["params"][0].numel() for group in self.param_groups)


def test_optimizers_of_other_kinds(block, batch):
    groups = [{"params": list(part.parameters())} for part in (block.inner, block.outer, block.mlp)]
    for settings in ({}, {"lr": None}):
        fails(doctor(block, batch, optimizer=Odd(groups, settings)), "written", "never written")


def test_a_warm_up_that_begins_at_zero_is_healthy(block, batch):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    report = doctor(block, batch, optimizer=optimizer)
    assert report.ok, report
    assert "at the learning rate that its schedule began with: now it is 0" in found(report, "written").message
    assert optimizer.param_groups[0]["lr"] == 0


def test_a_penalty_on_a_table_in_row_mode(block, batch):
    def loss(model, batch):
        return model(batch).sum() + 1e-2 * model.mlp.values.weight.square().sum()

    fails(doctor(block, batch, optimizer=MemoryAdamW(block), loss=loss), "gradients", "values.weight has a dense grad")


def test_a_batch_in_which_no_label_counts():
    model = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8), [2])
    ids = torch.randint(0, 40, (2, 16))
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 3
    report = doctor(model, {"input_ids": ids, "labels": labels}, optimizer=MemoryAdamW(model))
    only(report, "loss")
    assert "no label counts" in found(report, "loss").message
    assert found(report, "gradients").message == "not checked: no label counts"


def test_a_step_that_makes_parameters_not_finite(make_block, batch):
    model = make_block(parallel=True)

    class Spoiling(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    optimizer = Spoiling([model.memory.query.projections[0].weight, *_others(model)], lr=0.1)
    report = doctor(model, batch, optimizer=optimizer)
    (finding,) = [one for one in report.failures if one.check == "written"]
    assert "a step makes query.projections.0.weight not finite" in finding.message
    assert model.memory.query.projections[0].weight.isfinite().all()


def _others(model):
    return [p for p in model.parameters() if p is not model.memory.query.projections[0].weight]
