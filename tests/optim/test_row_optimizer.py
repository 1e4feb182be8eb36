"""What all row optimizers have in common; each rule has a file of its own."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as prune_by

from memlayers import RowAdagrad, RowAdam, RowSGD, ValueTable
from memlayers.ops import cpu
from memlayers.ops.row_sum import SummedRows

OPTIMIZERS = {
    "adam": partial(RowAdam, lr=0.1),
    "adagrad": partial(RowAdagrad, lr=0.1),
    "row adagrad": partial(RowAdagrad, lr=0.1, per_row=True),
    "sgd": partial(RowSGD, lr=0.01),
}
TORCH = {
    "adam": (torch.optim.Adam, {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.03, "eps": 1e-6}),
    "sgd": (torch.optim.SGD, {"lr": 0.003}),
}
each = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
STATES = {"adam": {"exp_avg", "exp_avg_sq", "steps"}, "adagrad": {"square_sum"}, "row adagrad": {"square_sum"}}


def reads(num_slots, tokens=4, topk=3, dtype=torch.float32):
    return torch.randint(num_slots, (tokens, topk)), torch.randn(tokens, topk, dtype=dtype)


def loss_of(table, slots, weights):
    y = table.read(slots, weights.clone().requires_grad_())
    return (y - torch.arange(y.numel(), dtype=y.dtype).view_as(y)).square().sum()


def loss_and_step(table, optimizer, slots, weights):
    loss_of(table, slots, weights).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(table, optimizer, steps=3, tokens=4):
    for _ in range(steps):
        loss_and_step(table, optimizer, *reads(len(table.weight), tokens))


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_it_is_torch_s_optimizer_when_every_row_is_read_each_step(name, dtype, tolerance):
    """The rows agree; in float32 sums in another order and Adam's division leave a few units in the fifth digit."""
    table = ValueTable(7, 5, dtype=dtype)
    dense = copy.deepcopy(table)
    torch_s, settings = TORCH[name]
    optimizer, expected = OPTIMIZERS[name].func([table], **settings), torch_s(dense.parameters(), **settings)
    for _ in range(20):
        slots = torch.stack([torch.randperm(7), torch.randint(7, (7,))], 1)
        weights = torch.randn(7, 2, dtype=dtype)
        loss_and_step(table, optimizer, slots, weights)
        loss_and_step(dense, expected, slots, weights)
        torch.testing.assert_close(table.weight, dense.weight, rtol=tolerance, atol=tolerance)
    state, dense_state = optimizer.state[table.weight], expected.state[dense.weight]
    for ours, theirs in (("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"), ("square_sum", "sum")):
        if ours in state:
            torch.testing.assert_close(state[ours], dense_state[theirs], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.promise(
    "Gradients by hand",
    '`maximize` set in the groups of an optimizer: `group["maximize"] = True`',
    "supported",
    "tables go uphill, too, from the next step on",
)
@pytest.mark.parametrize("name", TORCH)
def test_it_goes_uphill_from_the_step_at_which_maximize_is_set_in_its_group(name):
    table = ValueTable(7, 5, dtype=torch.float64)
    dense = copy.deepcopy(table)
    torch_s, settings = TORCH[name]
    optimizer, expected = OPTIMIZERS[name].func([table], **settings), torch_s(dense.parameters(), **settings)
    for step in range(4):
        for group in (*optimizer.param_groups, *expected.param_groups):
            group["maximize"] = step in (1, 2)
        slots, weights = torch.randperm(7)[:, None], torch.randn(7, 1, dtype=torch.float64)
        loss_and_step(table, optimizer, slots, weights)
        loss_and_step(dense, expected, slots, weights)
        torch.testing.assert_close(table.weight, dense.weight, rtol=1e-12, atol=1e-12)


def torch_row_by_row(weight, gradients, make):
    """torch's optimizer on each row by itself, over the steps at which it was read."""
    rows = []
    for slot in range(len(weight)):
        row = nn.Parameter(weight[slot].clone())
        optimizer = make([row])
        for read_slots, gradient in gradients:
            if slot in read_slots:
                row.grad = gradient[slot].clone()
                optimizer.step()
        rows.append(row.detach())
    return torch.stack(rows)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("num_slots", [9, 200], ids=["more reads than rows", "more rows than reads"])
@pytest.mark.parametrize("chunk", [5, 2**20])
@pytest.mark.parametrize("static", [False, True], ids=["compact", "static shapes"])
def test_each_row_follows_torch_s_optimizer_by_itself(name, num_slots, static, chunk, monkeypatch):
    monkeypatch.setattr("memlayers.ops.row_sum._CHUNK_ELEMENTS", chunk)
    if static:  # what runs on devices other than the CPU
        monkeypatch.setattr(SummedRows, "compact", lambda rows: rows)
    torch_s, settings = TORCH[name]
    table = ValueTable(num_slots, 5, dtype=torch.float64)
    start = table.weight.detach().clone()
    optimizer = OPTIMIZERS[name].func([table], **settings)
    gradients, ever = [], set()
    for _ in range(6):
        slots, weights = reads(num_slots, dtype=torch.float64)
        twin = copy.deepcopy(table)
        loss_of(twin, slots, weights).backward()
        gradients.append((set(slots.flatten().tolist()), twin.weight.grad))
        ever |= gradients[-1][0]
        loss_and_step(table, optimizer, slots, weights)
    expected = torch_row_by_row(start, gradients, partial(torch_s, **settings))
    torch.testing.assert_close(table.weight, expected, rtol=1e-10, atol=1e-10)
    unread = [slot for slot in range(num_slots) if slot not in ever]
    assert unread or num_slots == 9
    assert torch.equal(table.weight[unread], start[unread])
    state = optimizer.state[table.weight]
    assert not any(value[unread].any() for value in state.values())
    if "steps" in state:
        assert state["steps"].tolist() == [sum(slot in read for read, _ in gradients) for slot in range(num_slots)]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_not_read_in_a_step_keep_row_and_state_bit_identical(make, dtype):
    table = ValueTable(30, 4, dtype=dtype)
    optimizer = make([table])
    train(table, optimizer)
    before = {name: value.clone() for name, value in optimizer.state[table.weight].items()}
    weight = table.weight.detach().clone()
    loss_of(table, torch.tensor([[2, 3]]), torch.ones(1, 2)).backward()
    optimizer.step()
    untouched = [slot for slot in range(30) if slot not in (2, 3)]
    assert torch.equal(table.weight[untouched], weight[untouched])
    assert not torch.equal(table.weight[2], weight[2])
    for name, value in optimizer.state[table.weight].items():
        assert torch.equal(value[untouched], before[name][untouched]), name
        assert not torch.equal(value[2], before[name][2]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_made_at_the_first_step_in_float32_at_least(name):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        table = ValueTable(30, 4, dtype=dtype)
        optimizer = OPTIMIZERS[name]([table])
        assert not optimizer.state
        optimizer.step()
        assert not optimizer.state
        train(table, optimizer, steps=1)
        state = optimizer.state[table.weight]
        assert set(state) == STATES.get(name, set())
        for key, value in state.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert value.dtype == (torch.int32 if key == "steps" else wide)
            assert value.shape == ((30,) if key == "steps" or name == "row adagrad" else (30, 4))


@each
def test_accumulated_micro_batches_step_as_one_batch(make):
    table = ValueTable(30, 4, dtype=torch.float64)
    twin = copy.deepcopy(table)
    slots, weights = reads(30, tokens=6, dtype=torch.float64)
    whole, parts = make([table]), make([twin])
    table.read(slots, weights.requires_grad_()).square().sum().backward()
    for i in range(0, 6, 2):
        twin.read(slots[i : i + 2], weights[i : i + 2]).square().sum().backward()
    whole.step()
    parts.step()
    torch.testing.assert_close(twin.weight, table.weight, rtol=1e-12, atol=1e-12)


@each
def test_layers_that_share_a_table_train_it_as_one(make):
    table = ValueTable(30, 4, dtype=torch.float64)
    twin = copy.deepcopy(table)
    slots, weights = reads(30, tokens=6, dtype=torch.float64)
    model = nn.ModuleList([nn.ModuleDict({"table": twin}), nn.ModuleDict({"table": twin})])
    one, shared = make([table]), make(model)
    assert len(shared.param_groups[0]["params"]) == 1
    table.read(slots, weights.requires_grad_()).square().sum().backward()
    (twin.read(slots[:4], weights[:4]).square().sum() + twin.read(slots[4:], weights[4:]).square().sum()).backward()
    one.step()
    shared.step()
    torch.testing.assert_close(twin.weight, table.weight, rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_is_by_the_norm_of_the_table_s_own_gradient(make, limit, dtype):
    tables = [ValueTable(30, 4, dtype=dtype), ValueTable(9, 4, dtype=dtype)]
    twins = copy.deepcopy(tables)
    batches = [reads(len(table.weight), dtype=dtype) for table in tables]
    # eps of the gradient's size, or a first step would hide any scale.
    settings = {} if make.func is RowSGD else {"eps": 1.0}
    clipped, plain = make(tables, max_grad_norm=limit, **settings), make(twins, **settings)
    for table, twin, batch in zip(tables, twins, batches, strict=True):
        loss_of(table, *batch).backward()
        loss_of(twin, *batch).backward()
        norm = twin.row_gradient.norm()
        assert (norm > limit) == (limit < 1)
        twin.row_gradient.scale(min(1.0, limit / norm.item()))
    clipped.step()
    plain.step()
    for table, twin in zip(tables, twins, strict=True):
        torch.testing.assert_close(table.weight, twin.weight, rtol=1e-6, atol=1e-6)


def test_a_tiny_gradient_is_clipped_as_by_clip_grad_norm():
    table = ValueTable(5, 1)
    plain = nn.Parameter(table.weight.detach().clone())
    optimizer = RowSGD([table], lr=1e6, max_grad_norm=5e-7)
    table(torch.tensor([[2]]), torch.tensor([[1e-6]])).sum().backward()
    optimizer.step()
    plain.grad = torch.zeros_like(plain)
    plain.grad[2] = 1e-6
    nn.utils.clip_grad_norm_([plain], 5e-7)
    torch.testing.assert_close(table.weight, plain.detach() - 1e6 * plain.grad, rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.float64, "nearest"),
        (torch.float16, "nearest"),
    ],
    ids=str,
)
def test_a_round_trip_of_the_state_in_mid_run_changes_nothing(make, dtype, rounding, tmp_path):
    def run(restart):
        torch.manual_seed(0)
        tables = nn.ModuleList([ValueTable(30, 4, dtype=dtype), ValueTable(20, 3, dtype=dtype)])
        optimizer = make(tables, rounding=rounding)
        for step in range(6):
            for table in tables:
                loss_of(table, *reads(len(table.weight))).backward()
            optimizer.step()
            optimizer.zero_grad()
            if restart and step == 2:
                torch.save([tables.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
                weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
                with torch.random.fork_rng():
                    tables = nn.ModuleList([ValueTable(30, 4, dtype=dtype), ValueTable(20, 3, dtype=dtype)])
                tables.load_state_dict(weights)
                optimizer = make(tables, lr=0.5)
                optimizer.load_state_dict(state)
        return [(table.weight, dict(optimizer.state[table.weight])) for table in tables]

    for (weight, state), (weight2, state2) in zip(run(False), run(True), strict=True):
        assert torch.equal(weight, weight2)
        assert state.keys() == state2.keys()
        for name, value in state.items():
            assert state2[name].dtype == value.dtype, name
            assert torch.equal(state2[name], value), name


@each
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_two_runs_are_bit_equal_whatever_the_number_of_threads(make, rounding):
    dtype = torch.bfloat16 if rounding == "stochastic" else torch.float32
    before, weights = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            table = ValueTable(700, 19, dtype=dtype)
            train(table, make([table], rounding=rounding, max_grad_norm=1.0), tokens=600)
            weights.append(table.weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


@each
def test_stochastic_rounding_differs_between_steps_and_between_tables(make):
    tables = [ValueTable(40, 16, dtype=torch.bfloat16) for _ in range(2)]
    start = tables[0].weight.detach().clone()
    optimizer = make(tables, rounding="stochastic")
    results = []
    for _ in range(2):
        optimizer.state.clear()
        for table in tables:
            with torch.no_grad():
                table.weight.copy_(start)
            table.row_gradient.add(torch.arange(40)[:, None], torch.ones(40, 1), torch.full((40, 16), 1 / 3))
        optimizer.step()
        optimizer.zero_grad()
        results += [table.weight.detach().clone() for table in tables]
    for i in range(4):
        assert not torch.equal(results[i], start)
        assert all(not torch.equal(results[i], results[j]) for j in range(i))


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_updates_that_rounding_to_the_nearest_loses_arrive_on_average(path, monkeypatch):
    if path == "reference":
        monkeypatch.setattr(cpu, "kernels", lambda operation: None)
    moved = {}
    for rounding in ("nearest", "stochastic"):
        table = ValueTable(50, 40, dtype=torch.bfloat16)
        nn.init.constant_(table.weight, 1.0)  # between 0.5 and 1, neighbours are 2^-8 apart
        optimizer = RowSGD([table], lr=2**-12, rounding=rounding)
        for _ in range(64):
            table.row_gradient.add(torch.arange(50)[:, None], torch.ones(50, 1), torch.ones(50, 40))
            optimizer.step()
        moved[rounding] = (1 - table.weight.float()).mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(64 * 2**-12, rel=0.05)


@each
@pytest.mark.parametrize("field", ["rounding", "updates"])
def test_a_state_of_version_0_1_0_is_refused_and_nothing_is_loaded(make, field):
    """It had no other rounding and counted no updates."""
    table, twin = ValueTable(30, 4), ValueTable(30, 4)
    optimizer, other = make([table]), make([twin], lr=0.25)
    train(table, optimizer)
    state = optimizer.state_dict()
    del state["param_groups"][0][field]
    with pytest.raises(ValueError, match=f"must say '{field}' .* memlayers 0.1.0 saved it.* Load the weights alone"):
        other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.25
    assert not other.state
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("saved", "got"),
    [
        (lambda: RowAdam([ValueTable(30, 4)]), "RowAdam"),
        (lambda: RowAdagrad([ValueTable(30, 4)]), "RowAdagrad"),
        (lambda: RowSGD([ValueTable(30, 4)]), "RowSGD"),
        (lambda: torch.optim.Adam([torch.zeros(30, 4)]), "dense parameters"),
    ],
    ids=["adam", "adagrad", "sgd", "torch's"],
)
@pytest.mark.parametrize("name", ["adam", "adagrad", "sgd"])
def test_a_state_of_another_rule_is_refused_by_name_and_nothing_is_loaded(saved, got, name):
    optimizer, own = OPTIMIZERS[name]([ValueTable(30, 4)]), OPTIMIZERS[name].func.__name__
    if got == own:
        optimizer.load_state_dict(saved().state_dict())
        assert optimizer.param_groups[0]["lr"] == saved().param_groups[0]["lr"] != OPTIMIZERS[name].keywords["lr"]
        return
    with pytest.raises(ValueError, match=f"must be of {own}, got that of {got} for the same group.* weights alone"):
        optimizer.load_state_dict(saved().state_dict())
    assert optimizer.param_groups[0]["lr"] == OPTIMIZERS[name].keywords["lr"]


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_a_table_of_another_size_is_refused_when_it_is_loaded(name):
    table = ValueTable(60, 4)
    optimizer, other = OPTIMIZERS[name]([table]), OPTIMIZERS[name]([ValueTable(30, 4)], lr=0.25)
    train(table, optimizer)
    with pytest.raises(ValueError, match=r"states of a table of \[30, 4\], got '.*' of \[60.*build the model as the"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.25
    assert not other.state


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("counts", [(1, 2), (2, 1)], ids=str)
def test_a_state_of_another_number_of_tables_is_refused_when_it_is_loaded(name, counts):
    ours, saved = (OPTIMIZERS[name]([ValueTable(30, 4) for _ in range(count)]) for count in counts)
    with pytest.raises(ValueError, match=r"must be of {} value tables.*got that of {}: build the".format(*counts)):
        ours.load_state_dict(saved.state_dict())


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def halve(table):
    nn.utils.parametrize.register_parametrization(table, "weight", Halved())


def prune(table):
    prune_by.l1_unstructured(table, "weight", 0.5)


@each
@pytest.mark.promise(
    "Gradients by hand",
    "a row optimizer for a table under `torch.nn.utils.parametrize` or `prune`",
    "refused",
    "make the weight plain again, or train the table by an optimizer of torch",
)
@pytest.mark.parametrize("compute", [halve, prune])
def test_a_table_whose_weight_is_computed_is_refused_with_the_remedy(make, compute):
    table, taken = ValueTable(30, 4), ValueTable(30, 4)
    compute(table)
    with pytest.raises(ValueError, match=r"computed of other parameters.*remove_parametrizations, prune\.remove"):
        make([taken, table])
    assert taken.row_gradient is None
    optimizer = make([taken])
    compute(taken)
    loss_of(taken, *reads(30)).backward()
    with pytest.raises(RuntimeError, match="computed of other parameters.* release"):
        optimizer.step()


def test_loading_a_state_does_not_share_it():
    table, twin = ValueTable(30, 4), ValueTable(30, 4)
    optimizers = RowAdam([table]), RowAdam([twin])
    train(table, optimizers[0])
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state[twin.weight]["steps"] is not optimizers[0].state[table.weight]["steps"]


@each
def test_a_scheduler_does_not_move_the_values_rate_unless_asked(make):
    moved = {}
    for rate in ("0.1", "0.1, scheduled", "0.05"):
        torch.manual_seed(0)
        table = ValueTable(30, 4)
        before = table.weight.detach().clone()
        optimizer = make([table], lr=0.05 if rate == "0.05" else 0.1, schedule_values="scheduled" in rate)
        if rate != "0.05":
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        loss_of(table, *reads(30)).backward()
        optimizer.step()
        moved[rate] = table.weight - before
    torch.testing.assert_close(moved["0.1, scheduled"], moved["0.05"])
    torch.testing.assert_close(moved["0.1"], 2 * moved["0.05"])


@pytest.mark.promise(
    "Trainers",
    "float16 loss scaling with a table in row mode",
    "refused",
    "bfloat16, or dense gradients by another optimizer",
)
@each
def test_grad_scaler_is_refused_and_nothing_is_changed(make):
    table = ValueTable(30, 4)
    optimizer = make([table])
    scaler = torch.amp.GradScaler("cpu")
    before = table.weight.detach().clone()
    scaler.scale(loss_of(table, *reads(30))).backward()
    with pytest.raises(RuntimeError, match="not unscaled by GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(table.weight, before)
    optimizer.step()
    assert not torch.equal(table.weight, before), "after a refusal plain steps work"


def test_a_disabled_grad_scaler_is_welcome():
    table = ValueTable(30, 4)
    optimizer = RowAdam([table])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(table, *reads(30))).backward()
    scaler.step(optimizer)
    assert int(optimizer.state[table.weight]["steps"].sum()) > 0


@each
def test_a_closure_is_called_with_gradients(make):
    table = ValueTable(30, 4)
    optimizer = make([table])
    slots, weights = reads(30)
    before = table.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(table, slots, weights)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    moved = (table.weight != before).any(1).nonzero().flatten()
    assert torch.equal(moved, slots.unique())


@each
def test_a_step_consumes_and_zero_grad_discards(make):
    table = ValueTable(30, 4)
    optimizer = make([table])
    loss_of(table, *reads(30)).backward()
    optimizer.step()
    once = table.weight.detach().clone()
    optimizer.step()
    assert torch.equal(table.weight, once)
    optimizer.zero_grad()
    loss_of(table, *reads(30)).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(table.weight, once)


@each
def test_release_gives_dense_gradients_back(make):
    table = ValueTable(30, 4)
    optimizer = make([table])
    assert table.row_gradient.owner() is optimizer
    optimizer.release()
    loss_of(table, *reads(30)).backward()
    assert table.weight.grad is not None


@each
def test_release_leaves_a_table_alone_that_has_another_owner_by_now(make):
    table = ValueTable(30, 4)
    first = make([table])
    table.release()
    second = make([table])
    first.release()
    assert table.row_gradient.owner() is second


@each
def test_zero_grad_clears_a_dense_gradient_from_before(make):
    table = ValueTable(30, 4)
    table.weight.grad = torch.ones(30, 4)
    make([table]).zero_grad()
    assert table.weight.grad is None


@each
def test_it_cannot_be_copied_nor_given_more_groups(make):
    optimizer = make([ValueTable(3, 2)])
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="param_group cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


@each
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("inf")}, "lr must be a finite number .* got inf"),
        ({"lr": "fast"}, "lr must be a finite number .* got 'fast'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a finite number above 0, got 0.0"),
        ({"rounding": "up"}, "rounding must be one of 'nearest', 'stochastic', got 'up'"),
        ({"schedule_values": "no"}, "schedule_values must be True or False, got 'no'"),
    ],
)
def test_bad_settings_are_named_and_no_table_is_taken(make, settings, named):
    tables = [ValueTable(3, 2, dtype=torch.bfloat16), ValueTable(3, 2)]
    with pytest.raises(ValueError, match=named):
        make(tables, **settings)
    assert all(table.row_gradient is None for table in tables)


@each
def test_two_tables_with_one_weight_are_refused_with_the_remedy(make):
    first, second = ValueTable(3, 2), ValueTable(3, 2)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"update twice: share the table itself \(values=first.values"):
        make([first, second])
    assert first.row_gradient is second.row_gradient is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (RowAdam, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "moments": "float32"}),
        (RowAdagrad, {"lr": 1e-2, "eps": 1e-10, "per_row": False}),
        (RowSGD, {"lr": 1e-3}),
    ],
)
def test_the_defaults(kind, settings):
    (group,) = kind([ValueTable(3, 2)]).param_groups
    shared = {"max_grad_norm": None, "schedule_values": False, "rounding": "stochastic", "updates": 0}
    assert {name: value for name, value in group.items() if name != "params"} == {
        **settings,
        **shared,
        "value_lr": settings["lr"],
    }


@each
def test_no_table_is_an_error(make):
    with pytest.raises(ValueError, match="at least one ValueTable, got none"):
        make(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ValueTable modules, got Parameter"):
        make(ValueTable(3, 2).parameters())
