"""The whole layer on the kernels, against the same layer on the references."""

import pytest
import torch

from memlayers import MemoryConfig, MemoryLayer, RowAdam
from memlayers.memory_plus import MemoryPlus
from memlayers.ops import gpu

# Small, since the interpreter takes a tenth of a second to select of a row.
SMALL = MemoryConfig(dim=24, heads=1, topk=3, num_subkeys=5, query_dim=8)


@pytest.fixture
def references(monkeypatch):
    """A context in which operations run on their references."""

    def switch(is_on):
        monkeypatch.setattr(gpu, "why_not", lambda: "a test" if is_on else None)

    return switch


def train(layer, x, mask=None, steps=2):
    """Outputs of a few steps, gradients of the last, and what the table and its moments have become."""
    rows = RowAdam(layer, lr=1e-2, max_grad_norm=0.5)
    dense = torch.optim.SGD([p for n, p in layer.named_parameters() if not n.startswith("values.")], lr=1e-2)
    outputs, grads = [], {}
    for _ in range(steps):
        x = x.detach().requires_grad_()
        y = layer(x, mask)
        y.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        outputs += [y.detach(), x.grad]
        rows.step()
        dense.step()
        layer.zero_grad()
    state = rows.state[layer.values.weight]
    rows.release()
    return [*outputs, layer.values.weight.detach(), *state.values()], grads


@pytest.mark.parametrize(("kind", "is_masked"), [(MemoryLayer, True), (MemoryPlus, False)])
def test_training_is_that_of_the_references(kind, is_masked, device, references):
    x = torch.randn(2, 3, SMALL.dim, device=device)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=device).bool() if is_masked else None
    layer = kind(SMALL, device=device)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    results = []
    for is_reference in (False, True):
        references(is_reference)
        layer.load_state_dict(start)
        results.append(train(layer, x, mask))
    (found, grads), (expected, expected_grads) = results
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_layer_with_a_dense_gradient(device, references):
    layer = MemoryLayer(SMALL, device=device)
    x = torch.randn(3, SMALL.dim, device=device)
    grads = []
    for is_reference in (False, True):
        references(is_reference)
        layer.zero_grad()
        layer(x).square().sum().backward()
        grads.append(layer.values.weight.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_evaluation(dtype, tokens, device, references):
    layer = MemoryLayer(SMALL, device=device, dtype=dtype).eval()
    x = torch.randn(tokens, SMALL.dim, device=device, dtype=dtype)
    outputs = []
    for is_reference in (False, True):
        references(is_reference)
        with torch.no_grad():
            outputs.append(layer(x))
    assert outputs[0].dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    else:  # a near-tie of 16-bit scores may go to another slot, so most is compared
        close = torch.isclose(*outputs, rtol=2e-2, atol=2e-2)
        assert close.float().mean() > 0.7


def test_a_layer_compiles_as_one_graph(device):
    layer = MemoryLayer(SMALL, device=device)
    rows = RowAdam(layer, lr=1e-2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, SMALL.dim, device=device)
    before = layer.values.weight.detach().clone()
    compiled(x).square().sum().backward()
    assert not rows._tables[0].row_gradient.is_empty
    rows.step()
    assert not torch.equal(before, layer.values.weight)
