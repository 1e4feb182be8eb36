"""What loops do to gradients by hand, in row mode: each is compared with the same loop on a dense gradient."""

import copy
import logging
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlayers import MemoryConfig, MemoryLayer, ValueTable
from memlayers.ops import row_gradient_tensor
from memlayers.optim import MemoryAdamW, RowAdam, RowSGD


def net():
    torch.manual_seed(0)
    config = MemoryConfig(dim=8, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms")
    return nn.Sequential(nn.Linear(6, 8), MemoryLayer(config), nn.Linear(8, 3)).double()


def loss_of(model, seed=1):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)).double()
    return model(x).square().mean()


def scaled_by_a_number(model, optimizer):
    loss_of(model).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(40.0)


def two_forward_passes_before_backward(model, optimizer):
    first, second, third = (loss_of(model, seed) for seed in (1, 2, 3))
    first.backward()
    (second + third).backward()


def scaled_into_new_ones(model, optimizer):
    loss_of(model).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = -2 * (parameter.grad / 3.0)


def scaled_by_a_tensor(model, optimizer):
    loss_of(model).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data *= torch.tensor(0.25).double()


def scaled_through_data(model, optimizer):
    loss_of(model).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data = parameter.grad.data * 0.5
            parameter.grad.neg_()


def scaled_as_a_list(model, optimizer):
    loss_of(model).backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_mul_(grads, 0.5)
    torch._foreach_div_(grads, torch.tensor(3.0).double())


def two_losses_added(model, optimizer):
    loss_of(model, 1).backward()
    first = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(model, 2).backward()
    for parameter, grad in zip(model.parameters(), first, strict=True):
        if grad is not None:
            parameter.grad.add_(grad, alpha=0.5)


def a_sum_in_a_buffer(model, optimizer):
    sums = None
    for seed in (1, 2, 3):
        model.zero_grad()
        loss_of(model, seed).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        sums = sums or {name: torch.zeros_like(grad) for name, grad in grads.items()}
        for name, grad in grads.items():
            sums[name] += grad
    for name, parameter in model.named_parameters():
        if name in sums:
            parameter.grad = sums[name] / 3


def put_aside_and_back(model, optimizer):
    loss_of(model, 1).backward()
    kept = [copy.deepcopy(parameter.grad) for parameter in model.parameters()]
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    for parameter, grad in zip(model.parameters(), kept, strict=True):
        parameter.grad = grad


def difference_of_two(model, optimizer):
    loss_of(model, 1).backward()
    first = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss_of(model, 2).backward()
    for name, parameter in model.named_parameters():
        if name in first:
            parameter.grad = first[name] - parameter.grad


def given_by_autograd_grad(model, optimizer):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model), parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def sums_from_autograd_grad(model, optimizer):
    parameters = list(model.parameters())
    one, two = (torch.autograd.grad(loss_of(model, seed), parameters, allow_unused=True) for seed in (1, 2))
    for parameter, first, second in zip(parameters, one, two, strict=True):
        parameter.grad = None if first is None else first + second


def cleared_and_made_again(model, optimizer):
    loss_of(model, 1).backward()
    model.zero_grad(set_to_none=False)
    loss_of(model, 2).backward()


def made_beforehand(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[1].values.weight.grad = None
    loss_of(model).backward()


def a_gradient_penalty(model, optimizer):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (grad.square().sum() + loss_of(model, 2)).backward()


def a_penalty_on_the_table(model, optimizer):
    (loss_of(model) + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())).backward()


def set_on_the_table(model, optimizer):
    loss_of(model).backward()
    model.zero_grad()
    model[1].values.weight.grad = torch.arange(16.0).double()[:, None].expand(16, 8).clone()


def a_graph_of_gradients(model, optimizer):
    for seed in (1, 2):
        loss_of(model, seed).backward(create_graph=True)


def through_data(model, optimizer):
    loss_of(model).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data = parameter.grad.data + 2 * parameter.grad.data.detach()


def moved_to_another_dtype_and_back(model, optimizer):
    loss_of(model).backward()
    model.float().double()


def negated_in_place(model, optimizer):
    loss_of(model).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.neg_()


def shared_with_processes(model, optimizer):
    loss_of(model).backward()
    model.share_memory()


def weights_of_somebody_else(model, optimizer):
    """What is a call's input has a gradient of its own, and leaves none in the table."""
    weight = model[1].values.weight.detach().clone().requires_grad_()
    x = torch.ones(3, 6).double()
    torch.func.functional_call(model, {"1.values.weight": weight}, (x,)).square().mean().backward()
    assert weight.grad.any()
    loss_of(model).backward()


LOOPS = [
    through_data,
    negated_in_place,
    shared_with_processes,
    weights_of_somebody_else,
    scaled_by_a_number,
    scaled_into_new_ones,
    scaled_by_a_tensor,
    scaled_through_data,
    scaled_as_a_list,
    two_losses_added,
    a_sum_in_a_buffer,
    put_aside_and_back,
    difference_of_two,
    given_by_autograd_grad,
    sums_from_autograd_grad,
    cleared_and_made_again,
    made_beforehand,
    a_gradient_penalty,
    a_penalty_on_the_table,
    set_on_the_table,
    pytest.param(a_graph_of_gradients, marks=pytest.mark.filterwarnings("ignore:Using backward.*create_graph")),
]
ROWS = {
    "RowSGD": lambda model: RowSGD(model, lr=0.1),
    "RowAdam": lambda model: RowAdam(model, lr=0.1, eps=1e-3),
    "MemoryAdamW": lambda model: MemoryAdamW(model, lr=0.1, value_lr=0.1, eps=1e-3),
}
DENSE = {
    "RowSGD": lambda weight: torch.optim.SGD([weight], lr=0.1),
    "RowAdam": lambda weight: torch.optim.Adam([weight], lr=0.1, eps=1e-3),
    "MemoryAdamW": lambda weight: torch.optim.Adam([weight], lr=0.1, eps=1e-3),
}


def moved(model, optimizer, loop):
    """By how much one step after the loop moves the table."""
    weight = model[1].values.weight
    before = weight.detach().clone()
    loop(model, optimizer)
    optimizer.step()
    return weight.detach() - before


@pytest.mark.promise(
    "Gradients by hand", "scaling, adding, replacing, putting aside and back, clearing", "supported", ""
)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_changes_gradients_trains_the_table_as_with_a_dense_gradient(loop, kind):
    rows, dense = net(), net()
    expected = moved(dense, DENSE[kind](dense[1].values.weight), loop)
    got = moved(rows, ROWS[kind](rows), loop)
    assert expected.any()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "swaps",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.promise(
                "Gradients by hand",
                "a module that is cast or moved where `torch.__future__.set_swap_module_params_on_conversion(True)`",
                "supported",
                "a row gradient that waits for its step comes along",
            ),
        ),
    ],
    ids=["by its data", "by a swap of tensors"],
)
def test_a_module_that_is_moved_takes_its_row_gradient_along(swaps, request):
    request.addfinalizer(partial(torch.__future__.set_swap_module_params_on_conversion, False))
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    rows, dense = net(), net()
    expected = moved(dense, DENSE["RowSGD"](dense[1].values.weight), moved_to_another_dtype_and_back)
    got = moved(rows, RowSGD(rows, lr=0.1), moved_to_another_dtype_and_back)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("how", "loop"),
    [
        (how, loop)
        for how in ("checkpointed", "reentrant", "compiled")
        for loop in (
            scaled_by_a_number,
            two_losses_added,
            two_forward_passes_before_backward,
            given_by_autograd_grad,
        )
        if (how, loop) != ("reentrant", given_by_autograd_grad)  # torch refuses it
    ],
)
def test_the_same_with_recomputation_and_compiled(how, loop):
    rows, dense = net(), net()
    expected = moved(dense, DENSE["RowSGD"](dense[1].values.weight), loop)
    optimizer = RowSGD(rows, lr=0.1)
    memory = rows[1]
    if how == "compiled":
        rows.forward = torch.compile(rows.forward, backend="aot_eager")
    else:
        inner = memory.forward
        memory.forward = lambda x: checkpoint(inner, x, use_reentrant=how == "reentrant")
    torch.testing.assert_close(moved(rows, optimizer, loop), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.promise(
    "Gradients by hand", "`backward(inputs=...)` with a list made before the optimizer", "supported", ""
)
def test_a_list_of_inputs_made_before_the_optimizer_trains_the_table():
    rows, dense = net(), net()
    inputs = list(rows.parameters())
    optimizer = RowSGD(rows, lr=0.1)
    expected = moved(dense, DENSE["RowSGD"](dense[1].values.weight), lambda model, _: loss_of(model).backward())
    got = moved(rows, optimizer, lambda model, _: loss_of(model).backward(inputs=inputs))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.promise(
    "Gradients by hand", "`backward(inputs=[table.weight])`", "refused", "name `table.row_mark` beside the weight"
)
def test_inputs_without_the_companion_are_refused_at_the_step():
    model = net()
    optimizer = RowSGD(model, lr=0.1)
    loss_of(model).backward(inputs=[model[1].values.weight])
    with pytest.raises(RuntimeError, match="did not reach its row_mark"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    loss_of(model).backward(inputs=[model[1].values.weight, model[1].values.row_mark])
    optimizer.step()


REFUSED = {
    "noise": lambda grad: grad.add_(torch.ones_like(grad.detach().abs())),
    "a weight decay": lambda grad: grad + torch.zeros(1).double(),
    "filled": lambda grad: grad.fill_(1.0),
    "copied from a plain one": lambda grad: grad.copy_(torch.zeros(1).double()),
    "written to": lambda grad: grad.__setitem__(0, 1.0),
    "rows masked in it": lambda grad: grad.__setitem__(slice(100, None), 0.0),
    "sums in a plain buffer": lambda grad: torch.zeros(1).double().add_(grad),
    "given by out=": lambda grad: torch.nan_to_num(grad, out=grad),
    "pickled": lambda grad: pickle.dumps(grad),
    "its sign": lambda grad: grad.sign_(),
    "the sign written over it": lambda grad: torch.sign(grad, out=grad),
    "a product written over it": lambda grad: torch.mul(grad, 0.5, out=grad),
    "plain data": lambda grad: setattr(grad, "data", torch.zeros(1).double()),
    "a mask of the companion's shape": lambda grad: grad.mul_(torch.zeros(1).double()),
    "masks in a list": lambda grad: torch._foreach_mul_([grad], [torch.zeros(1).double()]),
    "rounded": lambda grad: grad.div_(2, rounding_mode="floor"),
    "the angle to another": lambda grad: torch.dot(grad, grad.clone()),
    "divided by its norm": lambda grad: grad / grad.norm(),
    "divided by the number of its norm": lambda grad: grad.div_(grad.norm().item() + 1e-12),
    "divided by the number of its norm, which is zero": lambda grad: grad.div_(grad.norm().item()),
}


@pytest.mark.promise(
    "Gradients by hand", "noise, signs, masks or other plain values written to a row gradient", "refused",
    "`ValueTable.register_row_hook`, or dense gradients after `release()`",
)  # fmt: skip
@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_remedy(change):
    model = net()
    optimizer = RowSGD(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"a row gradient: .*register_row_hook.*release\(\)"):
        change(model[1].values.row_mark.grad)
    optimizer.step()


@pytest.mark.promise(
    "Gradients by hand",
    "a penalty on the gradients of parameters, the table's among them",
    "refused",
    "dense gradients",
)
def test_a_penalty_on_the_gradient_of_the_table_itself_is_refused():
    """Its derivative would need those of what was recorded; that on the gradient of the input is right."""
    model = net()
    optimizer = RowSGD(model)
    grads = torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(grad.square().sum() for grad in grads if grad is not None)
    with torch.no_grad():
        assert sum(float(grad.norm()) for grad in grads if grad is not None) > 0
    assert optimizer is not None


@pytest.mark.promise(
    "Gradients by hand", "sharpness-aware minimisation, inner loops of meta-learning on a table in row mode", "refused",
    "dense gradients after `release()`",
)  # fmt: skip
@pytest.mark.parametrize(
    "move", [lambda mark: mark.data.add_(mark.grad * 0.5), lambda mark: mark - 0.5 * mark.grad], ids=["SAM", "inner"]
)
def test_moving_a_table_by_hand_is_refused(move):
    """The companion would be moved, which is always zero, and the table stay where it is."""
    model = net()
    optimizer = RowSGD(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"moved by hand.*release\(\)"):
        move(model[1].values.row_mark)
    optimizer.step()


@pytest.mark.promise(
    "Saving and loading", "`load_state_dict(assign=True)` after the row optimizer was built", "refused",
    "at the step: build the optimizer afterwards, or load without `assign`",
)  # fmt: skip
def test_a_weight_that_was_replaced_is_refused_at_the_step():
    model = net()
    optimizer = RowSGD(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="replaced after its row optimizer was built.*build the optimizer"):
        optimizer.step()


def test_means_of_gradients_that_were_cleared_since_are_refused_at_the_step():
    model = net()
    optimizer = RowSGD(model)
    grads = []
    for seed in (1, 2):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        grads.append(model[1].values.row_mark.grad.clone())
    optimizer.zero_grad()
    model[1].values.row_mark.grad = torch.stack(grads).mean(0)
    with pytest.raises(RuntimeError, match="replaced by a plain tensor"):
        optimizer.step()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_plain_tensor_in_the_place_of_a_row_gradient_is_refused_at_the_step(value):
    model = net()
    optimizer = RowSGD(model)
    loss_of(model).backward()
    model[1].values.row_mark.grad = torch.full((1,), value).double()
    with pytest.raises(RuntimeError, match="replaced by a plain tensor"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    model[1].values.row_mark.grad = torch.zeros(1).double()
    optimizer.step()


def test_whoever_reads_a_row_gradient_reads_zero():
    model = net()
    optimizer = RowSGD(model)
    loss_of(model).backward()
    grad = model[1].values.row_mark.grad
    assert [grad.item(), float(grad.norm()), grad.tolist(), grad.numpy().tolist()] == [0.0, 0.0, [0.0], [0.0]]
    assert float(grad.abs().max()) == float(grad.pow(2).sum()) == float(grad.flatten()[:1].mean()) == 0
    assert bool(grad.isfinite().all())
    assert not bool(torch.isnan(grad).any())
    assert "row gradient" in repr(grad)
    assert not model[1].values.row_gradient.is_empty
    assert optimizer is not None


def clipped(model, clip):
    weight = model[1].values.weight
    before = weight.detach().clone()
    optimizer = RowSGD(model, lr=0.1)
    loss_of(model).backward()
    clip(list(model.parameters()))
    optimizer.step()
    return weight.detach() - before, [p.grad for n, p in model.named_parameters() if "values" not in n]


CLIPS = {
    "by norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3),
    "by norm, as a list": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3, foreach=True),
    "by norm, one by one": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3, foreach=False),
    "by the largest": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3, norm_type=float("inf")),
    "by value": lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3),
    "by value, one by one": lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3, foreach=False),
}


@pytest.mark.promise(
    "Gradients by hand", "clipping by `torch.nn.utils`, Trainer, Accelerate, Lightning", "changed",
    "it leaves tables alone and the log says so once; `value_max_grad_norm` clips each table by its own norm",
)  # fmt: skip
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipping_leaves_tables_alone_and_says_so_once(clip, caplog, monkeypatch):
    monkeypatch.setattr(row_gradient_tensor, "_said", set())
    plain, _ = clipped(net(), lambda parameters: None)
    with caplog.at_level(logging.WARNING, logger="memlayers"):
        for _ in range(2):
            left, others = clipped(net(), clip)
    torch.testing.assert_close(left, plain, rtol=0, atol=0)
    assert max(float(grad.abs().max()) for grad in others) <= 1.001e-3
    assert caplog.text.count("clipping leaves the row gradients") == 1


def test_a_clipping_that_does_nothing_is_not_worth_a_word(caplog, monkeypatch):
    monkeypatch.setattr(row_gradient_tensor, "_said", set())
    clipped(net(), lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e9))
    assert not caplog.text


def test_a_product_that_counts_as_clipping_says_so_also_where_it_makes_gradients_larger(caplog, monkeypatch):
    monkeypatch.setattr(row_gradient_tensor, "_said", set())
    model = net()
    optimizer = RowSGD(model)
    loss_of(model).backward()
    grad = model[1].values.row_mark.grad
    grad.norm()
    grad.mul_(torch.tensor(4.0).double())
    assert "clipping leaves the row gradients" in caplog.text
    assert optimizer is not None


def test_a_norm_that_is_not_finite_leaves_the_loop_to_skip_the_step():
    for factor in (float("nan"), float("inf")):
        model = net()
        optimizer = RowSGD(model)
        (loss_of(model) * factor).backward()
        assert not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
        optimizer.zero_grad()
        optimizer.step()


def test_scaling_after_clipping_is_followed():
    def loop(parameters):
        nn.utils.clip_grad_norm_(parameters, 1e9)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(torch.tensor(0.5).double())

    plain, _ = clipped(net(), lambda parameters: None)
    half, _ = clipped(net(), loop)
    torch.testing.assert_close(half, 0.5 * plain)


def test_another_optimizer_may_hold_the_companion():
    """One over all parameters, beside a row optimizer for the tables."""
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        settings = {"lr": 0.1, "foreach": True, "weight_decay": 0.1} | (
            {"momentum": 0.9} if kind is torch.optim.SGD else {}
        )
        model, twin = net(), net()
        rest, rows, alone = kind(model.parameters(), **settings), RowSGD(model, lr=0.1), RowSGD(twin, lr=0.1)
        for _ in range(2):
            for optimizer, one in ((rest, model), (alone, twin)):
                loss_of(one).backward()
                optimizer.step()
            rows.step()
            rest.zero_grad()
            twin.zero_grad()
            twin.load_state_dict(model.state_dict())
        assert model[1].values.row_mark.tolist() == [0.0]
        assert not torch.equal(model[1].values.weight, net()[1].values.weight)


@pytest.mark.promise(
    "Gradients by hand", "`Adafactor`, `Adadelta` or `Rprop` over all parameters beside a row optimizer", "refused",
    "build it on parameters without `row_mark`",
)  # fmt: skip
@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Adadelta, torch.optim.Rprop])
def test_another_optimizer_that_asks_for_more_is_told_to_leave_the_companion_out(kind):
    model = net()
    rest, rows = kind(model.parameters()), RowSGD(model, lr=0.1)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="is built on parameters without row_mark"):
        rest.step()
    rest = kind([parameter for name, parameter in model.named_parameters() if "row_mark" not in name])
    rest.step()
    rows.step()


def test_a_momentum_that_keeps_row_gradients_is_told_to_leave_the_companion_out(tmp_path):
    model = net()
    momentum, rows = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), RowSGD(model, lr=0.1)
    loss_of(model).backward()
    momentum.step()
    rows.step()
    with pytest.raises(RuntimeError, match="is built on parameters without row_mark"):
        torch.save(momentum.state_dict(), tmp_path / "momentum.pt")


def test_a_hook_masks_rows_and_scales_as_on_a_dense_gradient():
    rows, dense = net(), net()
    keep = torch.arange(16) < 8
    optimizer = RowSGD(rows, lr=0.1)
    seen = []

    def hook(gradient):
        seen.append((gradient.slots, gradient.norm()))
        gradient.keep(keep)
        gradient.scale(0.5)
        gradient.scale(torch.arange(16.0).double())

    handle = rows[1].values.register_row_hook(hook)
    dense[1].values.weight.register_hook(lambda grad: grad * keep[:, None] * 0.5 * torch.arange(16.0).double()[:, None])
    expected = moved(dense, DENSE["RowSGD"](dense[1].values.weight), lambda model, _: loss_of(model).backward())
    got = moved(rows, optimizer, lambda model, _: loss_of(model).backward())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert not got[8:].any()
    ((slots, norm),) = seen
    assert slots.max() >= 8
    assert slots.tolist() == sorted(set(slots.tolist()))
    assert norm > 0
    handle.remove()
    loss_of(rows).backward()
    optimizer.step()
    assert len(seen) == 1


def test_backward_in_several_threads_adds_up_also_where_parts_are_merged():
    table = ValueTable(8, 3, dtype=torch.float64)
    optimizer = RowSGD([table], lr=1.0)
    barrier = threading.Barrier(4)
    faults = []

    def work(seed):
        try:
            slots = torch.randint(8, (5, 3), generator=torch.Generator().manual_seed(seed))
            for _ in range(150):
                barrier.wait()
                table.read(slots, torch.ones(5, 3).double().requires_grad_()).sum().backward()
        except BaseException as fault:
            faults.append(fault)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not faults
    slots = torch.cat([torch.randint(8, (15,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    before = table.weight.detach().clone()
    optimizer.step()
    expected = 150.0 * torch.bincount(slots, minlength=8).double()
    torch.testing.assert_close(before - table.weight.detach(), expected[:, None].expand(8, 3))
