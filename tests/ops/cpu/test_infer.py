"""A layer that runs as one operation is the layer that calls its parts."""

import pytest
import torch

from memlayers import MemoryConfig, MemoryLayer, ValueTable
from memlayers.layer import try_infer
from memlayers.ops.cpu import infer as kernels
from memlayers.ops.infer import Layer, infer

CONFIGS = {
    "odd": MemoryConfig(dim=33, value_dim=20, heads=1, topk=12, num_subkeys=12, query_dim=34, query_bias=False),
    "small": MemoryConfig(dim=64, heads=3, topk=5, num_subkeys=12, query_dim=14),
    "paper": MemoryConfig(dim=256, num_subkeys=130),
}


def trained(config):
    layer = MemoryLayer(config)
    for _ in range(3):
        layer(torch.randn(50, config.dim) * 3 + 1)  # for running statistics that are not the first ones
    torch.nn.init.normal_(layer.query.norm.weight)
    torch.nn.init.normal_(layer.query.norm.bias)
    return layer.eval()


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 90])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_layer(name, tokens, threads):
    layer = trained(CONFIGS[name])
    x = torch.randn(tokens, layer.config.dim)
    expected = layer(x).detach()
    with torch.no_grad():
        assert try_infer(layer, x) is not None
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x[:, None]), expected[:, None], rtol=1e-4, atol=1e-5)


def test_padding_reads_nothing():
    layer = trained(CONFIGS["small"])
    x = torch.randn(1, 2, 64)
    with torch.no_grad():
        y = layer(x, torch.tensor([[False, True]]))
    assert not y[0, 0].any()
    assert y[0, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 9])
def test_16_bit_tables(dtype, tokens):
    layer = trained(CONFIGS["small"])
    layer.values.to(dtype)
    x = torch.randn(tokens, 64)
    expected = layer(x).detach()
    with torch.no_grad():
        assert try_infer(layer, x) is not None
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


BFLOAT16 = {
    "odd": CONFIGS["odd"],
    "tiles": MemoryConfig(dim=64, heads=2, topk=8, num_subkeys=32, query_dim=64),
    "no bias": MemoryConfig(dim=48, heads=1, topk=4, num_subkeys=64, query_dim=128, query_bias=False),
}


def error(y, expected):
    """Of the whole, since a row may be chosen otherwise where queries are rounded otherwise."""
    return (y.float() - expected.float()).norm() / expected.float().norm()


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 90])
@pytest.mark.parametrize("name", BFLOAT16)
def test_in_bfloat16_it_is_the_layer(name, tokens, threads):
    layer = trained(BFLOAT16[name]).bfloat16()
    x = torch.randn(tokens, layer.config.dim).bfloat16()
    expected = layer(x).detach()
    with torch.no_grad():
        assert try_infer(layer, x).dtype == torch.float32
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert not tokens or error(y, expected) < 0.005


def test_under_autocast_a_few_tokens_meet_weights_as_if_they_were_cast():
    layer = trained(BFLOAT16["tiles"])
    x = torch.randn(2, 64)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found.append(try_infer(layer, x))
        for factor in (*layer.query.projections.parameters(), *layer.keys.parameters()):
            factor.data = factor.data.bfloat16().float()
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 90])
def test_under_autocast_it_is_the_layer_and_follows_its_weights(tokens, dtype):
    """Also what is written to them behind autograd's back, as averages of weights are."""
    layer = trained(BFLOAT16["tiles"])
    x = torch.randn(tokens, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert try_infer(layer, x) is not None
        before = layer(x)
        assert before.dtype == dtype
        layer.keys.weight.data.neg_()
        after = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected_after = layer(x).detach()
    assert error(before, expected) < 0.005
    assert error(after, expected_after) < 0.005
    assert error(after, expected) > 0.5


def test_operation_keeps_torch_s_rules():
    layer = trained(CONFIGS["small"])
    norm, linear = layer.query.norm, layer.query.projections[0]
    stats = norm.running_mean, norm.running_var, norm.weight.detach(), norm.bias.detach()
    arguments = (torch.randn(2, 64), linear.weight.detach(), linear.bias.detach(), *stats, norm.eps)
    arguments += (layer.keys.weight.detach(), 5, layer.values.weight.detach())
    torch.library.opcheck(infer, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_it_is_one_graph():
    layer = trained(CONFIGS["small"])
    x = torch.randn(2, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 9])
def test_what_the_kernel_does_not_take_is_left_to_the_reference(tokens):
    layer = trained(CONFIGS["small"])
    x = torch.randn(tokens, 64)
    expected = layer(x).detach()
    layer.values.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        layer.query.norm.running_var = layer.query.norm.running_var.bfloat16()
        with pytest.raises(RuntimeError):  # of PyTorch's own, who does not mix these
            layer(x)


@pytest.mark.parametrize("tokens", [2, 9])
def test_a_table_or_keys_of_the_wrong_size_are_an_error(tokens):
    layer = trained(CONFIGS["small"])
    table = layer.values
    with torch.no_grad():
        layer.values = ValueTable(10, 64)
        with pytest.raises(IndexError, match="slots must be in"):
            layer(torch.randn(tokens, 64) * 100)
        layer.values, layer.keys.topk = table, 13
        with pytest.raises(ValueError, match="topk must be in .* got 13 and 12"):
            layer(torch.randn(tokens, 64))


@pytest.mark.parametrize("tokens", [2, 9])
def test_scores_of_several_hundreds_give_finite_weights(tokens):
    """exp overflows float32 above 88: the greatest score has to be subtracted first."""
    layer = trained(CONFIGS["small"])
    with torch.no_grad():
        layer.keys.weight.mul_(300)
        x = torch.randn(tokens, 64)
        scores, _ = layer.keys(layer.query(x))
        assert scores.max() > 300
        assert try_infer(layer, x) is not None
        y = layer(x)
    expected = layer(x).detach()  # with gradients: by its parts, whose softmax is PyTorch's
    assert expected.isfinite().all()
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("of", ["x_TD", "projection_FD", "gain_HQ", "keys_2HNC"])
def test_kernels_read_no_float64_as_float32(of):
    """A mixture of dtypes is left to the reference, which refuses it or computes it; kernels would read other bits."""
    layer = trained(CONFIGS["small"])
    norm, linear = layer.query.norm, layer.query.projections[0]
    stats = norm.running_mean, norm.running_var, norm.weight.detach(), norm.bias.detach()
    given = Layer(
        torch.randn(2, 64),
        linear.weight.detach(),
        linear.bias.detach(),
        *stats,
        norm.eps,
        layer.keys.weight.detach(),
        5,
        layer.values.weight.detach(),
    )
    assert kernels.infer(given) is not NotImplemented
    assert kernels.infer(given._replace(**{of: getattr(given, of).double()})) is NotImplemented
