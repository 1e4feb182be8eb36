"""Tables in files: read and trained as tables in memory, kept by checkpoints, and never copied into memory unasked."""

import copy
import dataclasses
import mmap
import os
import pickle

import numpy as np
import pytest
import torch

import memlayers
from memlayers import Experts, MappedFile, MemoryConfig, MemoryLayer, MemoryPlus, RowAdagrad, RowAdam, RowSGD
from memlayers.optim import MemoryAdamW
from memlayers.storage import advice, rows
from memlayers.storage.mapped import MappedTable
from memlayers.storage.rows import Ahead, MappedRows

CONFIG = MemoryConfig(dim=32, heads=2, topk=4, num_subkeys=16, query_dim=8, query_norm="rms")


def mapped(folder, config=CONFIG, *, kind=MemoryLayer, **where):
    torch.manual_seed(0)
    return kind(config, values=MappedFile(folder), **where)


def in_memory(layer, kind=MemoryLayer):
    """The same layer with its table in memory."""
    like = kind(layer.config, dtype=layer.values.weight.dtype)
    with torch.no_grad():
        for (name, parameter), other in zip(like.named_parameters(), layer.parameters(), strict=True):
            if name != "values.weight":
                parameter.copy_(other)
        like.values.weight.copy_(all_rows(layer))
    return like


def all_rows(layer):
    return layer.values._files.rows(np.arange(layer.config.slots))


def train(layer, optimizer, steps, seed=1):
    """The losses of some steps."""
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(3, layer.config.dim, generator=draw).to(layer.values.weight.dtype)
        optimizer.zero_grad()
        loss = (layer(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def contents(layer):
    """Rows and states of all slots, as they count."""
    written = torch.from_numpy(layer.values._files.written)
    states = {name: state[written].clone() for name, state in layer.values.held_states().items()}
    return {"rows": all_rows(layer), **states}


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.promise(
    "Tables in files",
    "Train a table in files, with its moments",
    "supported",
    "`values=MappedFile(folder)`; bit for bit as in RAM",
)
@pytest.mark.parametrize("kind", [MemoryLayer, MemoryPlus])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [RowAdam, RowAdagrad, RowSGD, lambda layer: RowAdagrad(layer, per_row=True, max_grad_norm=0.1), MemoryAdamW],
    ids=["adam", "adagrad", "sgd", "number a row", "whole model"],
)
def test_training_is_bit_for_bit_that_of_a_table_in_memory(tmp_path, kind, dtype, build):
    layer = mapped(tmp_path, kind=kind, dtype=dtype)
    other = in_memory(layer, kind)
    losses = train(layer, build(layer), 4)
    assert losses == train(other, build(other), 4)
    assert losses[0] != losses[-1]
    assert torch.equal(all_rows(layer), other.values.weight)
    assert 0 < layer.values._files.written.sum() < 100


@pytest.mark.parametrize("width", [24, 40])
def test_rows_that_share_pages_and_end_within_one(tmp_path, width):
    config = MemoryConfig(dim=32, value_dim=width, heads=1, topk=2, num_subkeys=16, query_dim=8, query_norm="none")
    layer = mapped(tmp_path, config)
    other = in_memory(layer)
    assert train(layer, RowAdam(layer), 3) == train(other, RowAdam(other), 3)
    assert torch.equal(all_rows(layer), other.values.weight)


def test_a_fresh_row_is_the_same_whenever_it_is_first_read(tmp_path):
    layer = mapped(tmp_path)
    before = all_rows(layer)
    slots, weights = torch.tensor([[200, 3]]), torch.eye(2)[:, None]
    table = layer.values
    with torch.no_grad():
        read = [table.read(slots, one) for one in weights]
    assert torch.equal(torch.cat(read), before[slots[0]])
    assert not table._files.written.any()
    optimizer = RowAdam(layer)
    table.read(slots, weights[0])
    assert np.flatnonzero(table._files.written).tolist() == [3, 200]
    assert torch.equal(table.weight[slots[0]], before[slots[0]])
    assert torch.equal(all_rows(layer), before)
    assert before.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert len({row.numpy().tobytes() for row in before}) == 256
    del optimizer


def test_fresh_rows_of_zeros_take_no_room(tmp_path):
    config = MemoryConfig(dim=1024, heads=1, topk=2, num_subkeys=64, query_dim=8, query_norm="none", value_std=0.0)
    layer = mapped(tmp_path, config)
    RowAdam(layer)
    with torch.no_grad():
        assert not layer(torch.randn(50, 1024)).any()
    layer.values.fill()
    assert not layer.state_dict()["values.weight"].any()
    assert layer.values.weight.nbytes == 16_777_216
    assert layer.values.figures()["disk_bytes"] < 50_000


@pytest.mark.parametrize(
    ("build", "files"),
    [
        (RowAdam, {"weight": 1, "exp_avg+exp_avg_sq": 2, "steps": 1 / 32}),
        (RowAdagrad, {"weight": 1, "square_sum": 1}),
        (lambda layer: RowAdagrad(layer, per_row=True), {"weight": 1, "square_sum": 1 / 32}),
        (RowSGD, {"weight": 1}),
    ],
)
def test_the_moments_of_a_row_lie_side_by_side_in_one_file(tmp_path, build, files):
    layer = mapped(tmp_path)
    optimizer = build(layer)
    train(layer, optimizer, 2)
    layer.values.checkpoint()
    assert {path.stem: path.stat().st_size / (256 * 32 * 4) for path in tmp_path.glob("*.rows")} == files
    for name in files:
        states = [layer.values.held_states().get(one, layer.values.weight) for one in name.split("+")]
        kind = np.int32 if name == "steps" else np.float32
        content = np.fromfile(tmp_path / f"{name}.rows", kind).reshape(256, len(states), -1)
        for number, state in enumerate(states):
            assert np.array_equal(content[:, number], state.detach().numpy().reshape(256, -1))
            assert state.any()
    layer.values.close()


def test_moments_of_fresh_rows_get_their_room_once(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, value_dim=mmap.PAGESIZE // 4)  # a page a moment
    layer = mapped(tmp_path, config)
    optimizer, told = RowAdam(layer), []
    train(layer, optimizer, 1)
    file, before = layer.values._files.large_states()[0], layer.values._files.written.copy()
    if not file.make_ready(np.array([0])):
        pytest.skip("the system does not make pages ready")

    def tell(pages, address, runs, what):
        if pages is file.map and what == rows.POPULATE_WRITE:
            for begin, end in runs // (2 * mmap.PAGESIZE):
                told.extend(range(begin, end))
        advice.advise(pages, address, runs, what)

    monkeypatch.setattr(rows, "advise", tell)
    train(layer, optimizer, 1, seed=2)
    fresh = np.flatnonzero(layer.values._files.written & ~before)
    assert len(fresh) > 4
    assert (np.bincount(told, minlength=256)[fresh] == 1).all()


def test_a_table_goes_on_from_its_last_checkpoint(tmp_path):
    layer = mapped(tmp_path)
    optimizer = RowAdam(layer)
    train(layer, optimizer, 2)
    assert layer.values.checkpoint() == 1
    expected = contents(layer)
    changed = set(layer.values.changed_slots().tolist())
    assert changed == set()
    train(layer, optimizer, 2, seed=2)
    assert len(layer.values.changed_slots()) > 8
    assert not are_equal(contents(layer), expected)
    layer.values.close()
    again = mapped(tmp_path)
    RowAdam(again)
    assert are_equal(contents(again), expected)
    assert [path.name for path in tmp_path.glob("undo-*")] == []


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not(tmp_path):
    layer = mapped(tmp_path / "one")
    optimizer = MemoryAdamW(layer)
    train(layer, optimizer, 2)
    layer.values.checkpoint()
    model = {name: value.clone() for name, value in layer.named_parameters() if name != "values.weight"}
    state = copy.deepcopy(optimizer.state_dict())
    assert [one for one in state["state"].values() if "in_files" in one] == [{"in_files": 1}]
    expected = train(layer, optimizer, 3, seed=2)
    layer.values.close()
    again = mapped(tmp_path / "one")
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if name in model:
                parameter.copy_(model[name])
    optimizer = MemoryAdamW(again)
    optimizer.load_state_dict(state)
    assert train(again, optimizer, 3, seed=2) == expected


def test_moments_of_another_moment_are_said_when_a_state_is_loaded(tmp_path, caplog):
    layer = mapped(tmp_path)
    optimizer = RowAdam(layer)
    train(layer, optimizer, 1)
    between = copy.deepcopy(optimizer.state_dict())  # of no checkpoint
    layer.values.checkpoint(keep=2)
    first = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(first)
    assert not caplog.messages
    train(layer, optimizer, 1)
    optimizer.load_state_dict(first)
    layer.values.checkpoint(keep=2)
    optimizer.load_state_dict(first)
    optimizer.load_state_dict(between)
    assert [message.partition(" are of another moment")[0] for message in caplog.messages] == [
        f"the moments of the table in {str(tmp_path)!r}"
    ] * 3
    caplog.clear()
    layer.values.restore(1)
    optimizer.load_state_dict(first)
    assert not caplog.messages


def test_earlier_checkpoints_that_are_kept_can_be_restored(tmp_path):
    layer = mapped(tmp_path)
    optimizer = RowAdam(layer)
    held = {}
    for number in (1, 2, 3, 4):
        train(layer, optimizer, 1, seed=number)
        assert layer.values.checkpoint(keep=3) == number
        held[number] = contents(layer)
    train(layer, optimizer, 1, seed=5)
    layer.values.restore()
    assert are_equal(contents(layer), held[4])
    train(layer, optimizer, 1, seed=5)
    with pytest.raises(ValueError, match=r"has the checkpoints 2, 3, 4, got 1"):
        layer.values.restore(1)
    with pytest.raises(ValueError, match="number must be an integer of at least 0, got '2'"):
        layer.values.restore("2")
    layer.values.restore(2)
    assert are_equal(contents(layer), held[2])
    assert layer.values.checkpoint(keep=3) == 3


def test_rows_that_were_loaded_are_there_after_a_checkpoint_alone(tmp_path):
    layer = mapped(tmp_path)
    rows = torch.randn(256, 32)
    layer.values.load_state_dict({"weight": rows})
    assert torch.equal(layer.values.state_dict()["weight"], rows)
    assert layer.values.state_dict()["weight"].data_ptr() == layer.values.weight.data_ptr()
    layer.values.checkpoint()
    layer.values.load_state_dict({"weight": rows + 1})
    optimizer = RowAdam(layer)  # whose states are not in the log that is open
    train(layer, optimizer, 2)
    layer.values.close()
    again = mapped(tmp_path)
    assert torch.equal(all_rows(again), rows)
    assert not any(state.any() for state in again.values.held_states().values())


def test_a_row_is_logged_once_between_two_checkpoints(tmp_path):
    layer = mapped(tmp_path)
    optimizer = RowAdam(layer)
    train(layer, optimizer, 1)
    layer.values.checkpoint()
    logged = layer.values.figures()["logged_bytes"]
    train(layer, optimizer, 1)
    written = layer.values.figures()["logged_bytes"] - logged
    rows = len(layer.values.changed_slots())
    assert rows * 388 < written < rows * 388 * 1.1 + 500  # three rows of 32 numbers and a count
    train(layer, optimizer, 1)
    assert layer.values.figures()["logged_bytes"] - logged == written


def test_memory_that_was_asked_for_is_given_back(tmp_path):
    torch.manual_seed(0)
    layer = MemoryLayer(CONFIG, values=MappedFile(tmp_path, budget_bytes=0))
    other = in_memory(layer)
    assert train(layer, RowAdam(layer), 4) == train(other, RowAdam(other), 4)
    figures = layer.values.figures()
    assert figures["rows_read"] == figures["rows_asked"] > 0


def test_rows_that_are_asked_for_again_and_again_stay_when_others_are_given_back(tmp_path):
    slots, page = 400, mmap.PAGESIZE
    file = MappedRows(tmp_path / "rows", (slots, page // 4), torch.float32, writable=True)
    ahead, hot = Ahead(slots, 40 * page), np.arange(0, 40, 2)
    for first in range(100, 340, 2):  # 2 others each time
        ahead.keep_to_budget()
        ahead.fetch([file], np.concatenate((hot, [first, first + 1])))
        assert ahead.held_bytes <= 42 * page
    assert ahead.cold == 20 + 240
    ahead.keep_to_budget()
    ahead.fetch([file], np.arange(60))  # more than all of the budget at once
    ahead.keep_to_budget()
    assert ahead.held_bytes == 0
    before = ahead.cold
    ahead.fetch([file], hot)
    assert ahead.cold == before + 20


def test_the_system_is_asked_for_many_rows_at_once(tmp_path):
    config = MemoryConfig(dim=1024, heads=2, topk=16, num_subkeys=32, query_dim=8, query_norm="none")
    layer = mapped(tmp_path, config)
    layer.values.fill()
    layer.values.checkpoint()
    layer.values._files.ahead.forget()
    with torch.no_grad():
        layer(torch.randn(20, 1024))
    figures = layer.values.figures()
    assert figures["rows_read"] == figures["pages_read"] > 100


@pytest.mark.slow
@pytest.mark.promise(
    "Tables in files", "`torch.compile` of the model around one", "supported", "its reads are left out of graphs"
)
def test_a_compiled_layer(tmp_path):
    layer = mapped(tmp_path)
    other = in_memory(layer)
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), other(x))


def test_another_weight_of_a_functional_call_is_read(tmp_path):
    layer = mapped(tmp_path)
    x, rows = torch.randn(3, 32), torch.randn(256, 32)
    other = in_memory(layer)
    with torch.no_grad():
        expected = torch.func.functional_call(other, {"values.weight": rows}, (x,))
        assert torch.equal(torch.func.functional_call(layer, {"values.weight": rows}, (x,)), expected)


# What is refused.


@pytest.mark.promise(
    "Tables in files", "Dense gradients of one", "refused", "build its row optimizer, or freeze the table"
)
def test_a_dense_gradient_is_refused(tmp_path):
    layer = mapped(tmp_path)
    y = layer(torch.randn(3, 32))
    with pytest.raises(RuntimeError, match=r"build its row optimizer"):
        y.sum().backward()
    layer.values.requires_grad_(False)
    layer(torch.randn(3, 32)).sum().backward()
    assert layer.keys.weight.grad.any()


def test_a_dense_gradient_is_refused_where_the_weight_alone_requires_one(tmp_path):
    layer = mapped(tmp_path).requires_grad_(False)
    layer.values.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"build its row optimizer"):
        layer(torch.randn(3, 32)).sum().backward()


@pytest.mark.promise("Tables in files", "`torch.func.grad`, `vmap`, `jvp` of one", "refused", "a table in memory")
def test_a_transform_is_refused(tmp_path):
    layer, x = mapped(tmp_path).eval(), torch.randn(3, 32)
    for call in (torch.vmap(layer), torch.func.grad(lambda one: layer(one).sum())):
        with pytest.raises(ValueError, match=r"cannot be read in a transform of torch.func .*table in memory"):
            call(x)


def test_a_table_that_was_closed_is_refused_and_no_other_file_is_written_to(tmp_path):
    layer = mapped(tmp_path / "table")
    optimizer = RowAdam(layer)
    train(layer, optimizer, 1)
    layer(torch.randn(3, 32)).sum().backward()
    layer.values.close()
    others = [(tmp_path / f"other-{number}").open("w+b") for number in range(8)]  # with the numbers of its files
    for use in (optimizer.step, lambda: layer(torch.randn(3, 32)), layer.values.checkpoint, layer.values.fill):
        with pytest.raises(ValueError, match=r"the table in '.*table' was closed: open it anew"):
            use()
    layer.values.close()
    assert [os.fstat(one.fileno()).st_size for one in others] == [0] * 8
    for one in others:
        one.close()


def test_another_working_folder_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = mapped("table")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(layer, RowAdam(layer), 1)
    assert layer.values.checkpoint() == 1
    assert layer.values.folder == tmp_path / "table"


@pytest.mark.parametrize("std", [None, 0.0])  # fresh rows are written in the pass, or in the step
def test_a_process_that_was_forked_does_not_write(tmp_path, monkeypatch, std):
    layer = mapped(tmp_path, dataclasses.replace(CONFIG, value_std=std))
    optimizer = RowAdam(layer)
    train(layer, optimizer, 1)
    before = contents(layer)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(ValueError, match=r"is written by the process that opened it alone"):
        train(layer, optimizer, 1, seed=2)
    assert are_equal(contents(layer), before)


@pytest.mark.promise(
    "Tables in files",
    "Cast or move the model afterwards",
    "refused",
    "cast it first, then `add_memory(..., values=MappedFile(...))`",
)
@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.to("meta")])
def test_another_dtype_or_device_is_refused(tmp_path, change):
    layer = mapped(tmp_path)
    with pytest.raises(ValueError, match=r"stays on the CPU and in torch.float32"):
        change(layer.values)
    assert layer.float().to("cpu").values.weight.data_ptr() == layer.values._files.weight.tensor.data_ptr()


@pytest.mark.promise(
    "Tables in files", "`deepcopy` or pickle it", "refused", "copy the folder, and open the copy by `MappedFile`"
)
@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_copy_is_refused(tmp_path, make):
    with pytest.raises(TypeError, match=r"open the copy by MappedFile"):
        make(mapped(tmp_path).values)


@pytest.mark.promise(
    "Tables in files",
    "`state_dict` of a table with rows that were never written",
    "refused",
    "`table.fill()` writes them; `table.checkpoint()` copies nothing",
)
def test_a_state_dict_of_rows_that_are_not_there_is_refused(tmp_path):
    layer = mapped(tmp_path)
    expected = all_rows(layer)
    with pytest.raises(ValueError, match=r"call fill\(\) on it"):
        layer.state_dict()
    layer.values.fill()
    assert torch.equal(layer.state_dict()["values.weight"], expected)


def test_a_second_owner_of_the_files_is_refused(tmp_path):
    layer = mapped(tmp_path)
    with pytest.raises(ValueError, match=r"is open already, here or in another process"):
        mapped(tmp_path)
    layer.values.close()
    mapped(tmp_path)


def test_files_are_closed_with_the_last_reference(tmp_path):
    mapped(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    mapped(tmp_path)
    assert before == (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)


@pytest.mark.parametrize(
    ("config", "where", "words"),
    [
        (MemoryConfig(dim=32, topk=4, num_subkeys=8, query_dim=8), {}, "whose slots is 256, asked for 64"),
        (MemoryConfig(dim=16, topk=4, num_subkeys=16, query_dim=8), {}, "whose width is 32, asked for 16"),
        (CONFIG, {"dtype": torch.bfloat16}, "whose dtype is float32, asked for bfloat16"),
        (CONFIG, {"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16"),
        (CONFIG, {"device": "meta"}, "device must be the CPU"),
    ],
)
def test_a_table_of_another_kind_is_refused(tmp_path, config, where, words):
    mapped(tmp_path).values.close()
    with pytest.raises(ValueError, match=words):
        mapped(tmp_path, config, **where)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    mapped(tmp_path).values.close()
    os.truncate(tmp_path / "weight.rows", 1000)
    with pytest.raises(ValueError, match=r"is damaged: weight.rows has 1000 bytes of 32768"):
        mapped(tmp_path)


def test_states_stay_on_a_system_that_keeps_no_room_for_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr("memlayers.storage.rows.POPULATE_WRITE", 12_345)  # nor makes pages ready
    layer = mapped(tmp_path)
    train(layer, RowAdam(layer), 2)
    layer.values.checkpoint()
    expected = contents(layer)
    assert expected["steps"].any()
    layer.values.close()
    again = mapped(tmp_path)
    optimizer = RowAdam(again)
    assert are_equal(contents(again), expected)
    train(again, optimizer, 1)
    again.values.restore()
    assert are_equal(contents(again), expected)


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path):
    (tmp_path / "precious.rows").write_text("mine")
    with pytest.raises(ValueError, match=r"folder of a new table must be empty, got .* with 'precious.rows'"):
        mapped(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.rows"]


def test_a_folder_without_its_description_is_refused_and_stays(tmp_path):
    layer = mapped(tmp_path)
    train(layer, RowAdam(layer), 1)
    layer.values.checkpoint()
    layer.values.close()
    (tmp_path / "table.json").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"folder of a new table must be empty, got .* and no table.json"):
        mapped(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_table_that_was_killed_while_it_was_made_is_made_anew(tmp_path):
    (tmp_path / ".table.json.partial").write_text("{")
    with (tmp_path / "weight.rows").open("wb") as file:
        file.truncate(10**6)  # of another size
    layer = mapped(tmp_path)
    layer.values.checkpoint()
    layer.values.close()
    assert mapped(tmp_path).values.checkpoints == [1]


def test_states_of_an_optimizer_that_lives_are_not_dropped(tmp_path):
    layer = mapped(tmp_path)
    optimizer = RowAdam(layer)
    train(layer, optimizer, 1)
    with pytest.raises(ValueError, match=r"cannot be dropped: call its release\(\) first"):
        layer.values.drop_states()
    assert set(layer.values.held_states()) == {"exp_avg", "exp_avg_sq", "steps"}
    optimizer.release()
    layer.values.drop_states()


def test_states_are_dropped_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    layer = mapped(tmp_path)
    optimizer = RowAdam(layer)
    train(layer, optimizer, 1)
    optimizer.release()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            layer.values.drop_states()
    before = contents(layer)
    assert set(before) == {"rows", "exp_avg", "exp_avg_sq", "steps"}
    train(layer, RowAdam(layer), 1)
    assert not torch.equal(contents(layer)["exp_avg"], before["exp_avg"])


def test_states_of_another_optimizer_are_refused_and_can_be_dropped(tmp_path):
    layer = mapped(tmp_path)
    optimizer = RowAdam(layer)
    train(layer, optimizer, 1)
    optimizer.release()
    other = RowAdagrad(layer)
    with pytest.raises(ValueError, match=r"has the states exp_avg \(float32\).*call drop_states\(\)"):
        train(layer, other, 1)
    rows = all_rows(layer)
    layer.values.drop_states()
    assert torch.equal(all_rows(layer), rows)
    other.zero_grad()
    train(layer, other, 1)
    assert set(layer.values.held_states()) == {"square_sum"}
    assert sorted(path.name for path in tmp_path.glob("*.rows")) == ["square_sum.rows", "weight.rows"]


def test_the_states_of_tables_elsewhere_are_refused(tmp_path):
    layer = mapped(tmp_path)
    other = in_memory(layer)
    optimizers = [RowAdam(layer), RowAdam(other)]
    for one, optimizer in zip((layer, other), optimizers, strict=True):
        train(one, optimizer, 1)
    with pytest.raises(ValueError, match=r"must leave out the states of tables in files"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    with pytest.raises(ValueError, match=r"got that of an optimizer whose tables were in files"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    train(layer, optimizers[0], 1)
    train(other, optimizers[1], 1)
    assert torch.equal(all_rows(layer), other.values.weight)


def test_experts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"values must be None or a table for Experts"):
        mapped(tmp_path, kind=Experts)
    assert not list(tmp_path.iterdir())


def test_other_systems_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("memlayers.storage.rows.sys.platform", "win32")
    with pytest.raises(ValueError, match=r"need Linux or macOS, this is win32: keep the table in memory"):
        MappedFile(tmp_path)


def test_the_place_is_public():
    assert memlayers.MappedFile is MappedFile
    assert issubclass(MappedTable, memlayers.ValueTable)
