"""`DistributedDataParallel` and tables in row mode: what it is told, and what is refused in which words."""

import copy
import io
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlayers import MemoryConfig, MemoryLayer, load_memory, save_memory
from memlayers.distributed import shard_tables
from memlayers.models import add_memory, causal_lm, freeze_base, memory_layers
from memlayers.optim import MemoryAdamW, RowAdam


def net():
    torch.manual_seed(0)
    config = MemoryConfig(dim=6, heads=2, topk=2, num_subkeys=10, query_dim=4, query_norm="rms")
    first = MemoryLayer(config)
    return nn.Sequential(nn.Linear(6, 6), first, MemoryLayer(config, values=first.values), nn.Linear(6, 6))


NAMES = {"1.values.weight", "1.values.companion.row_mark", "2.values.weight", "2.values.companion.row_mark"}


def left_alone(model):
    """As DDP reads it; without those of a compiled model."""
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    return {name for name in names if "_orig_mod" not in name}


def test_a_table_in_row_mode_and_its_companion_are_left_alone_in_addition_to_others():
    model = net()
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    optimizer = MemoryAdamW(model)
    assert left_alone(model) == {*NAMES, "0.bias"}
    optimizer.release()
    assert left_alone(model) == {"0.bias"}
    RowAdam(model).release()
    again = RowAdam(model)
    assert left_alone(model) == {*NAMES, "0.bias"}
    del again


def test_a_copy_has_dense_gradients_and_nothing_is_left_alone():
    model = net()
    optimizer = MemoryAdamW(model)
    assert left_alone(copy.deepcopy(model)) == set()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert left_alone(torch.load(file, weights_only=False)) == set()
    del optimizer


def said(error, function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except error as caught:
        return str(caught)
    return None


def wrong_orders(rank):
    """What each kind of wrong order says."""
    x = torch.randn(3, 6)
    replica = DistributedDataParallel(net())
    answers = {"on the wrapper": said(ValueError, MemoryAdamW, replica)}
    assert said(ValueError, RowAdam, replica) == answers["on the wrapper"]
    assert replica.module[1].values.row_gradient is None
    for name, make in {
        "on the module inside": lambda replica: MemoryAdamW(replica.module),
        "on the table": lambda replica: RowAdam(replica.module[1].values),
    }.items():
        replica = DistributedDataParallel(net())
        optimizer = make(replica)
        answers[name] = said(RuntimeError, replica(x).square().mean().backward)
    model = net()
    optimizer = RowAdam([model[1].values])  # a list does not say which module will be wrapped
    replica = DistributedDataParallel(model)
    answers["on a list, before"] = said(RuntimeError, replica(x).square().mean().backward)
    del optimizer
    return answers


def with_gradients_of_a_wrapper(rank):
    """As DDP leaves them where it reduces the table and not its companion."""
    model = net()
    optimizer = RowAdam(model)
    model(torch.randn(3, 6)).square().mean().backward()
    table = model[1].values
    table.weight.grad = torch.zeros_like(table.weight)
    before = table.weight.detach().clone()
    message = said(RuntimeError, optimizer.step)
    assert torch.equal(before, table.weight)
    return message


def test_a_dense_gradient_beside_a_row_gradient_is_refused(pair):
    for message in pair(with_gradients_of_a_wrapper):
        assert "Build the optimizer first, on the module that is then wrapped" in message


@pytest.mark.promise(
    "Several processes",
    "`DistributedDataParallel` built before a row optimizer, or on another module than it",
    "refused",
    "`optimizer = MemoryAdamW(model)`, then `DistributedDataParallel(model)`",
)
def test_the_wrong_order_is_refused(pair):
    for answers in pair(wrong_orders):
        assert "model must not be wrapped in DistributedDataParallel yet" in answers.pop("on the wrapper")
        assert set(answers) == {"on the module inside", "on the table", "on a list, before"}
        for message in answers.values():
            assert "build the optimizer before it, on the module that it then wraps" in message


def rebuilt(rank):
    model = net()
    optimizer = MemoryAdamW(model)
    replica = DistributedDataParallel(model)
    for _ in range(2):
        replica(torch.randn(3, 6) + rank).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.release()
        optimizer = MemoryAdamW(replica)  # which was told of these tables when it was built
    return model[1].values.weight.detach()


def test_another_optimizer_may_follow_on_the_same_wrapper(pair):
    one, other = pair(rebuilt)
    assert torch.equal(one, other)


def compiled_before(rank):
    model = net()
    optimizer = MemoryAdamW(model)
    replica = DistributedDataParallel(torch.compile(model, backend="eager"))
    replica(torch.randn(3, 6) + rank).square().mean().backward()
    optimizer.step()
    return model[1].values.weight.detach()


@pytest.mark.slow
def test_a_model_may_be_compiled_before_it_is_wrapped(pair):
    one, other = pair(compiled_before)
    assert torch.equal(one, other)


def under_fsdp(rank):
    """The base is sharded, the tables are replicas; or FSDP has taken the tables, too."""
    # Here: its import takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    refused = said(ValueError, MemoryAdamW, fully_shard(net(), mesh=mesh))
    model = net()
    table = model[1].values
    optimizer = RowAdam(table, lr=0.1)
    fully_shard(model, mesh=mesh, ignored_params={table.weight, table.row_mark})
    dense = torch.optim.AdamW([one for one in model.parameters() if one not in {table.weight, table.row_mark}], lr=0.01)
    for step in range(3):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2 * step + rank))
        (model(x).square().mean()).backward()
        dense.step()
        optimizer.step()
        dense.zero_grad()
        optimizer.zero_grad()
    return refused, table.weight.detach().clone(), model[0].weight.full_tensor().detach()


@pytest.mark.promise(
    "Several processes",
    "FSDP2 (`fully_shard`) around a model with replicas of its tables",
    "supported",
    "`fully_shard(model, ignored_params={table.weight, table.row_mark})`; tables that it has sharded are refused",
)
def test_fsdp_shards_the_rest_and_leaves_tables_to_their_optimizer(pair):
    (refused, table, linear), (_, other_table, _) = pair(under_fsdp)
    assert "must be whole, got a DTensor: keep FSDP from sharding it" in refused
    assert torch.equal(table, other_table)
    model = net()
    rows, dense = (
        RowAdam(model, lr=0.1),
        torch.optim.AdamW([one for name, one in model.named_parameters() if "values" not in name], lr=0.01),
    )
    for step in range(3):
        for rank in range(2):
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2 * step + rank))
            (model(x).square().mean() / 2).backward()
        for optimizer in (dense, rows):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(table, model[1].values.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear, model[0].weight.detach(), rtol=1e-4, atol=1e-5)


MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8, query_norm="rms")
IDS = torch.arange(24).view(2, 12)


def base_model():
    torch.manual_seed(0)
    return causal_lm("llama", vocab_size=40, layers=2, dim=16, heads=2, context=32)


def saved_under_fsdp(rank, folder, how):
    """What the memory answers, or what a save says, in a model whose other weights FSDP has sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = add_memory(base_model(), MEMORY, [2], mode="parallel")
    (memory,) = memory_layers(model).values()
    if how == "columns":
        shard_tables(model, mesh)
    if how != "trained base":
        freeze_base(model)
    ignored = {memory.values.weight, memory.values.row_mark}
    for part in (memory, *model.model.layers, model):
        fully_shard(part, mesh=mesh, ignored_params=ignored)
    optimizer = MemoryAdamW(model, lr=0.1, value_lr=0.1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # of the memory
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    message = said(ValueError, save_memory, model, folder)
    with torch.no_grad():
        return message, model(IDS).logits


@pytest.mark.promise(
    "Several processes",
    "`save_memory` of a model that FSDP2 (`fully_shard`) has sharded",
    "supported",
    "all ranks call it, and the first one writes; the base must have been frozen",
)
@pytest.mark.parametrize("how", ["replicas", "columns"])
def test_a_memory_is_saved_from_a_model_that_fsdp_has_sharded(pair, tmp_path, how):
    for message, expected in pair(saved_under_fsdp, tmp_path / "saved", how):
        assert message is None
        model = load_memory(base_model(), tmp_path / "saved")
        assert type(*memory_layers(model).values()) is MemoryLayer
        torch.testing.assert_close(model(IDS).logits, expected)
        assert not torch.allclose(expected, base_model()(IDS).logits, atol=1e-2)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["MemoryLlamaForCausalLM"]


def test_a_base_that_was_trained_under_fsdp_is_not_left_out_of_a_save(pair, tmp_path):
    for message, _ in pair(saved_under_fsdp, tmp_path / "saved", "trained base"):
        assert (
            "must have a base that was frozen (freeze_base) before FSDP sharded it, got model.embed_tokens" in message
        )
        assert "full_state_dict=True" in message
    assert not (tmp_path / "saved").exists()
