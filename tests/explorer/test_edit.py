"""Slots that are frozen, started again, and more of them."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus, SlotCounts, UsageMeter, quantize_memory
from memlayers.explorer import SlotTrace, freeze_slots, grow_table, reset_slots
from memlayers.models import add_memory, causal_lm, memory_layers
from memlayers.optim import MemoryAdamW, RowAdagrad, RowAdam, RowSGD
from memlayers.values import value_tables

IDS = torch.randint(100, (4, 32), generator=torch.Generator().manual_seed(5))


def model_with(kind=MemoryLayer, layers=(2,), heads=4, keys="product", num_subkeys=16, topk=2, **how):
    torch.manual_seed(0)
    model = causal_lm("gpt2", vocab_size=100, layers=2, dim=32, heads=2, context=32)
    config = MemoryConfig(dim=32, heads=heads, topk=topk, num_subkeys=num_subkeys, query_dim=8, keys=keys)
    add_memory(model, config, layers, kind=kind, **how)
    optimizer = MemoryAdamW(model, lr=1e-2, value_lr=1e-2)
    train(model, optimizer, 3)
    optimizer.release()
    return model


def train(model, optimizer, steps):
    model.train()
    for step in range(steps):
        ids = torch.randint(100, (4, 32), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def reads(model, layer):
    with UsageMeter(layer) as meter, torch.no_grad():
        for seed in range(8):
            model(input_ids=torch.randint(100, (4, 32), generator=torch.Generator().manual_seed(seed)))
    return meter.state_dict()["count_HS"].sum(0)


@pytest.mark.parametrize(
    ("kind", "how"),
    [(MemoryLayer, {}), (MemoryPlus, {}), (Experts, {}), (MemoryLayer, {"keys": "flat"}),
     (MemoryLayer, {"heads": 1, "layers": (1, 2), "share_values": True}),
     (Experts, {"layers": (1, 2), "mode": "parallel"})],
    ids=["memory", "memory_plus", "experts", "flat keys", "one shared table", "parallel"],
)  # fmt: skip
def test_growth_keeps_outputs_and_new_slots_are_read(kind, how):
    model = model_with(kind, **how)
    optimizer = MemoryAdamW(model, lr=1e-3, value_lr=1e-3)
    train(model, optimizer, 1)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert grow_table(model, optimizer=optimizer) is model
        assert (model(input_ids=IDS).logits - before).abs().max() <= 1e-5
    layers = [*memory_layers(model).values()]
    for layer in layers:
        assert layer.config.num_subkeys == 32
        assert layer.values.weight.shape == (1024, 32)
        assert {table.weight.shape[0] for table in value_tables(layer.values)} == {1024}
        assert layer.keys.weight.shape[-2] == (1024 if how.get("keys") == "flat" else 32)
        old = (
            torch.arange(1024) < 256
            if how.get("keys") == "flat"
            else (torch.arange(1024) % 32 < 16) & (torch.arange(1024) < 512)
        )
        shared = torch.stack([reads(model, one) for one in layers if one.values is layer.values]).sum(0)
        assert (shared[~old] > 0).double().mean() >= 0.1
    train(model, optimizer, 2)


@pytest.mark.promise(
    "Saving and loading", "a table with four times as many slots, in the middle of a training", "supported",
    "`grow_table(model, optimizer=optimizer)` keeps the outputs; `save_pretrained` has the new size",
)  # fmt: skip
def test_a_grown_model_is_saved_and_loaded(tmp_path):
    model = grow_table(model_with())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert loaded.config.placement.config.num_subkeys == 32


def test_a_model_of_the_same_configuration_does_not_grow_along(tmp_path):
    model = model_with()
    other = type(model)(model.config)
    grow_table(model)
    assert model.config is model.transformer.config
    assert (model.config.placement.config.num_subkeys, other.config.placement.config.num_subkeys) == (32, 16)
    other.save_pretrained(tmp_path)
    assert type(other).from_pretrained(tmp_path).config.placement == other.config.placement


def test_states_of_adamw_and_of_rows_grow_with_their_weights():
    model = model_with()
    (layer,) = memory_layers(model).values()
    optimizer = MemoryAdamW(model, lr=1e-3, value_lr=1e-3, selector_lr=1e-3)
    train(model, optimizer, 2)
    values = {name: one.clone() for name, one in optimizer.state[layer.values.weight].items()}
    keys = {name: one.clone() for name, one in optimizer.state[layer.keys.weight].items()}
    old_keys, old_values = layer.keys.weight, layer.values.weight
    grow_table(model, optimizer=optimizer)
    of_rows, of_keys = optimizer.state[layer.values.weight], optimizer.state[layer.keys.weight]
    assert sorted(of_rows) == ["exp_avg", "exp_avg_sq", "steps"]
    for slot in (0, 9, 20, 600, 1023):
        parent = slot // 32 % 16 * 16 + slot % 32 % 16
        assert torch.equal(layer.values.weight[slot], old_values[parent])
        for name, one in of_rows.items():
            assert torch.equal(one[slot], values[name][parent])
    assert of_keys["step"] == keys["step"] == 2
    for head, (first, second) in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        for codebook, at in enumerate((first, second)):
            places = slice(16 * at, 16 * at + 16)
            others = slice(16 - 16 * at, 32 - 16 * at)
            assert torch.equal(layer.keys.weight[codebook, head, places], old_keys[codebook, head])
            assert torch.equal(of_keys["exp_avg"][codebook, head, places], keys["exp_avg"][codebook, head])
            middle = old_keys[codebook, head].mean(0)
            assert torch.allclose(layer.keys.weight[codebook, head, others], middle.expand(16, -1))
            assert torch.allclose(
                of_keys["exp_avg_sq"][codebook, head, others], keys["exp_avg_sq"][codebook, head].mean(0)
            )
    held = [one for group in optimizer.param_groups for one in group["params"]]
    assert {layer.keys.weight, layer.values.weight} <= {*held}
    assert {old_keys, old_values}.isdisjoint(held)
    assert {old_keys, old_values}.isdisjoint(optimizer.state)
    before = layer.values.weight.clone()
    train(model, optimizer, 1)
    changed = (layer.values.weight != before).any(1)
    assert changed[512:].any()
    assert not changed.all()
    copied = MemoryAdamW(copy.deepcopy(model), lr=1e-3, selector_lr=1e-3)
    copied.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("kind", "settings", "state"),
    [(RowAdam, {"moments": "bfloat16"}, {"exp_avg": (1024, 32), "exp_avg_sq": (1024, 32), "steps": (1024,)}),
     (RowAdagrad, {}, {"square_sum": (1024, 32)}), (RowAdagrad, {"per_row": True}, {"square_sum": (1024,)}),
     (RowSGD, {}, {})],
    ids=["adam", "adagrad", "adagrad, a number a row", "sgd"],
)  # fmt: skip
def test_each_row_optimizer_trains_on(kind, settings, state):
    model = model_with()
    (layer,) = memory_layers(model).values()
    optimizer = kind(model, lr=1e-2, **settings)
    train(model, optimizer, 1)
    grow_table(model, optimizer=optimizer)
    assert {name: tuple(one.shape) for name, one in optimizer.state.get(layer.values.weight, {}).items()} == state
    before = layer.values.weight.clone()
    train(model, optimizer, 1)
    assert layer.values.weight.grad is None
    assert (layer.values.weight != before).any(1)[512:].any()


@pytest.mark.parametrize("of_tables", [True, False], ids=["all", "beside a row optimizer"])
@pytest.mark.parametrize("change", ["grow_table", "reset_slots"])
def test_states_that_are_not_of_elements_are_refused_before_anything_changes(change, of_tables):
    model = model_with()
    rows = [] if of_tables else [RowAdam(model)]
    tables = {parameter for table in value_tables(model) for parameter in table.parameters()}
    factored = torch.optim.Adafactor([one for one in model.parameters() if of_tables or one not in tables])
    for optimizer in (factored, *rows):
        train(model, optimizer, 1)
        model.zero_grad()
    with SlotTrace(model) as trace:
        reads(model, *memory_layers(model).values())
    before = copy.deepcopy(model.state_dict())
    call = grow_table if change == "grow_table" else partial(reset_slots, usage=trace.usage)
    with pytest.raises(ValueError, match=f"{change} needs .* got 'row_var' of .* in Adafactor: leave that"):
        call(model, optimizer=[factored, *rows])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_counted_reads_before_is_refused_by_name():
    model = model_with()
    (layer,) = memory_layers(model).values()
    made = [UsageMeter(layer), SlotTrace(model), SlotCounts(model)]
    grow_table(model)
    for one in made:
        with one, pytest.raises(ValueError, match=r"made after grow_table, got a meter for 256 slots of .* 1,024"):
            model(input_ids=IDS)
        one.reset()
    with made[0]:
        model(input_ids=IDS)
    assert made[0].report().slots == 1024


def test_slots_do_not_start_again_by_what_was_counted_before_growth():
    model = model_with()
    usage = traced(model).usage
    grow_table(model)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"must be counted after grow_table, got a meter for 256 slots of .* 1,024"):
        reset_slots(model, usage)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_growing_again_and_again():
    model = model_with()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        grow_table(grow_table(model))
        assert (model(input_ids=IDS).logits - before).abs().max() <= 1e-5
    (layer,) = memory_layers(model).values()
    assert layer.values.weight.shape == (4096, 32)


def test_what_cannot_grow_is_refused_and_stays():
    model = model_with(heads=1)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="a table must be read by at least 2 heads to grow, got 1 at transformer.h.1.mlp"
    ):
        grow_table(model)
    model_of_two = model_with()
    optimizer = MemoryAdamW(model_of_two)
    with pytest.raises(
        ValueError, match="optimizer must be the one that trains the table of transformer.h.1.mlp.memory"
    ):
        grow_table(model_of_two)
    with pytest.raises(ValueError, match="optimizer must be the one that trains the table"):
        grow_table(model_of_two, optimizer=torch.optim.SGD(model_of_two.lm_head.parameters()))
    model_of_two(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="must have been used and cleared: call optimizer.zero_grad"):
        grow_table(model_of_two, optimizer=optimizer)
    optimizer.zero_grad()
    (layer,) = memory_layers(model_of_two).values()
    with freeze_slots(layer, [3]), pytest.raises(ValueError, match="grow_table needs a table without row hooks"):
        grow_table(model_of_two, optimizer=optimizer)
    optimizer.choose_rows([3])
    with pytest.raises(ValueError, match="grow_table needs an optimizer that may move all rows, .* choose_rows.None."):
        grow_table(model_of_two, optimizer=optimizer)
    optimizer.choose_rows(None)
    with pytest.raises(ValueError, match="topk must be at most an eighth of num_subkeys = 16, .*, got 3"):
        grow_table(model_with(topk=3))
    with pytest.raises(ValueError, match="model must have at least one memory"):
        grow_table(nn.Linear(2, 2))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert layer.config.num_subkeys == 16
    grow_table(model_of_two, optimizer=optimizer)


@pytest.mark.promise(
    "Gradients by hand", "keeping some rows of a table as they are while the others train", "supported",
    "`freeze_slots`: bit for bit, their moments too; a dense table is refused",
)  # fmt: skip
@pytest.mark.parametrize("kind", [MemoryLayer, Experts])
def test_frozen_rows_and_their_states_stay_bit_for_bit(kind):
    model = model_with(kind)
    (layer,) = memory_layers(model).values()
    optimizer = MemoryAdamW(model, lr=1e-3, value_lr=1e-2)
    train(model, optimizer, 2)
    frozen = torch.arange(0, 256, 2)
    before = [
        [one.clone() for one in (table.weight, *optimizer.state[table.weight].values())]
        for table in value_tables(layer)
    ]
    with freeze_slots(layer, frozen):
        train(model, optimizer, 3)
    for table, held in zip(value_tables(layer), before, strict=True):
        now = [table.weight, *optimizer.state[table.weight].values()]
        assert all(torch.equal(one[frozen], was[frozen]) for one, was in zip(now, held, strict=True))
        assert (table.weight[1::2] != held[0][1::2]).any(1).double().mean() > 0.1
    train(model, optimizer, 1)
    assert (layer.values.weight[frozen] != before[0][0][frozen]).any()


def test_what_cannot_be_frozen_is_refused():
    (layer,) = memory_layers(model_with()).values()
    with pytest.raises(ValueError, match="memory must be in row mode to freeze slots"):
        freeze_slots(layer, [1])
    optimizer = RowSGD(layer)
    for slots, says in (([256], r"slots must be in \[0, 256\), got 256 to 256"), ([-1, 3], "got -1 to 3"),
                        ([0.5], r"slots must be .* or a mask of bool of shape \[256\], got torch.float32 of \[1\]"),
                        ([True], r"got torch.bool of \[1\]")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            freeze_slots(layer.values, slots)
    with pytest.raises(ValueError, match="memory must be a MemoryLayer or a ValueTable, got a Linear"):
        freeze_slots(nn.Linear(2, 2), [1])
    optimizer.release()
    with pytest.raises(ValueError, match="tables must be of floats to be trained, got one of 8 bits"):
        freeze_slots(quantize_memory(layer), [1])


def traced(model):
    with SlotTrace(model) as trace, torch.no_grad():
        for seed in range(8):
            model(input_ids=torch.randint(100, (4, 32), generator=torch.Generator().manual_seed(seed)))
    return trace


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (MemoryLayer, {}),
        (MemoryPlus, {}),
        (Experts, {"layers": (1, 2), "share_values": True}),
        (MemoryLayer, {"keys": "flat", "num_subkeys": 4}),
    ],
    ids=["memory", "memory_plus", "shared experts", "flat keys"],
)
def test_dead_slots_start_again_and_others_stay(kind, how):
    model = grow_table(model_with(kind, **how))
    optimizer = MemoryAdamW(model, lr=1e-3, value_lr=1e-3)
    train(model, optimizer, 1)
    trace = traced(model)
    before = {name: meter.state_dict()["count_HS"].clone() for name, meter in trace.usage.items()}
    layers = memory_layers(model)
    was = {
        name: [one.detach().clone() for one in (layer.keys.weight, layer.values.weight)]
        for name, layer in layers.items()
    }
    restarted = reset_slots(model, trace.usage, optimizer=optimizer)
    after = traced(model).usage
    of_table = torch.stack([one.sum(0) for one in before.values()]).sum(0)
    for name, layer in layers.items():
        counts = before[name]
        dead = counts == 0 if how.get("keys") == "flat" else counts.unflatten(1, (32, 32)).sum(2) == 0
        assert restarted[name] >= int(dead.sum()) > 0
        keys, values = was[name]
        keys, now = (keys, layer.keys.weight) if how.get("keys") == "flat" else (keys[0], layer.keys.weight[0])
        assert torch.equal(now[~dead], keys[~dead])
        assert (now[dead] != keys[dead]).any(-1).all()
        alive = of_table > 0 if how.get("share_values") else counts.sum(0) > 0
        assert torch.equal(layer.values.weight[alive], values[alive])
        found = after[name].state_dict()["count_HS"] > 0
        assert found.sum() > 1.2 * (counts > 0).sum()  # more is read than before, and by the new keys
    train(model, optimizer, 2)


def test_a_row_that_starts_again_says_what_the_row_beside_it_says():
    model = model_with(heads=1, num_subkeys=8)
    (layer,) = memory_layers(model).values()
    optimizer = MemoryAdamW(model, lr=1e-3, value_lr=1e-3)
    train(model, optimizer, 1)
    with UsageMeter(layer) as meter, torch.no_grad():
        model(input_ids=IDS)
    counts = torch.zeros(1, 64, dtype=torch.int64)
    counts[0, [9, 10, 17, 18]] = torch.tensor([5, 4, 3, 2])  # sub-keys 1, 2 and 1, 2
    keys = layer.keys.weight.detach().clone()
    meter.load_state_dict({**meter.state_dict(), "count_HS": counts})
    values, state = layer.values.weight.detach().clone(), optimizer.state[layer.values.weight]["exp_avg"].clone()
    assert reset_slots(model, {"transformer.h.1.mlp.memory": meter}, optimizer=optimizer) == {
        "transformer.h.1.mlp.memory": 12
    }
    parent = torch.tensor([1, 1, 2, 2, 1, 2, 1, 2])  # the most read ones in turn: 1, 2, 1, ...
    away = (layer.keys.weight[:, 0] - keys[:, 0, parent]).norm(dim=-1) / keys[:, 0, parent].norm(dim=-1)
    assert (away[:, [1, 2]] == 0).all()
    assert ((away[:, [0, 3, 4, 5, 6, 7]] > 0.01) & (away[:, [0, 3, 4, 5, 6, 7]] < 0.3)).all()
    slots = (parent[:, None] * 8 + parent).flatten()
    assert torch.equal(layer.values.weight, values[slots])
    assert torch.equal(optimizer.state[layer.values.weight]["exp_avg"], state[slots])


def test_what_cannot_start_again_is_refused():
    model = model_with()
    trace = traced(model)
    (name,) = trace.usage
    with pytest.raises(
        ValueError, match="usage must have a meter of each memory of the model, got none of transformer"
    ):
        reset_slots(model, {})
    with pytest.raises(ValueError, match="usage must have a meter of each memory"):
        reset_slots(model, {name: UsageMeter(MemoryLayer(MemoryConfig(dim=4, topk=1, num_subkeys=2, query_dim=2)))})
    with pytest.raises(
        ValueError, match="must be of at least 80 tokens to tell which of its 16 keys a head never reads, got 0"
    ):
        reset_slots(model, {name: UsageMeter(memory_layers(model)[name])})
    optimizer = MemoryAdamW(model)
    optimizer.choose_rows([3])
    with pytest.raises(ValueError, match="reset_slots needs an optimizer that may move all rows"):
        reset_slots(model, trace.usage, optimizer=optimizer)
    optimizer.release()
    MemoryAdamW(model)  # it is gone at once, and the table has lost its owner
