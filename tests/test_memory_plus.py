import copy
import math
import pickle

import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryPlus, NormalisedKeys, RowAdam, UsageMeter


def config(**fields):
    sizes = {"dim": 13, "value_dim": 7, "heads": 3, "topk": 5, "num_subkeys": 7, "query_dim": 10}
    return MemoryConfig(**{**sizes, "query_norm": "none", **fields})


def all_scores(keys, query_THQ):
    """[T, H, S] in float64: the cosine with the key of every slot over the temperature, from the definition."""
    first_HNC, second_HNC = keys.weight.double()
    num_subkeys = first_HNC.shape[1]
    first_HNC = first_HNC / first_HNC.norm(dim=-1, keepdim=True)
    second_HNC = second_HNC / second_HNC.norm(dim=-1, keepdim=True)
    key_HSQ = torch.cat(
        [first_HNC.repeat_interleave(num_subkeys, dim=1), second_HNC.repeat(1, num_subkeys, 1)], dim=-1
    ) / math.sqrt(2)
    cosine_THS = torch.einsum("thq,hsq->ths", query_THQ.double(), key_HSQ) / query_THQ.double().norm(dim=-1)[..., None]
    return cosine_THS / keys.log_temperature.double().exp()[:, None]


def reference(layer, x_TD):
    """The layer in float64, all S keys scored, in plain PyTorch."""
    c, x_TD = layer.config, x_TD.double()
    linear = layer.query.projections[0]
    query_TF = x_TD @ linear.weight.double().T + linear.bias.double()
    if c.query_norm == "batch":
        query_TF = (query_TF - query_TF.mean(0)) / (query_TF.var(0, correction=0) + 1e-5).sqrt()
    scores_THS = all_scores(layer.keys, query_TF.view(-1, c.heads, c.query_dim))
    scores_THK, slots_THK = scores_THS.topk(c.topk)
    rows_THKV = layer.values.weight.double()[slots_THK]
    y_TV = (scores_THK.softmax(-1)[..., None] * rows_THKV).sum((1, 2))
    gate_TV = x_TD @ layer.gate.weight.double().T
    return (y_TV * gate_TV / (1 + torch.exp(-gate_TV))) @ layer.output.weight.double().T


OPTIONS = {
    "odd sizes": {},
    "batch norm": {"query_norm": "batch"},
    "as wide as the model": {"value_dim": None},
    "one head": {"heads": 1},
    "all sub-keys": {"topk": 7},
    "many sub-keys": {"num_subkeys": 37, "query_dim": 4},
}


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_equation(fields, dtype):
    layer = MemoryPlus(config(**fields), dtype=dtype)
    nn.init.normal_(layer.keys.log_temperature, mean=-1.0)
    x = torch.randn(4, 5, 13, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.flatten(0, 1), reference(layer, x.flatten(0, 1)).to(dtype))
    if layer.config.query_norm == "none":
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), y)


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(fields):
    layer = MemoryPlus(config(**fields))
    layer(torch.randn(4, 5, 13)).square().sum().backward()
    names = {name for name, _ in layer.named_parameters()}
    assert {"gate.weight", "output.weight", "keys.log_temperature", "values.weight"} < names
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() != name.endswith("row_mark"), name
    assert layer.keys.log_temperature.grad.all()


@pytest.mark.parametrize("query_norm", ["none", "batch", "rms"])
def test_gradcheck(query_norm):
    small = MemoryConfig(dim=3, value_dim=2, heads=2, topk=2, num_subkeys=3, query_dim=4, query_norm=query_norm)
    layer = MemoryPlus(small, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_flat_keys_are_an_error():
    with pytest.raises(ValueError, match="keys must be 'product' for MemoryPlus, got 'flat'"):
        MemoryPlus(config(keys="flat"))


def test_layers_share_one_table_and_keep_the_rest_to_themselves():
    first = MemoryPlus(config())
    second = MemoryPlus(config(heads=2, topk=3), values=first.values)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert shared == {id(parameter) for parameter in first.values.parameters()}
    x = torch.randn(5, 13)
    alone = [torch.autograd.grad(layer(x).sum(), first.values.weight)[0] for layer in (first, second)]
    (first(x) + second(x)).sum().backward()
    torch.testing.assert_close(first.values.weight.grad, alone[0] + alone[1])
    kept = first.values.weight.clone()
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    nn.init.ones_(second.keys.log_temperature)
    second.reset_parameters()
    assert torch.equal(first.values.weight, kept)
    for name in ("gate.weight", "output.weight", "keys.weight", "query.projections.0.weight"):
        assert not torch.equal(second.state_dict()[name], before[name]), name
    assert torch.equal(second.keys.log_temperature, before["keys.log_temperature"])


@pytest.mark.parametrize("query_norm", ["none", "batch", "rms"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_padding_holds_changes_nothing(query_norm, training):
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    kept = torch.randn(2, 5, 13)
    results = []
    for fill in (0.0, 100.0, torch.nan):
        torch.manual_seed(1)
        layer = MemoryPlus(config(query_norm=query_norm)).train(training)
        x = torch.where(mask[..., None] == 1, kept, fill).requires_grad_()
        y = layer(x, mask)
        assert not y[mask == 0].any()
        y.square().sum().backward()
        assert not x.grad[mask == 0].any()
        results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_layers_stay_near_float32_and_train(dtype):
    wide = MemoryPlus(config(query_norm="rms"))
    narrow = MemoryPlus(config(query_norm="rms"), dtype=dtype)
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(20, 13).to(dtype)
    y, expected = narrow(x), wide(x.float())
    assert y.dtype == dtype
    # Rounded scores swap near-ties, so most tokens agree, not all.
    near = (y.float() - expected).abs().amax(-1) < 0.05 * expected.abs().max()
    assert near.float().mean() > 0.7
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in narrow.parameters())


def test_autocast():
    layer = MemoryPlus(config())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(6, 13))
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_a_shared_table_in_row_mode_trains_as_in_dense_mode():
    layers = nn.ModuleList([MemoryPlus(config())])
    layers.append(MemoryPlus(config(heads=2, topk=3), values=layers[0].values))
    twin = copy.deepcopy(layers)
    x = torch.randn(50, 13)
    optimizer = RowAdam(layers, lr=0.1)
    dense = torch.optim.Adam([twin[0].values.weight], lr=0.1)
    before = twin[0].values.weight.clone()
    for step, model in ((optimizer, layers), (dense, twin)):
        sum(layer(x) for layer in model).square().sum().backward()
        assert (model[0].values.weight.grad is None) == (step is optimizer)
        step.step()
    torch.testing.assert_close(layers[0].values.weight, twin[0].values.weight)
    assert not torch.allclose(twin[0].values.weight, before)


@pytest.mark.parametrize("mode", ["dense", "row"])
def test_compiled_in_one_graph_it_gives_the_same_outputs_and_gradients(mode):
    layer = MemoryPlus(config(query_norm="batch"))
    twin = copy.deepcopy(layer)
    owners = [RowAdam(model) for model in (layer, twin)] if mode == "row" else []
    x, mask = torch.randn(2, 5, 13), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    results = []
    for model, function in ((layer, layer), (twin, compiled)):
        y = function(x, mask)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if owners:
            gradients["rows"] = model.values.row_gradient.summed().grad_PV
        results.append((y, gradients))
    assert "keys.log_temperature" in results[0][1]
    torch.testing.assert_close(*results)


def test_usage_is_measured():
    layer = MemoryPlus(config()).eval()
    with torch.no_grad(), UsageMeter(layer) as meter:
        layer(torch.randn(2, 9, 13), torch.arange(9).expand(2, 9) < 6)
    report = meter.report()
    assert (report.tokens, report.slots, len(report.heads)) == (12, 49, 3)
    assert report.overall.usage > 10


def test_copies_and_pickles_are_the_same_layer():
    layer = MemoryPlus(config()).eval()
    x = torch.randn(4, 13)
    optimizer = RowAdam(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is MemoryPlus
        assert torch.equal(twin(x), layer(x))
        assert twin.values.row_gradient is None
    assert optimizer is not None


def test_meta_device_then_materialised():
    layer = MemoryPlus(config(), device="meta")
    assert layer(torch.randn(3, 13, device="meta")).is_meta
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan)
    layer.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    assert layer.keys.log_temperature.tolist() == pytest.approx([math.log(10**-0.5)] * 3)


@pytest.mark.parametrize("lead", [(), (9,), (2, 3), (0,)], ids=str)
def test_normalised_hits_are_the_best_of_all_cosines(lead):
    keys = NormalisedKeys(3, 7, 10, 5, dtype=torch.float64)
    nn.init.normal_(keys.log_temperature)
    query = torch.randn(*lead, 3, 10, dtype=torch.float64)
    scores, slots = keys(query)
    assert scores.shape == slots.shape == (*lead, 3, 5)
    expected = all_scores(keys, query.view(-1, 3, 10)).view(*lead, 3, 49)
    torch.testing.assert_close(scores, expected.topk(5).values)
    torch.testing.assert_close(expected.gather(-1, slots), scores)


def test_norms_of_queries_and_sub_keys_change_no_score():
    keys, query = NormalisedKeys(3, 7, 10, 5), torch.randn(20, 3, 10)
    expected = keys(query)
    scaled = keys(query * torch.logspace(-2, 4, 20)[:, None, None])
    with torch.no_grad():
        keys.weight *= torch.logspace(-1, 3, 7)[:, None]
    for scores, slots in (scaled, keys(query)):
        torch.testing.assert_close(scores, expected.scores)
        assert torch.equal(slots, expected.slots)


@pytest.mark.parametrize("query_dim", [16, 256])
def test_scores_of_random_queries_start_with_a_deviation_of_1(query_dim):
    keys = NormalisedKeys(2, 30, query_dim, 5)
    assert all_scores(keys, torch.randn(100, 2, query_dim)).std().item() == pytest.approx(1, rel=0.05)


def test_a_temperature_is_of_its_head():
    keys, query = NormalisedKeys(3, 7, 10, 5), torch.randn(20, 3, 10)
    before = keys(query)
    with torch.no_grad():
        keys.log_temperature[1] += math.log(2)
    after = keys(query)
    assert torch.equal(after.slots, before.slots)
    torch.testing.assert_close(after.scores, before.scores / torch.tensor([1, 2, 1])[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_queries_and_keys_of_zero_have_finite_scores_and_gradients(dtype):
    keys = NormalisedKeys(2, 7, 10, 5, dtype=dtype)
    with torch.no_grad():
        keys.weight[0, 0, 3] = 0
    query = torch.randn(4, 2, 10).to(dtype)
    query[0] = 0
    query.requires_grad_()
    scores, _ = keys(query)
    assert not scores[0].any()
    (scores * torch.randn_like(scores)).sum().backward()
    for grad in (query.grad, keys.weight.grad, keys.log_temperature.grad):
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_16_bit_queries_are_scored_in_float32(weights):
    keys, query = NormalisedKeys(2, 7, 10, 5, dtype=weights), torch.randn(20, 2, 10).bfloat16()
    expected = all_scores(keys, query).topk(5).values.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = keys(query).scores
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(keys(query).scores, expected)


def test_a_transform_of_torch_func_computes_the_same_layer():
    layer = MemoryPlus(config(), dtype=torch.float64)
    x, dx = torch.randn(2, 6, 13, dtype=torch.float64)
    y, dy = torch.func.jvp(layer, (x,), (dx,))
    torch.testing.assert_close(y, layer(x))
    difference = layer(x + 1e-6 * dx) - layer(x - 1e-6 * dx)
    torch.testing.assert_close(dy, difference / 2e-6, rtol=1e-5, atol=1e-7)
