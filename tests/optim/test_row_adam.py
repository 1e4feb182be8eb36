import copy

import pytest
import torch
from torch import nn

from memlayers import RowAdam, ValueTable
from memlayers.ops.row_step import row_adam_


def reads(num_slots, tokens=4, topk=3, dtype=torch.float64):
    return torch.randint(num_slots, (tokens, topk)), torch.randn(tokens, topk, dtype=dtype)


def loss_of(table, slots, weights):
    y = table.read(slots, weights.clone().requires_grad_())
    return (y - torch.arange(y.numel(), dtype=y.dtype).view_as(y)).square().sum()


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_is_torch_s_on_one_table(limit):
    table = ValueTable(30, 4, dtype=torch.float64)
    twin = copy.deepcopy(table)
    slots, weights = reads(30)
    # eps of the gradient's size, or Adam's first step would hide any scale.
    optimizer = RowAdam([table], lr=0.1, eps=1.0, max_grad_norm=limit)
    adam = torch.optim.Adam(twin.parameters(), lr=0.1, eps=1.0)
    loss_of(table, slots, weights).backward()
    loss_of(twin, slots, weights).backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), limit)
    assert (norm > limit) == (limit < 1)
    optimizer.step()
    adam.step()
    touched = slots.flatten().unique()
    torch.testing.assert_close(table.weight[touched], twin.weight[touched], rtol=1e-9, atol=1e-9)


def test_the_first_step_of_a_row_read_late_is_as_large_as_one_read_early():
    table = ValueTable(3, 1)
    optimizer = RowAdam([table], lr=0.1)
    for slot in [0] * 30 + [1]:
        before = table.weight.detach().clone()
        loss_of(table, torch.tensor([[slot]]), torch.ones(1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (table.weight - before)[1].abs().item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"betas": (0.9, 1.0)}, r"betas .* \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
        ({"betas": 0.9}, r"betas .* got 0.9"),
        ({"moments": "float16"}, "moments must be one of 'float32', 'bfloat16', got 'float16'"),
    ],
)
def test_its_own_settings_are_checked(settings, named):
    table = ValueTable(3, 2)
    with pytest.raises(ValueError, match=named):
        RowAdam([table], **settings)
    assert table.row_gradient is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bfloat16_moments_survive_a_round_trip_in_mid_run(dtype, rounding, tmp_path):
    def run(restart):
        torch.manual_seed(0)
        table = ValueTable(9, 4, dtype=dtype)
        optimizer = RowAdam([table], lr=0.01, moments="bfloat16", rounding=rounding)
        for step in range(6):
            loss_of(table, *reads(9, dtype=torch.float32)).backward()
            optimizer.step()
            if restart and step == 2:
                torch.save([table.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
                weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
                with torch.random.fork_rng():
                    table = ValueTable(9, 4, dtype=dtype)
                table.load_state_dict(weights)
                optimizer = RowAdam([table])
                optimizer.load_state_dict(state)
        return {"weight": table.weight, **optimizer.state[table.weight]}

    whole, resumed = run(False), run(True)
    assert whole["exp_avg"].dtype == whole["exp_avg_sq"].dtype == torch.bfloat16
    for name, value in whole.items():
        assert resumed[name].dtype == value.dtype, name
        assert torch.equal(resumed[name], value), name


def test_a_state_saved_before_there_were_dtypes_of_moments_is_refused():
    state = RowAdam([ValueTable(3, 2)]).state_dict()
    del state["param_groups"][0]["moments"]
    with pytest.raises(ValueError, match="must say 'moments' for its value tables: memlayers 0.1.0 saved it"):
        RowAdam([ValueTable(3, 2)]).load_state_dict(state)


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_bfloat16_second_moment_decays_on_average_where_it_is_rounded_stochastically(stochastic):
    """Of a row that is read 300 times without a gradient, 0.999 of it is left each time."""
    table, average = torch.zeros(2, 1, 512)
    square, steps = torch.full((1, 512), 0.7, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    before = square.double().mean()
    gradient = [torch.zeros(1, 1).long()], [torch.ones(1, 1)], [torch.zeros(1, 512)]
    for seed in range(300):
        row_adam_(
            table, average, square, steps, *gradient, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
            seed=seed if stochastic else -1,
        )  # fmt: skip
    left = (square.double().mean() / before).item()
    assert left == pytest.approx(0.999**300 if stochastic else 1.0, rel=0.01)


@pytest.mark.slow
def test_bfloat16_moments_train_as_well_as_float32_ones():
    """A table learns another one, from weighted sums of rows with noise."""
    losses = {}
    for moments in ("float32", "bfloat16"):
        torch.manual_seed(0)
        table, target = ValueTable(40, 8), torch.randn(40, 8)
        optimizer = RowAdam([table], lr=0.03, moments=moments)
        for _ in range(800):
            slots, weights = reads(40, tokens=8, dtype=torch.float32)
            wanted = (target[slots] * weights[..., None]).sum(1) + 0.1 * torch.randn(8, 8)
            (table.read(slots, weights) - wanted).square().mean().backward()
            optimizer.step()
        losses[moments] = (table.weight - target).square().mean().item()
    assert losses["float32"] < 0.02
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.2)
