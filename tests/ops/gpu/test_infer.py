import pytest
import torch
import torch.nn.functional as F

from memlayers import MemoryConfig, MemoryLayer
from memlayers.inference import MOST_CAPTURED
from memlayers.ops.gpu import infer as kernels
from memlayers.ops.infer import Layer, infer
from memlayers.ops.registry import references
from memlayers.ops.select import select_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# D, H, Q, N, K, V: odd ones; sub-keys that no block divides.
SIZES = [(33, 1, 34, 12, 12, 20), (64, 3, 14, 13, 5, 64), (48, 2, 96, 40, 9, 130)]


def arguments(size, tokens, dtype, device, *, bias=True, table_dtype=None, stats_dtype=torch.float32):
    """Of a layer whose statistics and weights are those of no special case, in the order of `infer`."""
    dim, heads, query_dim, num_subkeys, topk, width = size
    features = heads, query_dim
    made = {
        "x": (torch.randn(tokens, dim) * 2 + 1).to(dtype),
        "projection": (torch.randn(heads * query_dim, dim) / dim**0.5).to(dtype),
        "bias": torch.randn(heads * query_dim).to(dtype) if bias else None,
        "mean": torch.randn(features).to(stats_dtype),
        "var": (torch.rand(features) * 3 + 0.1).to(stats_dtype),
        "gain": torch.randn(features).to(dtype),
        "shift": torch.randn(features).to(dtype),
        "eps": 1e-5,
        "keys": (torch.randn(2, heads, num_subkeys, query_dim // 2) / query_dim**0.5).to(dtype),
        "topk": topk,
        "table": torch.randn(num_subkeys**2, width).to(table_dtype or dtype),
    }
    return [given.to(device) if isinstance(given, torch.Tensor) else given for given in made.values()]


def exact(given):
    """By float64 and brute force over all slots."""
    *tensors, eps, keys, topk, table = given
    x, projection, bias, mean, var, gain, shift = (None if one is None else one.double() for one in tensors)
    query_TF = F.batch_norm(F.linear(x, projection, bias), *(s.flatten() for s in (mean, var, gain, shift)), eps=eps)
    first, second = torch.einsum(
        "thsc,shnc->sthn", query_TF.view(len(x), *mean.shape).unflatten(-1, (2, -1)), keys.double()
    )
    scores, slots = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(topk)
    return (table.double()[slots] * scores.softmax(-1)[..., None]).sum((1, 2))


def assert_close(result, given):
    """Selection among near-ties may differ where the query was rounded, so what is compared with 16 bits is rough.

    The projection is rounded to 8 (bfloat16) or 11 bits (float16), and weights are exponentials of scores: an error of
    2**-9 in a query of norm sqrt(Q) and scores of a standard deviation of about 1 is one of some 2**-8 in a weight.
    """
    assert result.dtype == torch.float32
    expected = exact(given)
    assert (result.double() - expected).norm() <= TOLERANCES[given[0].dtype] * expected.norm()


@pytest.fixture
def only_kernels(monkeypatch):
    def reference(*_):
        raise AssertionError("the reference was used")

    monkeypatch.setitem(references, "infer", reference)


@pytest.fixture
def other_selection(device, monkeypatch):
    """That of the reference where the kernel's, which `test_select` tests, would be interpreted: for seconds a call."""

    def select(first, second, topk, *, softmax):
        scores, slots = select_reference(first, second, topk)
        return scores.softmax(-1), slots

    if device.type == "cpu":
        monkeypatch.setattr("memlayers.ops.gpu.select.select", select)


def test_from_the_projection_to_the_read(device, only_kernels):
    given = arguments(SIZES[0], 2, torch.float32, device)
    assert_close(infer(*given), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_token_or_three_match_float64(size, dtype, device, only_kernels, other_selection):
    for tokens in (1, 3):
        given = arguments(size, tokens, dtype, device, bias=tokens == 1)
        assert_close(infer(*given), given)


def test_no_tokens(device, only_kernels, other_selection):
    assert infer(*arguments(SIZES[1], 0, torch.float32, device)).shape == (0, 64)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_the_table_has_a_dtype_of_its_own(table_dtype, device, only_kernels, other_selection):
    given = arguments(SIZES[1], 2, torch.float32, device, table_dtype=table_dtype)
    assert_close(infer(*given), given)


def test_statistics_in_16_bits(device, only_kernels, other_selection):
    given = arguments(SIZES[1], 2, torch.bfloat16, device, stats_dtype=torch.bfloat16)
    assert_close(infer(*given), given)


def test_inputs_of_any_layout(device, only_kernels, other_selection):
    given = arguments(SIZES[1], 2, torch.float32, device)
    expected = infer(*given)
    for place in (0, 1, 3, 4, 5, 6):  # x, the projection, the statistics
        given[place] = given[place].t().contiguous().t()
    given[-1] = torch.cat([given[-1], given[-1]], 1)[:, :64]
    torch.testing.assert_close(infer(*given), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_take_the_other_operations_kernels(dtype, device, monkeypatch):
    assert kernels.FEW_TOKENS == MOST_CAPTURED
    monkeypatch.setattr(kernels, "FEW_TOKENS", 1)
    given = arguments(SIZES[0], 2, dtype, device)
    assert not kernels.takes(Layer(*given))
    assert kernels.takes(Layer(given[0][1:], *given[1:]))
    assert_close(infer(*given), given)


def test_what_the_kernels_do_not_know_is_left_to_the_reference(device):
    plain = arguments(SIZES[1], 2, torch.float32, device)
    assert kernels.takes(Layer(*plain))
    for place, change in {
        0: torch.Tensor.double,  # x is of another dtype than its weights
        1: torch.Tensor.half,
        2: torch.Tensor.half,
        4: torch.Tensor.half,
        8: lambda keys: keys.transpose(2, 3).contiguous().transpose(2, 3),
        9: lambda topk: 1000,
        10: torch.Tensor.double,
    }.items():
        changed = (change(given) if place == i else given for i, given in enumerate(plain))
        assert not kernels.takes(Layer(*changed)), place
    given = [one.double() if isinstance(one, torch.Tensor) else one for one in plain]
    torch.testing.assert_close(infer(*given), exact(plain))


def test_it_is_four_kernels(device, monkeypatch):
    launched = []
    for module in ("infer", "read", "select"):
        monkeypatch.setattr(f"memlayers.ops.gpu.{module}.launch", lambda kernel, grid, *_, **__: launched.append(grid))
    kernels.infer(Layer(*arguments(SIZES[1], 1, torch.float32, "meta")))
    assert len(launched) == 3  # and the projection


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_its_parts(dtype, device, only_kernels, other_selection):
    layer = MemoryLayer(MemoryConfig(dim=64, heads=1, topk=5, num_subkeys=12, query_dim=32), device=device, dtype=dtype)
    layer.eval()
    x = torch.randn(2, 64, device=device).to(dtype)
    expected = layer(x).detach()  # with gradients: by its parts
    with torch.no_grad():
        result = layer(x)
    assert result.dtype == dtype
    assert (result.double() - expected.double()).norm() <= TOLERANCES[dtype] * expected.double().norm()


def test_compiled_a_layer_is_one_graph(device, other_selection):
    layer = MemoryLayer(MemoryConfig(dim=64, heads=1, topk=5, num_subkeys=12, query_dim=32), device=device).eval()
    x = torch.randn(2, 64, device=device)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
