"""When a layer runs as one operation: each reason to run its parts instead, and that their result is right then."""

import accelerate
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from memlayers import MemoryConfig, MemoryLayer, UsageMeter, ValueTable
from memlayers.keys import ProductKeys
from memlayers.layer import try_infer
from memlayers.query import MaskedBatchNorm, QueryNetwork

FIELDS = {"dim": 24, "heads": 3, "topk": 5, "num_subkeys": 12, "query_dim": 14}
PARTS = ("query", "query.projections.0", "query.norm", "keys", "values")


@pytest.fixture
def layer():
    """A layer whose running statistics and gains are not the first ones."""
    layer = MemoryLayer(MemoryConfig(**FIELDS))
    layer(torch.randn(50, 24) * 3 + 1)
    nn.init.normal_(layer.query.norm.weight)
    return layer.eval()


@pytest.fixture
def x():
    return torch.randn(2, 24)


@pytest.fixture
def expected(layer, x):
    return layer(x).detach()  # with gradients, the parts run


def assert_parts_run(layer, x, expected=None):
    with torch.no_grad():
        assert try_infer(layer, x) is None
        if expected is not None:
            torch.testing.assert_close(layer(x), expected)


def test_nothing_speaks_against_it(layer, x, expected):
    with torch.no_grad():
        torch.testing.assert_close(try_infer(layer, x), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert try_infer(layer, x) is not None


def test_gradients_may_be_wanted(layer, x):
    assert try_infer(layer, x) is None
    assert layer(x).requires_grad


def test_training(layer, x, expected):
    layer.training = True
    assert_parts_run(layer, x, expected)


def test_only_the_norm_trains_and_learns_on(layer):
    layer.query.norm.train()
    before = layer.query.norm.running_mean.clone()
    x = torch.randn(9, 24)
    assert_parts_run(layer, x)
    with torch.no_grad():
        layer(x)
    assert not torch.equal(layer.query.norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_dtype_that_a_cpu_has_no_kernel_for(layer, x, dtype):
    assert_parts_run(layer.to(dtype), x.to(dtype))


@pytest.mark.parametrize("part", ["query.projections.0", "keys"])
def test_weights_of_another_dtype_than_x(layer, x, part):
    layer.get_submodule(part).double()
    assert_parts_run(layer, x)


def test_a_16_bit_table_is_no_reason(layer, x):
    layer.values.bfloat16()
    with torch.no_grad():
        assert try_infer(layer, x) is not None


def test_autocast_to_float16(layer, x):
    with torch.autocast("cpu", torch.float16):
        assert_parts_run(layer, x)


def test_autocast_to_bfloat16_is_no_reason(layer, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert try_infer(layer, x) is not None
        assert try_infer(layer, x.bfloat16()) is not None
        layer.keys.half()
        assert try_infer(layer, x) is None


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_somebody_listens_to_all_modules(layer, x, expected, register):
    seen = []
    with getattr(nn.modules.module, register)(lambda module, *_: seen.append(type(module))):
        assert_parts_run(layer, x, expected)
    assert {ProductKeys, ValueTable, QueryNetwork, MaskedBatchNorm} <= set(seen)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("part", PARTS)
def test_somebody_listens_to_a_part(layer, x, expected, part, register):
    seen = []
    with getattr(layer.get_submodule(part), register)(lambda *_: seen.append(part)):
        assert_parts_run(layer, x, expected)
    assert seen == [part]


def test_a_meter_counts(layer, x):
    with torch.no_grad(), UsageMeter(layer) as meter:
        layer(x)
    assert meter.report().tokens == 2


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_class(layer, x, part):
    module = layer.get_submodule(part)
    module.__class__ = type("Other", (type(module),), {"forward": lambda *_: pytest.fail("called")})
    assert_parts_run(layer, x)
    with torch.no_grad(), pytest.raises(pytest.fail.Exception, match="called"):
        layer(x)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_with_a_forward_of_its_own(layer, x, expected, part):
    module, calls = layer.get_submodule(part), []
    forward = module.forward
    module.forward = lambda *args: (calls.append(part), forward(*args))[1]
    assert_parts_run(layer, x, expected)
    assert calls == [part]


@pytest.mark.parametrize("part", ["", *PARTS])
def test_a_part_that_accelerate_offloaded(layer, x, expected, part):
    accelerate.cpu_offload(layer.get_submodule(part), execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in layer.parameters())  # its weights come when it is called
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("change", [{"query_norm": "rms"}, {"query_norm": "none"}, {"keys": "flat"}], ids=str)
def test_another_kind_of_part(x, change):
    layer = MemoryLayer(MemoryConfig(**{**FIELDS, **change})).eval()
    assert_parts_run(layer, x, layer(x).detach())


def test_a_query_network_of_several_maps(x):
    layer = MemoryLayer(MemoryConfig(**FIELDS, query_hidden=(24,))).eval()
    assert_parts_run(layer, x, layer(x).detach())


@pytest.mark.parametrize("step", ["weigh", "read"])
def test_a_step_that_was_replaced(layer, x, step):
    own, calls = getattr(layer, step), []
    setattr(layer, step, lambda *args: (calls.append(step), own(*args))[1])
    assert_parts_run(layer, x, layer(x).detach())
    assert calls == [step, step]


TENSORS = (
    "query.projections.0.weight",
    "query.projections.0.bias",
    "query.norm.weight",
    "query.norm.bias",
    "query.norm.running_mean",
    "query.norm.running_var",
    "keys.weight",
    "values.weight",
)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_another_class(layer, x, name):
    place, _, last = name.rpartition(".")
    module = layer.get_submodule(place)
    tensor = getattr(module, last).detach()
    two = TwoTensor(tensor, tensor.clone())
    setattr(module, last, nn.Parameter(two) if last in module._parameters else two)
    assert_parts_run(layer, x)
