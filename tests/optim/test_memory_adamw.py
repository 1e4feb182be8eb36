import collections
import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from memlayers import MemoryConfig, MemoryLayer, MemoryPlus, ValueTable
from memlayers.optim import MemoryAdamW, RowAdagrad, RowAdam, RowSGD
from memlayers.query import HeadRMSNorm, MaskedBatchNorm


def make(**fields):
    config = MemoryConfig(**{"dim": 6, "heads": 2, "topk": 2, "num_subkeys": 4, "query_dim": 4, **fields})
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), MemoryLayer(config), nn.Linear(6, 3))


def loss_of(model, tokens=9):
    return model(torch.randn(tokens, 6)).square().mean()


def test_every_trainable_parameter_is_in_one_group_and_norms_biases_and_tables_are_not_decayed():
    model = make()
    optimizer = MemoryAdamW(model, lr=0.1, weight_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in optimizer.param_groups]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(names) - 1
    assert set(names.values()) - set().union(*groups) == {"2.values.companion.row_mark"}
    decayed, spared, tables = groups
    assert decayed == {"0.weight", "2.query.projections.0.weight", "2.keys.weight", "3.weight"}
    assert tables == {"2.values.weight"}
    assert {"2.query.norm.weight", "1.weight", "0.bias"} < spared
    assert [group.get("weight_decay", 0) for group in optimizer.param_groups] == [0.5, 0.0, 0]


class Gain(nn.Module):
    """A module whose weight has two dimensions, as a linear map has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm((2, 3)),
    "RMSNorm": lambda: nn.RMSNorm((2, 3)),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "MaskedBatchNorm": lambda: MaskedBatchNorm(2, 3),
    "HeadRMSNorm": lambda: HeadRMSNorm(2, 3),
}


@pytest.mark.parametrize("name", NORMS)
def test_no_gain_of_a_norm_is_decayed_whatever_its_shape(name):
    norm, gain = NORMS[name](), Gain()
    decayed, spared = MemoryAdamW(nn.Sequential(gain, norm), weight_decay=0.5).param_groups
    assert (decayed["params"], decayed["weight_decay"]) == ([gain.weight], 0.5)
    assert (spared["params"], spared["weight_decay"]) == ([*norm.parameters()], 0.0)


@pytest.mark.parametrize("query_norm", ["batch", "rms"])
def test_the_norm_of_a_memory_s_query_is_not_decayed(query_norm):
    model = make(query_norm=query_norm)
    decayed, spared, _ = (set(group["params"]) for group in MemoryAdamW(model, weight_decay=0.5).param_groups)
    assert model[2].query.norm.weight in spared
    assert model[2].query.norm.weight not in decayed


def test_query_and_keys_may_have_a_rate_of_their_own_and_keep_the_rules_of_decay():
    model = make()
    optimizer = MemoryAdamW(model, lr=0.1, weight_decay=0.5, selector_lr=0.02)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared, selector, selector_spared, tables = (
        ({names[p] for p in group["params"]}, group["lr"], group.get("weight_decay"))
        for group in optimizer.param_groups
    )
    assert decayed == ({"0.weight", "3.weight"}, 0.1, 0.5)
    assert spared == ({"0.bias", "1.weight", "1.bias", "3.bias"}, 0.1, 0.0)
    assert selector == ({"2.query.projections.0.weight", "2.keys.weight"}, 0.02, 0.5)
    assert selector_spared == ({"2.query.projections.0.bias", "2.query.norm.weight", "2.query.norm.bias"}, 0.02, 0.0)
    assert tables == ({"2.values.weight"}, 1e-3, None)


def test_the_selector_of_a_memory_plus_holds_its_temperature_and_not_its_gate():
    config = MemoryConfig(dim=6, heads=2, topk=2, num_subkeys=4, query_dim=4)
    layer = MemoryPlus(config)
    optimizer = MemoryAdamW(layer, selector_lr=0.0)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert (rates[layer.keys.log_temperature], rates[layer.gate.weight], rates[layer.output.weight]) == (
        0.0,
        1e-3,
        1e-3,
    )


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_a_selector_rate_moves_the_selector_by_that_and_nothing_at_zero(rate):
    """The first step of Adam moves each element by the rate."""
    model = make()
    optimizer = MemoryAdamW(model, lr=0.1, selector_lr=rate, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    assert moved["0.weight"] == pytest.approx(0.1, rel=1e-2)
    for name in ("2.keys.weight", "2.query.projections.0.weight", "2.query.norm.weight"):
        assert moved[name] == pytest.approx(rate, rel=1e-2)


def test_a_schedule_moves_each_rate_from_its_own_peak():
    optimizer = MemoryAdamW(make(), lr=0.1, value_lr=0.25, selector_lr=0.02, schedule_values=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.01, 0.01, 0.125])


def test_a_state_goes_into_an_optimizer_with_the_same_groups_only():
    model, other = make(), make()
    optimizer = MemoryAdamW(model, selector_lr=0.02)
    loss_of(model).backward()
    optimizer.step()
    again = MemoryAdamW(other, selector_lr=0.5)
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [1e-3, 1e-3, 0.02, 0.02, 1e-3]
    saved, loaded = optimizer.state_dict()["state"], again.state_dict()["state"]
    assert len(saved) == len(loaded) == 12
    for number, entries in saved.items():
        for name, value in entries.items():
            assert torch.equal(loaded[number][name], value), name
    with pytest.raises(ValueError, match="must have 3 parameter groups, .* got 5: .*selector_lr"):
        MemoryAdamW(make()).load_state_dict(optimizer.state_dict())


def test_a_model_without_memories_has_no_selector():
    optimizer = MemoryAdamW(nn.Linear(6, 3), selector_lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_a_state_of_version_0_1_0_is_refused():
    model = make()
    optimizer = MemoryAdamW(model)
    loss_of(model).backward()
    optimizer.step()
    state = optimizer.state_dict()
    for name in ("rounding", "updates", "moments"):
        del state["param_groups"][2][name]
    with pytest.raises(ValueError, match=r"must say 'rounding', 'moments', 'updates' .* memlayers 0.1.0 saved it"):
        optimizer.load_state_dict(state)


def test_it_steps_as_adamw_and_row_adam_do_apart():
    model = make()
    twin = copy.deepcopy(model)
    settings = {"betas": (0.8, 0.9), "eps": 1e-7}
    optimizer = MemoryAdamW(model, lr=0.01, value_lr=0.05, **settings)
    rows = RowAdam(twin, lr=0.05, **settings)
    dense = torch.optim.AdamW(
        [p for name, p in twin.named_parameters() if ".values." not in name], lr=0.01, weight_decay=0, **settings
    )
    for seed in range(4):
        for net, steps in ((model, [optimizer]), (twin, [rows, dense])):
            torch.manual_seed(seed)
            loss_of(net).backward()
            for step in steps:
                step.step()
            net.zero_grad()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_defaults():
    dense, _, tables = MemoryAdamW(make()).param_groups
    assert {name: dense[name] for name in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0,
    }  # fmt: skip
    shared = ("value_lr", "betas", "eps", "max_grad_norm", "schedule_values", "rounding", "moments")
    assert [tables[name] for name in shared] == [1e-3, (0.9, 0.999), 1e-8, None, False, "stochastic", "float32"]


def test_a_scheduler_moves_the_dense_rate_only():
    model = make()
    optimizer = MemoryAdamW(model, lr=0.1, value_lr=0.25)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = model[2].values.weight.detach().clone()
    loss_of(model).backward()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert (model[2].values.weight - before).abs().max().item() == pytest.approx(0.25, rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic")],
    ids=str,
)
def test_a_round_trip_of_the_state_in_mid_run_changes_nothing(dtype, rounding, tmp_path):
    def run(restart):
        torch.manual_seed(0)
        model = make().to(dtype)
        optimizer = MemoryAdamW(model, lr=0.05, value_lr=0.1, value_rounding=rounding)
        for step in range(5):
            model(torch.randn(9, 6).to(dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if restart and step == 2:
                torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
                weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
                with torch.random.fork_rng():
                    model = make().to(dtype)
                model.load_state_dict(weights)
                optimizer = MemoryAdamW(model, lr=0.5, value_lr=0.5)
                optimizer.load_state_dict(state)
        return model.state_dict(), optimizer.state_dict()["state"]

    (weights, state), (weights2, state2) = run(False), run(True)
    for name, value in weights.items():
        assert torch.equal(value, weights2[name]), name
    for number, entries in state.items():
        for name, value in entries.items():
            assert state2[number][name].dtype == value.dtype, name
            assert torch.equal(value, state2[number][name]), name


def test_loading_casts_dense_states_as_torch_does_and_states_of_tables_not():
    model, narrow = make(), make().bfloat16()
    optimizer, other = MemoryAdamW(model), MemoryAdamW(narrow)
    loss_of(model).backward()
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert other.state[narrow[0].weight]["exp_avg"].dtype == torch.bfloat16
    assert other.state[narrow[2].values.weight]["exp_avg"].dtype == torch.float32


def test_value_rounding_reaches_the_tables():
    weights = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        model = make().bfloat16()
        optimizer = MemoryAdamW(model, value_lr=1e-3, value_rounding=rounding)
        model(torch.randn(9, 6).bfloat16()).square().mean().backward()
        optimizer.step()
        weights[rounding] = model[2].values.weight.detach()
    assert not torch.equal(weights["nearest"], weights["stochastic"])


def test_value_moments_reach_the_tables():
    model = make()
    optimizer = MemoryAdamW(model, value_moments="bfloat16")
    model(torch.randn(9, 6)).square().mean().backward()
    optimizer.step()
    dtypes = {name: value.dtype for name, value in optimizer.state[model[2].values.weight].items()}
    assert dtypes == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "steps": torch.int32}


def test_clipping_and_schedules_of_values_reach_the_tables():
    model = make()
    optimizer = MemoryAdamW(model, value_lr=0.5, value_max_grad_norm=0.25, schedule_values=True)
    assert optimizer.param_groups[-1]["max_grad_norm"] == 0.25
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    before = model[2].values.weight.detach().clone()
    loss_of(model).backward()
    optimizer.step()
    assert (model[2].values.weight - before).abs().max().item() == pytest.approx(0.25, rel=1e-2)


def test_a_parameter_that_two_modules_share_is_in_one_group_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    (group,) = MemoryAdamW(model).param_groups
    assert group["params"] == [model[0].weight]


def test_an_embedding_that_is_tied_to_a_table_is_trained_with_its_rows():
    """Every slot is read or embedded each step, which makes it Adam for both."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(16, 8)
            config = MemoryConfig(dim=8, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms")
            self.memory = MemoryLayer(config)
            self.memory.values.weight = self.embed.weight

        def forward(self):
            return self.memory(self.embed(torch.arange(16))).square().mean()

    tied, dense = Tied().double(), Tied().double()
    optimizer = MemoryAdamW(tied, lr=0.1, value_lr=0.1)
    expected = torch.optim.AdamW(dense.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for model, one in ((tied, optimizer), (dense, expected)):
            model().backward()
            one.step()
            one.zero_grad()
    for parameter, other in zip(tied.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


def test_after_loading_a_state_schedulers_still_reach_the_steps():
    model = make()
    optimizer = MemoryAdamW(model, lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = group["value_lr"] = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    loss_of(model).backward()
    optimizer.step()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_state_that_is_set_empty_begins_anew():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make(query_norm="rms")
        optimizer = MemoryAdamW(model, lr=0.1)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not runs:
            optimizer.state = collections.defaultdict(dict)
        else:
            optimizer = rebuilt(optimizer, model)
        loss_of(model).backward()
        optimizer.step()
        assert len(optimizer.state_dict()["state"]) == len(list(model.parameters())) - 1
        runs.append(model.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


def rebuilt(optimizer, model):
    optimizer.release()
    return MemoryAdamW(model, lr=0.1)


def test_groups_that_are_set_are_those_of_the_steps():
    model = make(query_norm="rms")
    optimizer = MemoryAdamW(model, lr=0.1)
    optimizer.param_groups = [{**group, "lr": 0.0, "value_lr": 0.0} for group in optimizer.param_groups]
    before = copy.deepcopy(model.state_dict())
    loss_of(model).backward()
    optimizer.step()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_zero_grad_clears_dense_and_row_gradients():
    model = make()
    optimizer = MemoryAdamW(model)
    loss_of(model).backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[2].values.row_gradient.is_empty


def test_a_model_without_memories_is_trained_by_adamw_and_may_use_a_grad_scaler():
    model = nn.Linear(6, 3)
    optimizer = MemoryAdamW(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = model.weight.detach().clone()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    assert (model.weight - before).abs().max().item() == pytest.approx(0.1, rel=1e-2)


def test_grad_scaler_is_refused_with_memories_and_nothing_is_changed():
    model = make()
    optimizer = MemoryAdamW(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="not unscaled by GradScaler"):
        scaler.step(optimizer)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_frozen_parameters_and_tables_are_left_out():
    model = make()
    model[0].requires_grad_(False)
    model[2].values.requires_grad_(False)
    optimizer = MemoryAdamW(model)
    assert model[2].values.row_gradient is None
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert owned == {parameter for parameter in model.parameters() if parameter.requires_grad}


def test_only_tables_may_be_trainable():
    model = make().requires_grad_(False)
    model[2].values.weight.requires_grad_(True)
    optimizer = MemoryAdamW(model, value_lr=0.1)
    before = model[2].values.weight.detach().clone()
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(model[2].values.weight, before)


def test_release_gives_dense_gradients_back():
    model = make()
    MemoryAdamW(model).release()
    loss_of(model).backward()
    assert model[2].values.weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0"),
        ({"selector_lr": -1.0}, "selector_lr must be a finite number of at least 0, got -1.0"),
        ({"value_lr": -1.0}, "value_lr must be a finite number of at least 0, got -1.0"),
        ({"value_max_grad_norm": 0.0}, "value_max_grad_norm must be a finite number above 0, got 0.0"),
        ({"value_rounding": "down"}, "value_rounding must be one of 'nearest', 'stochastic', got 'down'"),
        ({"schedule_values": "no"}, "schedule_values must be True or False, got 'no'"),
        ({"value_moments": "half"}, "value_moments must be one of 'float32', 'bfloat16', got 'half'"),
        ({"lr": float("nan")}, "lr must be a finite number of at least 0, got nan"),
        ({"betas": (0.9, 1)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"eps": 0}, "eps must be a finite number above 0, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
    ],
)
def test_bad_settings_are_named_and_no_table_is_taken(settings, named):
    model = make()
    with pytest.raises(ValueError, match=named):
        MemoryAdamW(model, **settings)
    assert model[2].values.row_gradient is None


def test_a_group_added_later_is_refused_rather_than_ignored():
    optimizer = MemoryAdamW(make())
    with pytest.raises(ValueError, match="param_group cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)


def test_schedulers_that_look_into_the_defaults_work():
    optimizer = MemoryAdamW(make(), value_lr=0.25)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[-1]["value_lr"] == 0.25


def test_a_list_of_parameters_or_a_frozen_model_is_an_error():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module .* got list"):
        MemoryAdamW(list(make().parameters()))
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient, got none"):
        MemoryAdamW(make().requires_grad_(False))


def test_a_step_before_training_is_no_fault_and_a_second_one_is():
    """Some loops make one so that a scheduler does not complain."""
    model = make()
    optimizer = MemoryAdamW(model)
    optimizer.step()
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    idle = MemoryAdamW(make())
    idle.step()
    with pytest.raises(RuntimeError, match="no parameter of this optimizer has ever had a gradient"):
        idle.step()


def test_gradients_of_rows_alone_are_gradients():
    model = make()
    model.requires_grad_(False)
    model[2].values.weight.requires_grad_(True)
    optimizer = MemoryAdamW(model)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()


NUMBERS = {
    "float32": np.float32(0.25),
    "float64": np.float64(0.25),
    "of no dimension": np.array(0.25),
    "tensor": torch.tensor(0.25),
    "tensor of float64": torch.tensor(0.25, dtype=torch.float64),
}


@pytest.mark.promise("Trainers", "a learning rate or another setting as `np.float32` or a tensor", "supported", "")
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_numpy_and_of_torch_are_numbers(number, tmp_path):
    results = []
    for value in (number, 0.25):
        torch.manual_seed(0)
        model = make()
        settings = {name: value for name in ("lr", "value_lr", "eps", "weight_decay", "value_max_grad_norm")}
        optimizer = MemoryAdamW(model, betas=(value, value), **settings)
        loss_of(model).backward()
        optimizer.step()
        results.append(model.state_dict())
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)


@pytest.mark.parametrize("kind", [RowAdam, RowAdagrad, RowSGD])
def test_row_optimizers_take_them_too(kind):
    for number in NUMBERS.values():
        (group,) = kind(ValueTable(3, 2), lr=number, max_grad_norm=number).param_groups
        assert [type(group[name]) for name in ("lr", "value_lr", "max_grad_norm")] == [float] * 3
        assert group["value_lr"] == 0.25


@pytest.mark.parametrize(
    "number", [np.float32("nan"), np.float32(-1), np.bool_(True), torch.tensor(-1.0), torch.ones(2)]
)
def test_what_is_no_rate_is_none_in_numpy_or_torch_either(number):
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0, got"):
        MemoryAdamW(make(), lr=number)


def test_a_rate_in_a_tensor_may_be_changed_in_place():
    torch.manual_seed(0)
    rate = torch.tensor(0.0)
    model = make()
    optimizer = MemoryAdamW(model, lr=rate)
    before = model[0].weight.detach().clone()
    for moved in (False, True):
        loss_of(model).backward()
        optimizer.step()
        assert bool((model[0].weight != before).any()) is moved
        rate.fill_(0.1)


def test_only_a_grad_scaler_is_told_that_steps_unscale():
    """Lightning asks the same, and would not clip."""
    assert not getattr(MemoryAdamW(make()), "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("betas", [(0, 0.9), (0, 0), [0, 0.9]])
def test_rates_of_moments_may_be_integers(betas):
    layer = MemoryLayer(MemoryConfig(dim=8, heads=1, topk=2, num_subkeys=4, query_dim=4))
    optimizer = MemoryAdamW(layer, betas=betas)
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert {group["betas"] for group in optimizer.param_groups} == {(0.0, float(betas[1]))}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", [nn.utils.weight_norm, partial(l1_unstructured, name="weight", amount=0.5)])
def test_a_computed_weight_is_no_frozen_one_after_an_evaluation(compute):
    model = make()
    compute(model[2].values)
    with torch.no_grad():
        loss_of(model)  # after which hooks have left a weight that requires no gradient
    with pytest.raises(ValueError, match="computed of other parameters"):
        MemoryAdamW(model)
    model[2].values.requires_grad_(False)
    optimizer = MemoryAdamW(model)
    loss_of(model).backward()
    optimizer.step()
