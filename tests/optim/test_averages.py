"""Copies and averages of a model, made before and after its optimizer: walked side by side, no parameter is one off."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from memlayers import MemoryConfig, MemoryLayer, RowAdam, ValueTable
from memlayers.optim import MemoryAdamW


def net():
    torch.manual_seed(0)
    config = MemoryConfig(dim=8, heads=2, topk=2, num_subkeys=4, query_dim=4, query_norm="rms")
    return nn.Sequential(nn.Linear(8, 8), MemoryLayer(config), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


def step(model, optimizer):
    model(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Zip:
    """A target network, by a loop over both lists of parameters."""

    def __init__(self, model, trainable=False):
        self.model = copy.deepcopy(model)
        self.choose = (
            (lambda one: [p for p in one.parameters() if p.requires_grad]) if trainable else nn.Module.parameters
        )

    @torch.no_grad()
    def update(self, model):
        for kept, new in zip(self.choose(self.model), self.choose(model), strict=True):
            kept.lerp_(new, 0.5)


class Averaged:
    """What torch has for averages."""

    def __init__(self, model, **settings):
        self.averaged = AveragedModel(model, **settings)
        self.model = self.averaged.module

    def update(self, model):
        self.averaged.update_parameters(model)


class EmaPytorch:
    """The package ema-pytorch."""

    def __init__(self, model):
        ema = pytest.importorskip("ema_pytorch").EMA
        self.ema = ema(model, beta=0.5, update_after_step=0, update_every=1, include_online_model=False)
        self.ema.update()  # the first only copies
        self.model = self.ema.ema_model

    def update(self, model):
        self.ema.update()


class Shadow:
    """Averages by names, over those that are trained."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in self.model.named_parameters():
            parameter.lerp_(trained[name], 0.5)


TOOLS = {
    "zip of parameters": Zip,
    "zip of trainable parameters": partial(Zip, trainable=True),
    "AveragedModel": Averaged,
    "AveragedModel, exponential": partial(Averaged, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "AveragedModel, buffers": partial(Averaged, use_buffers=True),
    "ema-pytorch": EmaPytorch,
    "by name": Shadow,
}


@pytest.mark.promise(
    "Averages and copies", "a copy, an EMA or a target network made before or after the optimizer: `AveragedModel`, "
    "`ema-pytorch`, a loop over `parameters()`", "supported", "",
)  # fmt: skip
@pytest.mark.parametrize("before", [True, False], ids=["before the optimizer", "after it"])
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_an_average_pairs_each_parameter_with_its_own(tool, before):
    model = net()
    tools = [tool(model)] if before else []
    optimizer = MemoryAdamW(model, lr=0.1, value_lr=0.1)
    tools += [] if before else [tool(model)]
    for _ in range(3):
        step(model, optimizer)
        tools[0].update(model)
    current, start = dict(model.named_parameters()), dict(net().named_parameters())
    for name, kept in tools[0].model.named_parameters():
        if name.endswith("row_mark"):
            assert kept.tolist() == [0.0]
            continue
        # Each lies within the box of start and end, stretched a little: another one's values would not.
        moved = (current[name] - start[name]).abs().max()
        assert moved > 0, name
        assert (kept - start[name]).abs().max() <= 1.5 * moved, name
    assert (tools[0].model[2].weight - 1).abs().max() < 0.5


def lightning_module(lightning):
    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = net()

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return MemoryAdamW(self.model, lr=0.05, value_lr=0.05)

    return Lit()


@pytest.mark.promise(
    "Averages and copies", "Lightning's `EMAWeightAveraging`, `StochasticWeightAveraging`", "supported", ""
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_lightning_s_averages_of_a_model_in_row_mode(kind, tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch import callbacks

    callback = {
        "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(decay=0.5),
        "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    }[kind]()
    module = lightning_module(lightning)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4))
    assert (module.model[2].weight - 1).abs().max() < 0.5
    assert (module.model[2].weight - 1).abs().max() > 0
    assert (module.model[1].values.weight != net()[1].values.weight).any()


# The list of parameters.


def listed(model):
    return [(name, parameter.requires_grad, parameter.shape) for name, parameter in model.named_parameters()]


def test_the_list_of_parameters_does_not_depend_on_the_optimizer():
    model = net()
    plain, before = listed(model), [id(parameter) for parameter in model.parameters()]
    optimizer = MemoryAdamW(model)
    assert listed(model) == plain
    step(model, optimizer)
    assert listed(model) == listed(copy.deepcopy(model)) == plain
    optimizer.release()
    assert listed(model) == plain
    assert [id(parameter) for parameter in model.parameters()] == before


def test_a_dense_optimizer_over_all_parameters_leaves_the_companion_at_zero():
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad):
        model = net()
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            step(model, optimizer)
        assert model[1].values.row_mark.tolist() == [0.0]


def test_dense_mode_trains_under_ddp_without_looking_for_unused_parameters(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        model, alone = nn.parallel.DistributedDataParallel(net()), net()
        for one in (model, alone):
            torch.manual_seed(1)
            for _ in range(2):  # the second pass waits for what the first did not use
                one(torch.randn(5, 8)).sum().backward()
        torch.testing.assert_close(model.module[1].values.weight.grad, alone[1].values.weight.grad)
    finally:
        torch.distributed.destroy_process_group()


# Where the companion may be left behind by those who do not know it.


def built_on_meta():
    with torch.device("meta"):
        return ValueTable(4, 2, dtype=torch.bfloat16)


def assigned():
    table = built_on_meta()
    table.load_state_dict({"weight": torch.ones(4, 2, dtype=torch.bfloat16)}, assign=True)
    return table


def emptied():
    table = built_on_meta().to_empty(device="cpu")
    nn.init.ones_(table.weight)
    return table


def set_by_hand():
    table = built_on_meta()
    table.weight = nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16))
    return table


def moved_while_empty():
    table = built_on_meta().to("meta").float()
    table.weight = nn.Parameter(torch.ones(4, 2))
    return table


@pytest.mark.parametrize("make", [assigned, emptied, set_by_hand, moved_while_empty])
@pytest.mark.parametrize("rows", [True, False])
def test_the_companion_is_with_the_table_however_the_table_was_filled(make, rows):
    table = make()
    optimizer = RowAdam([table], lr=0.1) if rows else torch.optim.Adam([table.weight], lr=0.1)
    table.read(torch.tensor([[0, 1]]), torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert table.row_mark.device == table.weight.device
    assert table.row_mark.dtype == table.weight.dtype
    assert table.row_mark.tolist() == [0.0]
    assert (table.weight != 1).any(1).tolist() == [True, True, False, False]


def test_a_table_without_storage_runs_forward_and_backward():
    table = built_on_meta()
    table.read(torch.zeros(1, 2, dtype=torch.int64, device="meta"), torch.ones(1, 2, device="meta")).sum().backward()
    assert table.weight.grad.is_meta


def test_offloading_by_accelerate_finds_no_tensor_that_is_not_in_the_state_dict():
    from accelerate import cpu_offload

    model = net().eval()
    x = torch.randn(5, 8)
    expected = model(x).detach()
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(x).detach(), expected)
