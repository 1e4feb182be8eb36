"""Steps that do not write the rows that were read, or write others."""

import pytest
import torch

from memlayers import RowSGD, doctor
from memlayers.optim import MemoryAdamW


def test_momentum_on_unread_rows_is_a_warning(make_block, batch, found):
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


def test_rows_are_never_written(block, batch, fails, only):
    report = doctor(block, batch, optimizer=Forgetful(block.parameters(), lr=0.1))
    fails(report, "written", "rows are never written")
    only(report, "written")
    finding = fails(doctor(block, batch, optimizer=torch.optim.SGD(block.parameters(), lr=0.0)), "written", "never")
    assert "lr of its group is 0" in finding.advice
    finding = fails(doctor(block, batch, optimizer=MemoryAdamW(block, value_lr=0.0)), "written", "never")
    assert "value_lr of its group is 0" in finding.advice


def test_updates_that_round_to_nothing(block, batch, fails):
    block.mlp.values.to(torch.bfloat16)
    lost = MemoryAdamW(block, value_lr=1e-7, value_rounding="nearest")
    finding = fails(doctor(block, batch, optimizer=lost), "written", "never written")
    assert "stochastic" in finding.advice


def test_rows_without_a_gradient_need_not_be_written(make_block, batch, found):
    block = make_block(num_subkeys=64)  # half of the tokens have no part in the loss
    report = doctor(block, batch, optimizer=MemoryAdamW(block), loss=lambda model, x: model(x)[:, :8].sum())
    assert found(report, "written").state == "pass", report


def test_rows_that_were_not_chosen_need_not_be_written(make_block, batch, found):
    block = make_block(num_subkeys=8)
    optimizer = MemoryAdamW(block)
    table = block.mlp.values
    optimizer.choose_rows({table: range(0, 64, 16)})
    assert found(doctor(block, batch, optimizer=optimizer), "written").state == "pass"
    optimizer.choose_rows({table: []})
    finding = found(doctor(block, batch, optimizer=optimizer), "written")
    assert (finding.state, "rows that were chosen" in finding.message) == ("warn", True)


def test_rows_that_were_not_read_are_written(make_block, batch, fails):
    block = make_block(num_subkeys=32)
    dense = [parameter for name, parameter in block.named_parameters() if "values" not in name]
    optimizers = [Spilling(block, lr=0.1), torch.optim.SGD(dense)]
    fails(doctor(block, batch[:2], optimizer=optimizers), "unread", "rows that were not read")


class Shrinking(torch.optim.SGD):
    """Halves all that it holds, with a gradient or without."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter /= 2


def test_a_table_in_row_mode_is_stepped_by_its_owner_alone(make_block, batch, found, only):
    block = make_block(num_subkeys=32)
    optimizers = [MemoryAdamW(block), Shrinking([block.mlp.values.weight], lr=0.1)]
    report = doctor(block, batch[:2], optimizer=optimizers)
    only(report, "owner", "groups")
    assert [found(report, check).state for check in ("written", "unread")] == ["pass", "pass"]


class Odd(torch.optim.Optimizer):
    """Without a learning rate, or with one that is None; it looks at the first parameter of each group."""

    def step(self, closure=None):
        assert all(group["params"][0].numel() for group in self.param_groups)


def test_optimizers_of_other_kinds(block, batch, fails):
    groups = [{"params": list(part.parameters())} for part in (block.inner, block.outer, block.mlp)]
    for settings in ({}, {"lr": None}):
        fails(doctor(block, batch, optimizer=Odd(groups, settings)), "written", "never written")


def test_a_warm_up_that_begins_at_zero_is_healthy(block, batch, found):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    report = doctor(block, batch, optimizer=optimizer)
    assert report.ok, report
    assert "at the learning rate that its schedule began with: now it is 0" in found(report, "written").message
    assert optimizer.param_groups[0]["lr"] == 0


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


class Partial(torch.optim.Optimizer):
    """Writes this share of the rows that have a gradient."""

    def __init__(self, parameters, share):
        super().__init__(parameters, {})
        self.share = share

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and parameter.ndim == 2 and len(parameter) == 4096:
                live = parameter.grad.any(1).nonzero().squeeze(1)
                parameter.data[live[: round(self.share * len(live))]] += 1


@pytest.mark.parametrize(
    ("share", "state", "says"),
    [
        (1.0, "pass", "of"),
        (0.96, "pass", "of"),
        (0.94, "warn", "of"),
        (0.51, "warn", "of"),
        (0.49, "fail", "most rows are not written: of"),
        (0.0, "fail", "rows are never written: of"),
    ],
)
def test_a_step_that_writes_some_of_the_rows(make_block, batch, found, share, state, says):
    block = make_block(num_subkeys=64)
    finding = found(doctor(block, batch, optimizer=Partial(block.parameters(), share)), "written")
    assert finding.state == state, finding
    assert finding.message.startswith(says)


class SpillingOnce(RowSGD):
    """Writes every other row, too."""

    def update(self, weight_SV, *args, **settings):
        super().update(weight_SV, *args, **settings)
        weight_SV[1::2] += 1


def test_half_of_the_rows_that_were_not_read_are_written(make_block, batch, fails):
    block = make_block(num_subkeys=64)
    dense = [parameter for name, parameter in block.named_parameters() if "values" not in name]
    optimizers = [SpillingOnce(block, lr=0.1), torch.optim.SGD(dense)]
    fails(doctor(block, batch[:2], optimizer=optimizers), "unread", "rows that were not read")
