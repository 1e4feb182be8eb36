"""Derivatives other than those of `backward`: tangents, and the transforms of `torch.func`, against differences."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus
from memlayers.models import add_memory, causal_lm
from memlayers.ops.read import dot, read, sum_rows
from memlayers.ops.search import search, search_backward
from memlayers.ops.select import select_pairs
from memlayers.optim import RowSGD

STEP = 1e-6


def make(kind=MemoryLayer, **options):
    torch.manual_seed(0)
    defaults = {"dim": 6, "heads": 2, "topk": 3, "num_subkeys": 5, "query_dim": 4}
    layer = kind(MemoryConfig(**{**defaults, **options}), dtype=torch.float64).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


LAYERS = {
    "product": lambda: make(),
    "rms": lambda: make(query_norm="rms"),
    "flat": lambda: make(keys="flat"),
    "narrow": lambda: make(value_dim=3),
    "plus": lambda: make(MemoryPlus),
    "experts": lambda: make(Experts),
}
MASK = torch.tensor([True, True, False, True])


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def difference(function, x, t):
    """The tangent by a central difference."""
    with torch.no_grad():
        return (function(x + STEP * t) - function(x - STEP * t)) / (2 * STEP)


def assert_near(found, expected):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.promise(
    "Derivatives", "`torch.func.jvp`, `jacfwd`, dual numbers of `torch.autograd.forward_ad`", "supported",
    "in row mode too",
)  # fmt: skip
@pytest.mark.parametrize("row_mode", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("name", LAYERS)
def test_tangents_of_a_layer(name, mask, row_mode):
    layer, x, t = LAYERS[name](), normal(4, 6), normal(4, 6, seed=2)
    owner = RowSGD(layer, lr=0.1) if row_mode else None

    def function(x):
        return layer(x, mask)

    expected = difference(function, x, t)
    output, tangent = jvp(function, (x,), (t,))
    assert_near(tangent, expected)
    torch.testing.assert_close(output, function(x))
    with torch.no_grad():
        assert_near(jvp(function, (x,), (t,))[1], expected)
    with forward_ad.dual_level():
        assert_near(forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent, expected)
        assert forward_ad.unpack_dual(function(x)).tangent is None
    assert_near(torch.einsum("...td,td->...", jacfwd(function)(x), t), expected)
    assert owner is None or layer.values.weight.grad is None


@pytest.mark.parametrize("name", LAYERS)
def test_tangents_along_parameters(name):
    layer, x = LAYERS[name](), normal(4, 6)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    tangents = {name: normal(*parameter.shape, seed=3) for name, parameter in parameters.items()}

    def function(parameters):
        return functional_call(layer, parameters, (x,))

    moved = [
        {name: parameters[name] + side * STEP * tangents[name] for name in parameters} for side in (1, -1)
    ]  # fmt: skip
    with torch.no_grad():
        expected = (function(moved[0]) - function(moved[1])) / (2 * STEP)
    assert_near(jvp(function, (parameters,), (tangents,))[1], expected)


@pytest.mark.promise(
    "Derivatives", "`torch.func.grad`, `vjp`, `vmap`, `jacrev`, `hessian`, per-sample gradients", "supported",
    "with running statistics, as for every BatchNorm; a table in row mode is an input (`functional_call`)",
)  # fmt: skip
@pytest.mark.parametrize("name", LAYERS)
def test_transforms_agree_with_backward(name):
    layer, x, t = LAYERS[name](), normal(4, 6), normal(4, 6, seed=2)
    given = x.clone().requires_grad_()
    expected = torch.autograd.grad((layer(given) * t).sum(), given, retain_graph=True)[0]
    assert_near(grad(lambda x: (layer(x) * t).sum())(x), expected)
    assert_near(vjp(layer, x)[1](t)[0], expected)
    assert_near(torch.einsum("tdse,td->se", jacrev(layer)(x), t), expected)
    torch.testing.assert_close(vmap(layer)(torch.stack([x, t])), torch.stack([layer(x), layer(t)]))
    torch.testing.assert_close(vmap(layer)(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_hessian_is_the_difference_of_gradients(name):
    layer, x, t = LAYERS[name](), normal(6), normal(6, seed=2)

    def function(x):
        return layer(x).square().sum()

    expected = difference(grad(function), x, t)
    assert_near(hessian(function)(x) @ t, expected)
    given = x.clone().requires_grad_()
    with forward_ad.dual_level():  # forward over backward
        gradient = torch.autograd.grad(function(forward_ad.make_dual(given, t)), given)[0]
        assert_near(forward_ad.unpack_dual(gradient).tangent, expected)


@pytest.mark.parametrize("row_mode", [False, True], ids=["dense", "rows"])
def test_gradients_of_each_sample(row_mode):
    layer, x = make(), normal(3, 4, 6)
    owner = RowSGD(layer, lr=0.1) if row_mode else None
    parameters = {name: one.detach() for name, one in layer.named_parameters() if not name.endswith("row_mark")}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    if owner is not None:
        owner.release()
    for sample in range(3):
        layer.zero_grad()
        layer(x[sample]).square().sum().backward()
        for name in parameters:
            torch.testing.assert_close(found[name][sample], layer.get_parameter(name).grad)


@pytest.mark.promise(
    "Derivatives", "`backward` through `torch.func` or dual numbers into a table in row mode", "refused",
    "`functional_call`, or `release()` of its optimizer",
)  # fmt: skip
def test_row_gradients_are_not_recorded_inside_of_a_transform():
    layer, x = make(), normal(4, 6)
    owner = RowSGD(layer, lr=0.1)
    gradient = grad(lambda x: layer(x).square().sum())(x)  # of x alone: nothing is recorded
    message = r"row mode records no row gradients inside of torch.func or for dual numbers: .*functional_call.*release"
    with pytest.raises(ValueError, match=message):
        gradient.sum().backward()
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).primal
    with pytest.raises(ValueError, match=message):
        output.sum().backward()
    assert layer.values.weight.grad is None
    layer(x).sum().backward()
    owner.step()


@pytest.mark.promise(
    "Derivatives", "several gradients at once: `is_grads_batched=True`, `vectorize=True`", "supported",
    "not of a table in row mode: one by one, or `release()` of its optimizer",
)  # fmt: skip
@pytest.mark.parametrize("name", LAYERS)
def test_several_gradients_at_once(name):
    layer, x, grads = LAYERS[name](), normal(4, 6).requires_grad_(), normal(3, 4, 6, seed=2)
    weights = [one for one in layer.parameters() if one.requires_grad and one.numel() > 1]
    output = layer(x)
    found = torch.autograd.grad(output, [x, *weights], grads, is_grads_batched=True, retain_graph=True)
    for number, one_grad in enumerate(grads):
        expected = torch.autograd.grad(output, [x, *weights], one_grad, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[number], other)


@pytest.mark.parametrize("name", LAYERS)
def test_a_hessian_by_batches_and_its_products(name):
    layer, x = LAYERS[name](), normal(4, 6)

    def function(x):
        return layer(x).square().sum()

    expected = torch.autograd.functional.hessian(function, x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(torch.autograd.functional.hessian(function, x, vectorize=True), expected)
    _, product = torch.autograd.functional.hvp(function, x, normal(4, 6, seed=2))
    torch.testing.assert_close(product, torch.einsum("tdsc,sc->td", expected, normal(4, 6, seed=2)))


@pytest.mark.parametrize("name", LAYERS)
def test_third_and_fourth_derivatives(name):
    # Along lines through what a search is given: differences of the derivative before.
    layer, x, direction = LAYERS[name](), normal(4, 6), normal(4, 6, seed=2)
    keys = layer.keys.weight.detach().clone()

    def derivative(order, place):
        t = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        value = functional_call(layer, {"keys.weight": keys * t}, (x + t * direction,)).pow(2).sum()
        for count in range(order):
            (value,) = torch.autograd.grad(value, t, create_graph=count + 1 < order)
        return value.detach()

    for order in (2, 3, 4):
        expected = (derivative(order - 1, 1.0 + STEP) - derivative(order - 1, 1.0 - STEP)) / (2 * STEP)
        assert_near(derivative(order, 1.0), expected)


def test_several_gradients_at_once_are_not_recorded():
    layer, x = make(), normal(4, 6).requires_grad_()
    owner = RowSGD(layer, lr=0.1)
    message = r"row mode records the gradient of one backward pass at a time.*one by one, or call table.release\(\)"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(layer(x), [x], normal(3, 4, 6), is_grads_batched=True)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.functional.jacobian(layer, normal(4, 6), vectorize=True)
    layer(x).sum().backward()
    owner.step()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tangents_of_a_model(family):
    torch.manual_seed(0)
    model = causal_lm(family, vocab_size=20, layers=2, dim=8, heads=2, context=16)
    config = MemoryConfig(dim=8, heads=2, topk=3, num_subkeys=5, query_dim=4)
    model = add_memory(model, config, layers=[1, 2], mode="replace").double().eval()
    model.set_attn_implementation("eager")
    x, t = normal(2, 5, 8), normal(2, 5, 8, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1] * 5])

    def function(x):
        return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits[mask.bool()]

    with torch.no_grad():  # in steps that the model's own float32 parts do not drown
        expected = (function(x + 1e-4 * t) - function(x - 1e-4 * t)) / 2e-4
    tangent = jvp(function, (x,), (t,))[1]
    assert ((tangent - expected).norm() / expected.norm()).item() < 1e-3
    gradient = torch.autograd.functional.vjp(lambda x: function(x), x, tangent)[1]
    torch.testing.assert_close((gradient * t).sum(), tangent.square().sum(), rtol=1e-4, atol=1e-6)


TABLE, WEIGHTS, OUTPUTS = normal(7, 3), normal(4, 2, seed=2), normal(4, 3, seed=3)
SLOTS = torch.tensor([[0, 6], [1, 1], [3, 2], [5, 4]])
QUERY, KEYS = normal(4, 2, 4), normal(2, 2, 5, 2, seed=2)
FOUND = torch.tensor([[3, 0, 24], [7, 2, 2], [1, 11, 0], [23, 5, 6]])[:, None].expand(4, 2, 3)
OPERATIONS = {
    "search": (lambda query, keys: search(query, keys, 3)[0], QUERY, KEYS),
    "search_backward": (
        lambda grad, keys: search_backward(grad, FOUND, QUERY, keys)[0], normal(4, 2, 3, seed=4), KEYS
    ),
    "select": (lambda first, second: select_pairs(first, second, 3)[0], normal(4, 5), normal(4, 5, seed=2)),
    "read": (lambda table, weights: read(table, SLOTS, weights), TABLE, WEIGHTS),
    "dot": (lambda table, outputs: dot(table, SLOTS, outputs), TABLE, OUTPUTS),
    "sum_rows": (lambda weights, outputs: sum_rows(SLOTS, weights, outputs, 7), WEIGHTS, OUTPUTS),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_tangents_of_an_operation_alone(name):
    function, *inputs = OPERATIONS[name]
    for place, x in enumerate(inputs):

        def of_one(x, place=place, function=function, inputs=inputs):
            return function(*inputs[:place], x, *inputs[place + 1 :])

        t = normal(*x.shape, seed=5)
        expected = difference(of_one, x, t)
        assert_near(jvp(of_one, (x,), (t,))[1], expected)
        assert_near(torch.einsum("i...,i->...", vmap(lambda t, x=x, f=of_one: jvp(f, (x,), (t,))[1])(
            torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)), t.flatten()), expected)  # fmt: skip
        with forward_ad.dual_level():
            assert_near(forward_ad.unpack_dual(of_one(forward_ad.make_dual(x, t))).tangent, expected)


def test_what_is_computed_by_other_operators_is_the_same():
    """Slots and ties too, in float32, where kernels compute it otherwise."""
    query = torch.randn(20, 2, 4).round()
    keys = torch.randn(2, 2, 5, 2).round()
    scores, slots = search(query, keys, 4)
    found = vmap(lambda query: search(query, keys, 4))(query[None])
    assert torch.equal(found[1][0], slots)
    assert torch.equal(found[0][0], scores)


def test_a_compiled_tangent():
    torch._dynamo.reset()
    layer, x, t = make(query_norm="rms"), normal(4, 6), normal(4, 6, seed=2)

    def tangent(x, t):
        return jvp(layer, (x,), (t,))[1]

    assert_near(torch.compile(tangent, backend="eager", fullgraph=True)(x, t), difference(layer, x, t))
