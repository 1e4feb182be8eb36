import copy

import pytest
import torch
from torch import nn

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus, RowAdam, ValueTable
from memlayers.minimal import MinimalMemory


def config(**fields):
    return MemoryConfig(**{"dim": 12, "heads": 3, "topk": 4, "num_subkeys": 6, "query_dim": 8, **fields})


def as_minimal(layer):
    """The one-page layer with the weights of ours."""
    c = layer.config
    minimal = MinimalMemory(c.dim, c.heads, c.topk, c.num_subkeys, c.query_dim).to(layer.keys.weight.dtype)
    with torch.no_grad():
        minimal.query.load_state_dict(layer.query.projections[0].state_dict())
        minimal.norm.weight.copy_(layer.query.norm.weight.flatten())
        minimal.norm.bias.copy_(layer.query.norm.bias.flatten())
        minimal.keys.copy_(layer.keys.weight)
        minimal.values.copy_(layer.values.weight)
    return minimal


@pytest.mark.parametrize(
    "fields",
    [{}, {"heads": 1}, {"topk": 1}, {"topk": 6}, {"num_subkeys": 2, "topk": 2}, {"num_subkeys": 37, "query_dim": 2}],
    ids=str,
)
def test_the_layer_is_the_one_page_layer(fields):
    layer = MemoryLayer(config(**fields), dtype=torch.float64)
    minimal = as_minimal(layer)
    for training in (True, False):
        layer.train(training), minimal.train(training)
        x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
        x2 = x.detach().flatten(0, 1).requires_grad_()
        y, y2 = layer(x), minimal(x2)
        torch.testing.assert_close(y.flatten(0, 1), y2)
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(
            y, [x, layer.values.weight, layer.keys.weight, layer.query.projections[0].weight], grad
        )
        theirs = torch.autograd.grad(y2, [x2, minimal.values, minimal.keys, minimal.query.weight], grad.flatten(0, 1))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.flatten(), b.flatten())


OPTIONS = {
    "product": {},
    "flat": {"keys": "flat"},
    "rms": {"query_norm": "rms"},
    "no norm": {"query_norm": "none"},
    "no bias": {"query_bias": False},
    "mlp": {"query_hidden": (7, 9)},
    "narrow values": {"value_dim": 5},
    "dropouts": {"input_dropout": 0.1, "query_dropout": 0.1, "value_dropout": 0.1},
}


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(fields):
    layer = MemoryLayer(config(**fields))
    layer(torch.randn(4, 5, 12)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() != name.endswith("row_mark"), name


@pytest.mark.parametrize("fields", [f for name, f in OPTIONS.items() if name != "dropouts"], ids=lambda f: str(f))
def test_gradcheck(fields):
    layer = MemoryLayer(config(dim=4, heads=2, topk=2, num_subkeys=3, query_dim=4, **fields), dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("keys", ["product", "flat"])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_shape(lead, keys):
    layer = MemoryLayer(config(keys=keys, num_subkeys=8, topk=3)).eval()
    x = torch.randn(*lead, 12)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 12), layer(x.reshape(-1, 12)))


@pytest.mark.parametrize("name", ["input_dropout", "query_dropout", "value_dropout"])
def test_a_dropout_acts_in_training_only(name):
    layer = MemoryLayer(config(query_norm="none", **{name: 0.5}))
    x = torch.randn(6, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    if name == "value_dropout":
        y, dropped = layer(x), layer.train()(x)
        torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, 2 * y))


def test_permuting_slots_of_keys_and_values_together_changes_nothing():
    layer = MemoryLayer(config(keys="flat")).eval()
    x = torch.randn(9, 12)
    permuted = copy.deepcopy(layer)
    order = torch.randperm(36)
    with torch.no_grad():
        permuted.keys.weight.copy_(layer.keys.weight[:, order])
        permuted.values.weight.copy_(layer.values.weight[order])
    torch.testing.assert_close(permuted(x), layer(x))


def test_a_shared_table_sums_the_gradients_of_both_layers():
    first = MemoryLayer(config())
    second = MemoryLayer(config(heads=2, topk=3), values=first.values)
    assert second.values is first.values
    x = torch.randn(5, 12)
    alone = [torch.autograd.grad(layer(x).sum(), first.values.weight)[0] for layer in (first, second)]
    (first(x) + second(x)).sum().backward()
    torch.testing.assert_close(first.values.weight.grad, alone[0] + alone[1])
    kept = first.values.weight.clone()
    second.reset_parameters()
    assert torch.equal(first.values.weight, kept), "the table belongs to the layer that made it"


def test_a_shared_table_in_row_mode_trains_as_in_dense_mode():
    torch.manual_seed(1)
    layers = nn.ModuleList([MemoryLayer(config())])
    layers.append(MemoryLayer(config(heads=2, topk=3), values=layers[0].values))
    twin = copy.deepcopy(layers)
    x = torch.randn(50, 12)
    optimizer = RowAdam(layers, lr=0.1)
    dense = torch.optim.Adam([twin[0].values.weight], lr=0.1)
    for step, model in ((optimizer, layers), (dense, twin)):
        sum(layer(x) for layer in model).square().sum().backward()
        step.step()
    torch.testing.assert_close(layers[0].values.weight, twin[0].values.weight)


def test_a_table_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match="values must be a table of 36 slots of width 12, got 36 x 10"):
        MemoryLayer(config(), values=ValueTable(36, 10))


def test_a_wrong_width_or_mask_is_an_error():
    layer = MemoryLayer(config())
    with pytest.raises(ValueError, match=r"dim = 12 .* got \[3, 11\]"):
        layer(torch.randn(3, 11))
    with pytest.raises(ValueError, match=r"dim = 12 .* got \[\]"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"mask .* \[2, 3\], got \[2, 4\]"):
        layer(torch.randn(2, 3, 12), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"mask .* \[2, 3\], got \[3, 2\]"):
        layer(torch.randn(2, 3, 12), torch.ones(3, 2))
    for dtype in (torch.float32, torch.int64, torch.int16):
        with pytest.raises(ValueError, match="mask must be True or 1 for real tokens .*, got one with numbers below 0"):
            layer(torch.randn(2, 3, 12), torch.tensor([[0, 0, -10000], [0, 0, 0]], dtype=dtype))


@pytest.mark.parametrize("query_norm", ["batch", "rms"])
def test_padding_trains_no_row_whatever_it_holds(query_norm):
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    results = []
    for fill in (1.0, torch.nan, None):
        torch.manual_seed(0)
        layer = MemoryLayer(config(num_subkeys=16, query_norm=query_norm))
        optimizers = [RowAdam(layer, lr=0.1), torch.optim.SGD(layer.query.parameters(), lr=0.1)]
        for _ in range(4):
            x = torch.randn(2, 5, 12)
            if fill is None:
                y = layer(x[mask == 1])
            else:
                y = layer(torch.where(mask[..., None] == 1, x, fill), mask)[mask == 1]
            y.square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append({**layer.state_dict(), **optimizers[0].state[layer.values.weight]})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        torch.testing.assert_close(value, results[2][name], msg=name)


def test_padding_changes_neither_real_tokens_nor_statistics():
    layers = [MemoryLayer(config()) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    other = torch.where(mask[..., None] == 1, x, 100.0)
    outputs = [layer(values, mask)[mask == 1] for layer, values in zip(layers, (x, other), strict=True)]
    assert torch.equal(*outputs)
    assert torch.equal(layers[0].query.norm.running_mean, layers[1].query.norm.running_mean)


def test_a_mask_has_the_leading_shape_of_the_input():
    layer = MemoryLayer(config(query_norm="batch"))
    x, mask = torch.randn(2, 5, 12), torch.ones(2, 5)
    mask[0, 2:] = 0
    assert torch.equal(layer(x.view(10, 12), mask.view(10)), layer(x, mask).view(10, 12))
    for wrong in (x[:, :4], x.view(10, 12), x.transpose(0, 1)):
        with pytest.raises(ValueError, match=r"mask must have the leading shape of x, \[.*\], got \[2, 5\]"):
            layer(wrong, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_layers_stay_near_float32(dtype):
    wide = MemoryLayer(config(query_norm="rms", value_dim=5))
    narrow = MemoryLayer(config(query_norm="rms", value_dim=5), dtype=dtype)
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(20, 12).to(dtype)
    y = narrow(x)
    assert y.dtype == dtype
    # Rounded scores swap near-ties, so most tokens agree, not all.
    near = (y.float() - wide(x.float())).abs().amax(-1) < 0.05
    assert near.float().mean() > 0.7


@pytest.mark.parametrize("name", OPTIONS)
def test_autocast(name):
    layer = MemoryLayer(config(**OPTIONS[name]))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(6, 12))
    y.sum().backward()
    assert layer.values.weight.grad.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_meta_device_then_materialised(name):
    layer = MemoryLayer(config(**OPTIONS[name]), device="meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.randn(3, 12, device="meta")).is_meta
    assert layer(torch.randn(3, 12, device="meta"), torch.ones(3, device="meta")).is_meta
    torch.manual_seed(0)
    layer.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(0)
    expected = MemoryLayer(config(**OPTIONS[name]))
    torch.manual_seed(0)
    expected.reset_parameters()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[key], tensor), key


def test_dtype_and_device_reach_every_parameter():
    layer = MemoryLayer(config(value_dim=5), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["dense", "row"])
@pytest.mark.parametrize("name", ["product", "flat", "rms", "narrow values"])
def test_compiled_in_one_graph_it_gives_the_same_outputs_and_gradients(name, mode):
    layer = MemoryLayer(config(**OPTIONS[name]))
    twin = copy.deepcopy(layer)
    owners = [RowAdam(model.values.modules()) for model in (layer, twin)] if mode == "row" else []
    x, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results = []
        for model, function in ((layer, layer), (twin, compiled)):
            y = function(x, mask)
            y.square().sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            if owners:
                assert model.values.weight.grad is None
                gradients["rows"] = model.values.row_gradient.summed().grad_PV
            results.append((y, gradients, model.query.norm.state_dict()))
        torch.testing.assert_close(*results)


@pytest.mark.slow
def test_inductor_gives_the_same_outputs_and_gradients():
    layer = MemoryLayer(config())
    twin = copy.deepcopy(layer)
    owner = RowAdam(twin)
    x = torch.randn(2, 5, 12)
    y, y2 = layer(x), torch.compile(twin, fullgraph=True)(x)
    torch.testing.assert_close(y, y2)
    y.square().sum().backward()
    y2.square().sum().backward()
    rows = twin.values.row_gradient.summed()
    dense = torch.zeros_like(layer.values.weight).index_add_(
        0, torch.arange(36) if rows.rows_P is None else rows.rows_P, rows.grad_PV
    )
    torch.testing.assert_close(dense, layer.values.weight.grad)
    assert owner is not None


def test_initialisation_is_the_paper_s():
    layer = MemoryLayer(config(dim=256, num_subkeys=64, query_dim=32, value_dim=64))
    assert layer.values.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert layer.keys.weight.abs().max() <= 1 / 4
    assert layer.query.projections[0].weight.abs().max() <= 1 / 16


@pytest.mark.parametrize("kind", [MemoryLayer, MemoryPlus, Experts])
def test_values_that_say_nothing_at_first_are_written_where_they_are_read(kind):
    torch.manual_seed(0)
    layer = kind(MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=8, query_dim=8, value_std=0.0))
    x_TD = torch.randn(20, 16)
    assert not layer(x_TD).any()
    optimizer = RowAdam([layer.values], lr=0.1)
    layer(x_TD).sum().backward()
    optimizer.step()
    written = layer.values.weight.any(1)
    assert written.any()
    assert not written.all()
    assert layer(x_TD).any()
    layer.reset_parameters()
    assert not layer.values.weight.any()
