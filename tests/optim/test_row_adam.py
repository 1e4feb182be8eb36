import copy

import pytest
import torch
from torch import nn

from memlayers import RowAdam, ValueTable
from memlayers.ops.record import Part, SummedRows, sum_parts
from memlayers.ops.row_update import row_adam_

SETTINGS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}


def reads(num_slots, tokens=4, topk=3, dtype=torch.float64):
    return torch.randint(num_slots, (tokens, topk)), torch.randn(tokens, topk, dtype=dtype)


def loss_of(table, slots, weights):
    y = table.read(slots, weights.clone().requires_grad_())
    return (y - torch.arange(y.numel(), dtype=y.dtype).view_as(y)).square().sum()


def per_row_reference(weight, gradients, *, lr, betas, eps):
    """Adam on each row by itself, over the steps at which it was read."""
    rows = []
    for slot in range(len(weight)):
        row = nn.Parameter(weight[slot].clone())
        adam = torch.optim.Adam([row], lr=lr, betas=betas, eps=eps)
        for read_slots, gradient in gradients:
            if slot in read_slots:
                row.grad = gradient[slot].clone()
                adam.step()
        rows.append(row.detach())
    return torch.stack(rows)


def test_it_is_torch_s_adam_when_every_row_is_read_each_step():
    table = ValueTable(7, 5, dtype=torch.float64)
    dense = copy.deepcopy(table)
    optimizer, adam = RowAdam([table], **SETTINGS), torch.optim.Adam(dense.parameters(), **SETTINGS)
    for _ in range(20):
        slots = torch.stack([torch.randperm(7), torch.randint(7, (7,))], 1)
        weights = torch.randn(7, 2, dtype=torch.float64)
        for model, step in ((table, optimizer), (dense, adam)):
            loss_of(model, slots, weights).backward()
            step.step()
            step.zero_grad()
        torch.testing.assert_close(table.weight, dense.weight, rtol=1e-12, atol=1e-12)
    state, expected = optimizer.state[table.weight], adam.state[dense.weight]
    torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_slots", [9, 200], ids=["more reads than rows", "more rows than reads"])
@pytest.mark.parametrize("chunk", [5, 2**20])
@pytest.mark.parametrize("static", [False, True], ids=["compact", "static shapes"])
def test_touched_rows_follow_a_per_row_reference_and_others_stay_bit_identical(num_slots, static, chunk, monkeypatch):
    monkeypatch.setattr("memlayers.ops.record._CHUNK_ELEMENTS", chunk)
    if static:  # what runs on devices other than the CPU
        monkeypatch.setattr(SummedRows, "compact", lambda rows: rows)
    table = ValueTable(num_slots, 5, dtype=torch.float64)
    start = table.weight.detach().clone()
    optimizer = RowAdam([table], **SETTINGS)
    gradients, ever = [], set()
    for _ in range(6):
        slots, weights = reads(num_slots)
        twin = copy.deepcopy(table)
        loss_of(twin, slots, weights).backward()
        gradients.append((set(slots.flatten().tolist()), twin.weight.grad))
        ever |= gradients[-1][0]
        loss_of(table, slots, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(table.weight, per_row_reference(start, gradients, **SETTINGS), rtol=1e-10, atol=1e-10)
    unread = [slot for slot in range(num_slots) if slot not in ever]
    assert unread or num_slots == 9
    state = optimizer.state[table.weight]
    assert torch.equal(table.weight[unread], start[unread])
    assert not state["exp_avg"][unread].any()
    assert not state["exp_avg_sq"][unread].any()
    assert [int(count) for count in state["steps"]] == [
        sum(s in read for read, _ in gradients) for s in range(num_slots)
    ]


def test_rows_not_read_in_a_step_keep_row_and_state_bit_identical():
    table = ValueTable(30, 4)
    optimizer = RowAdam([table], lr=0.1)
    for _ in range(3):
        loss_of(table, *reads(30, dtype=torch.float32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: value.clone() for name, value in optimizer.state[table.weight].items()}
    weight = table.weight.detach().clone()
    loss_of(table, torch.tensor([[2, 3]]), torch.ones(1, 2)).backward()
    optimizer.step()
    untouched = [slot for slot in range(30) if slot not in (2, 3)]
    assert torch.equal(table.weight[untouched], weight[untouched])
    assert not torch.equal(table.weight[2], weight[2])
    for name, value in optimizer.state[table.weight].items():
        assert torch.equal(value[untouched], before[name][untouched]), name


def test_accumulated_micro_batches_step_as_one_batch():
    table = ValueTable(30, 4, dtype=torch.float64)
    twin = copy.deepcopy(table)
    slots, weights = reads(30, tokens=6)
    whole, parts = RowAdam([table]), RowAdam([twin])
    table.read(slots, weights.requires_grad_()).square().sum().backward()
    for i in range(0, 6, 2):
        twin.read(slots[i : i + 2], weights[i : i + 2]).square().sum().backward()
    whole.step()
    parts.step()
    torch.testing.assert_close(twin.weight, table.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_is_by_the_norm_of_the_table_s_own_gradient(limit):
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


def test_bf16_tables_keep_float32_moments():
    table = ValueTable(30, 4, dtype=torch.bfloat16)
    wide = ValueTable(30, 4)
    wide.load_state_dict(table.state_dict())
    optimizers = RowAdam([table], lr=0.1), RowAdam([wide], lr=0.1)
    slots, weights = reads(30, dtype=torch.float32)
    for model, optimizer in zip((table, wide), optimizers, strict=True):
        loss_of(model, slots, weights).backward()
        optimizer.step()
    state = optimizers[0].state[table.weight]
    assert table.weight.dtype == torch.bfloat16
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg"], optimizers[1].state[wide.weight]["exp_avg"])
    # Computed in float32 and rounded once.
    assert torch.equal(table.weight, wide.weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_round_trip_of_the_state_in_mid_run_changes_nothing(dtype, tmp_path):
    def run(restart):
        torch.manual_seed(0)
        table = ValueTable(30, 4, dtype=dtype)
        optimizer = RowAdam([table], lr=0.1)
        for step in range(6):
            loss_of(table, *reads(30, dtype=torch.float32)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if restart and step == 2:
                torch.save([table.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
                weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
                with torch.random.fork_rng():
                    table = ValueTable(30, 4, dtype=dtype)
                table.load_state_dict(weights)
                optimizer = RowAdam([table], lr=0.5)
                optimizer.load_state_dict(state)
        return table.weight, dict(optimizer.state[table.weight])

    (weight, state), (weight2, state2) = run(False), run(True)
    assert torch.equal(weight, weight2)
    for name, value in state.items():
        assert state2[name].dtype == value.dtype, name
        assert torch.equal(state2[name], value), name


def test_loading_a_state_does_not_share_it():
    table, twin = ValueTable(30, 4), ValueTable(30, 4)
    optimizers = RowAdam([table]), RowAdam([twin])
    loss_of(table, *reads(30, dtype=torch.float32)).backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state[twin.weight]["steps"] is not optimizers[0].state[table.weight]["steps"]


def test_a_scheduler_does_not_move_the_values_rate_unless_asked():
    rates = {}
    for schedule_values in (False, True):
        torch.manual_seed(0)
        table = ValueTable(30, 4)
        before = table.weight.detach().clone()
        optimizer = RowAdam([table], lr=0.25, schedule_values=schedule_values)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        loss_of(table, *reads(30, dtype=torch.float32)).backward()
        optimizer.step()
        scheduler.step()
        # Adam's first step moves every entry by the learning rate.
        rates[schedule_values] = (table.weight - before).abs().max().item()
    assert rates[False] == pytest.approx(0.25, rel=1e-3)
    assert rates[True] == pytest.approx(0.125, rel=1e-3)


def test_the_first_step_of_a_row_read_late_is_as_large_as_one_read_early():
    table = ValueTable(3, 1)
    optimizer = RowAdam([table], lr=0.1)
    for slot in [0] * 30 + [1]:
        before = table.weight.detach().clone()
        loss_of(table, torch.tensor([[slot]]), torch.ones(1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (table.weight - before)[1].abs().item() == pytest.approx(0.1, rel=1e-3)


def test_grad_scaler_is_refused_and_nothing_is_changed():
    table = ValueTable(30, 4)
    optimizer = RowAdam([table])
    scaler = torch.amp.GradScaler("cpu")
    before = table.weight.detach().clone()
    scaler.scale(loss_of(table, *reads(30, dtype=torch.float32))).backward()
    with pytest.raises(RuntimeError, match="not unscaled by GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(table.weight, before)


def test_after_a_refusal_plain_steps_work():
    table = ValueTable(30, 4)
    optimizer = RowAdam([table])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(table, *reads(30, dtype=torch.float32))).backward()
    with pytest.raises(RuntimeError, match="not unscaled by GradScaler"):
        scaler.step(optimizer)
    optimizer.step()
    assert int(optimizer.state[table.weight]["steps"].sum()) > 0


def test_a_disabled_grad_scaler_is_welcome():
    table = ValueTable(30, 4)
    optimizer = RowAdam([table])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(table, *reads(30, dtype=torch.float32))).backward()
    scaler.step(optimizer)
    assert int(optimizer.state[table.weight]["steps"].sum()) > 0


def test_a_closure_is_called_with_gradients():
    table = ValueTable(30, 4)
    optimizer = RowAdam([table])
    slots, weights = reads(30, dtype=torch.float32)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(table, slots, weights)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert int(optimizer.state[table.weight]["steps"].sum()) == len(slots.unique())


@pytest.mark.parametrize("num_slots", [5, 100])
def test_no_shape_depends_on_data_off_the_cpu(num_slots):
    """A step on tensors without data: a shape that depended on data, or a wait for it, would raise."""
    slots, weights = torch.zeros(4, 3, dtype=torch.int64, device="meta"), torch.zeros(4, 3, device="meta")
    rows = sum_parts([Part(slots, weights, torch.zeros(4, 2, device="meta"))], num_slots)
    table, exp_avg, exp_avg_sq = torch.zeros(3, num_slots, 2, device="meta")
    steps = torch.zeros(num_slots, dtype=torch.int32, device="meta")
    row_adam_(table, exp_avg, exp_avg_sq, steps, rows, lr=0.1, betas=(0.9, 0.9), eps=1e-8, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="meta"):
        rows.compact()


def test_it_cannot_be_copied():
    optimizer = RowAdam([ValueTable(3, 2)])
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas .* \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
        ({"lr": float("inf")}, "lr must be a finite number .* got inf"),
        ({"lr": "fast"}, "lr must be a finite number .* got 'fast'"),
        ({"betas": 0.9}, r"betas .* got 0.9"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0 or None, got 0.0"),
    ],
)
def test_bad_settings_are_named_and_no_table_is_taken(settings, named):
    table = ValueTable(3, 2)
    with pytest.raises(ValueError, match=named):
        RowAdam([table], **settings)
    assert table.row_gradient is None


def test_no_table_is_an_error():
    with pytest.raises(ValueError, match="at least one ValueTable, got none"):
        RowAdam(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ValueTable modules, got Parameter"):
        RowAdam(ValueTable(3, 2).parameters())
