"""Checkpoints of tables in columns: by as many ranks as there are, into as many as there will be, or whole tables."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from memlayers import MemoryConfig, MemoryLayer
from memlayers.distributed import shard_tables
from memlayers.optim import MemoryAdamW
from memlayers.values import value_tables

WIDTH = 64
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")


def net(seed=0, width=WIDTH):
    torch.manual_seed(seed)
    config = MemoryConfig(dim=width, heads=2, topk=2, num_subkeys=10, query_dim=4, query_norm="rms")
    return nn.Sequential(nn.Linear(width, width), MemoryLayer(config)).double()


def built(size, seed=0, replicas=1):
    """The model and its optimizer; size: of the mesh, 0 for whole tables."""
    model = net(seed)
    if size:
        from torch.distributed.device_mesh import init_device_mesh  # here: its import takes a second

        shard_tables(model, init_device_mesh("cpu", (size,) if replicas == 1 else (replicas, size)))
    return model, MemoryAdamW(model, lr=1e-2, value_lr=0.05)


def train(model, optimizer, rank, size, first, last):
    """The same batch of 12 tokens, divided among the ranks; the losses of all."""
    losses = []
    for step in range(first, last):
        x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        share = x.tensor_split(size)[rank]
        loss = model(share).square().sum() / 12
        (loss * size).backward()
        loss = loss.detach()
        if size > 1:
            for parameter in [*model[0].parameters(), *model[1].query.parameters(), *model[1].keys.parameters()]:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= size
            torch.distributed.all_reduce(loss)
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def saved_by(rank, size, mesh_size, folder, replicas=1, last=8):
    model, optimizer = built(mesh_size, replicas=replicas)
    train(model, optimizer, rank, size, 0, 3)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return train(model, optimizer, rank, size, 3, last)


def loaded_by(rank, size, mesh_size, folder, replicas=1, last=8):
    model, optimizer = built(mesh_size, seed=5, replicas=replicas)
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    losses = train(model, optimizer, rank, size, 3, last)
    steps = optimizer.state[model[1].values.weight]["steps"]
    assert type(steps) is torch.Tensor
    assert steps.dtype == torch.int32
    return losses


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def bytes_in(folder):
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


@pytest.mark.promise(
    "Several processes",
    "`torch.distributed.checkpoint` of tables in columns",
    "supported",
    "saved by some ranks, loaded by any other number of them, into whole tables and back",
)
def test_two_ranks_go_on_from_columns_and_from_whole_tables(pair, tmp_path):
    columns, whole = str(tmp_path / "columns"), str(tmp_path / "whole")
    went_on, _ = pair(saved_by, 2, 2, columns)
    pair(saved_by, 2, 0, whole)
    assert torch.equal(went_on, pair(loaded_by, 2, 2, columns)[0])  # bit for bit
    close(pair(loaded_by, 2, 0, columns)[0], went_on)
    close(pair(loaded_by, 2, 2, whole)[0], went_on)
    close(loaded_by(0, 1, 0, columns), went_on)
    assert abs(bytes_in(columns) - bytes_in(whole)) < 100 * WIDTH * 8  # the table is there once


@pytest.mark.slow
def test_four_ranks_save_and_other_numbers_of_ranks_load(tmp_path, start_ranks):
    folders = {"4": (4, 1), "2 x 2": (2, 2)}
    went_on = {}
    (tmp_path / "4").mkdir()
    with start_ranks(tmp_path / "4", 4) as call:
        for name, (columns, replicas) in folders.items():
            went_on[name] = call(saved_by, 4, columns, str(tmp_path / name), replicas, 23)[0]
            again = call(loaded_by, 4, columns, str(tmp_path / name), replicas, 23)[0]
            assert torch.equal(went_on[name], again)
    for size in (2, 3):  # 64 columns do not divide by 3
        (tmp_path / f"by {size}").mkdir()
        with start_ranks(tmp_path / f"by {size}", size) as call:
            for name in folders:
                close(call(loaded_by, size, size, str(tmp_path / name), 1, 23)[0], went_on[name])
    for name in folders:
        close(loaded_by(0, 1, 0, str(tmp_path / name), last=23), went_on[name])
    assert abs(bytes_in(tmp_path / "2 x 2") - bytes_in(tmp_path / "4")) < 100 * WIDTH * 8


def base():
    from transformers import GPT2Config, GPT2LMHeadModel  # here: their import takes seconds

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0)
    )


def with_memories():
    from memlayers.models import add_memory, freeze_base

    config = MemoryConfig(dim=32, heads=2, topk=2, num_subkeys=30, query_dim=4, query_norm="rms")
    return freeze_base(add_memory(base(), config, layers=[1, 2], share_values=True))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made, but for views, and for what is mapped to a file."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(one.alias_info is not None for one in func._schema.returns):
            return result
        for one in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(one) and not hasattr(one, "placements") and not one.is_meta:
                is_mapped = one.untyped_storage().filename is not None
                self.most = max(self.most, 0 if is_mapped else one.numel())
        return result


def saved_to_folders(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    from memlayers.distributed import whole
    from memlayers.models import save_memory

    model = shard_tables(with_memories(), init_device_mesh("cpu", (2,)))
    optimizer = MemoryAdamW(model, value_lr=0.1)
    ids = torch.arange(6).view(1, 6) + rank
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    whole.CHUNK_ELEMENTS = 1000
    with Largest() as largest:
        save_memory(model, Path(folder, "memory"))
    model.save_pretrained(Path(folder, "model"))
    with torch.no_grad():
        return model.eval()(torch.arange(6).view(1, 6)).logits, largest.most


def loaded_from_folder(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    from memlayers.models import load_memory, storage

    model = base()
    storage.CHUNK = 4000
    with Largest() as largest:
        load_memory(model, Path(folder, "memory"), mesh=init_device_mesh("cpu", (2,)))
    optimizer = MemoryAdamW(model)
    assert set(model._ddp_params_and_buffers_to_ignore) >= {
        f"transformer.h.0.mlp.memory.values.{name}" for name in ("weight", "companion.row_mark")
    }
    del optimizer
    with torch.no_grad():
        return model.eval()(torch.arange(6).view(1, 6)).logits, largest.most


def test_folders_are_written_by_the_first_rank_and_read_by_one_process_or_into_columns(pair, tmp_path):
    from memlayers.models import MemoryGPT2LMHeadModel, load_memory

    (logits, most), (_, other_most) = pair(saved_to_folders, str(tmp_path))
    assert max(most, other_most) <= 900 * 16  # where the table is 900 x 32
    assert not list(tmp_path.rglob(".*"))
    one = load_memory(base(), tmp_path / "memory")
    other = MemoryGPT2LMHeadModel.from_pretrained(tmp_path / "model")
    for model in (one, other):
        torch.testing.assert_close(model.eval()(torch.arange(6).view(1, 6)).logits, logits)
    weight = one.transformer.h[1].mlp.memory.values.weight
    assert torch.equal(weight, other.transformer.h[0].mlp.memory.values.weight)
    assert other.transformer.h[0].mlp.memory.values is other.transformer.h[1].mlp.memory.values
    for found, its_most in pair(loaded_from_folder, str(tmp_path)):
        torch.testing.assert_close(found, logits)
        assert its_most == 900 * 16


def failing_save(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    from memlayers.distributed.whole import whole_tables

    model = shard_tables(net(), init_device_mesh("cpu", (2,)))
    try:
        with whole_tables(value_tables(model), folder) as whole:
            if whole is not None:
                raise OSError("the disk is full")
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_a_save_that_fails_fails_on_all_ranks(pair, tmp_path):
    one, other = pair(failing_save, str(tmp_path))
    assert one == "OSError: the disk is full"
    assert other == "RuntimeError: the rank that writes has failed: OSError: the disk is full"
    (tmp_path / "file").write_text("")
    one, other = pair(failing_save, str(tmp_path / "file"))  # which is no folder
    assert one.startswith("FileExistsError")
    assert "the rank that writes has failed: FileExistsError" in other


def sharing(size, seed=0):
    """Two memories with one table, and their optimizer."""
    torch.manual_seed(seed)
    config = MemoryConfig(dim=WIDTH, heads=2, topk=2, num_subkeys=10, query_dim=4, query_norm="rms")
    first = MemoryLayer(config)
    model = nn.Sequential(first, MemoryLayer(config, values=first.values)).double()
    if size:
        from torch.distributed.device_mesh import init_device_mesh  # here: its import takes a second

        shard_tables(model, init_device_mesh("cpu", (size,)))
    return model, MemoryAdamW(model, lr=0.0, value_lr=0.05, weight_decay=0.0)


def steps_of_shared(model, optimizer, rank, size, first, last):
    outputs = []
    for step in range(first, last):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        y = model(x.tensor_split(size)[rank])
        (y.square().sum() * size).backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(y.detach())
    return torch.stack(outputs)


def shared_saved(rank, size, mesh_size, folder):
    model, optimizer = sharing(mesh_size)
    steps_of_shared(model, optimizer, rank, size, 0, 3)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return steps_of_shared(model, optimizer, rank, size, 3, 6)


def shared_loaded(rank, size, mesh_size, folder):
    model, optimizer = sharing(mesh_size, seed=5)
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert model[0].values is model[1].values
    return steps_of_shared(model, optimizer, rank, size, 3, 6)


def test_a_table_that_two_memories_share_goes_on_from_columns_and_from_a_whole_table(pair, tmp_path):
    columns, whole = str(tmp_path / "columns"), str(tmp_path / "whole")
    went_on = pair(shared_saved, 2, 2, columns)
    pair(shared_saved, 2, 0, whole)
    again = pair(shared_loaded, 2, 2, columns)
    assert all(torch.equal(*both) for both in zip(again, went_on, strict=True))
    for folder, mesh_size in ((columns, 0), (whole, 2)):
        for one, other in zip(pair(shared_loaded, 2, mesh_size, folder), went_on, strict=True):
            close(one, other)
