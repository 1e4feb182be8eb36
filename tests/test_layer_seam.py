"""Layers of other kinds: which steps they can take, and that the rest of MemoryLayer follows."""

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlayers import (
    Experts,
    MemoryConfig,
    MemoryLayer,
    MemoryPlus,
    NormalisedKeys,
    ProductKeys,
    RowAdam,
    UsageMeter,
    ValueTable,
)
from memlayers.layer import layer_class, try_infer
from memlayers.query import QueryNetwork

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "your-own-layer.md"
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def config(**fields):
    return MemoryConfig(**{"dim": 12, "heads": 3, "topk": 4, "num_subkeys": 6, "query_dim": 8, **fields})


@pytest.fixture
def run_page(monkeypatch):
    """Runs the code of the page as one module and returns it; what needs transformers only if asked for."""

    def run(*, with_models=False):
        module = types.ModuleType("your_own_layer")
        monkeypatch.setitem(sys.modules, "your_own_layer", module)
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            if with_models or "transformers" not in code:
                exec(compile(code, str(PAGE), "exec"), module.__dict__)
        return module

    return run


class Doubled(MemoryLayer):
    def combine(self, y_TV, x_TD):
        return 2 * self.output(y_TV) + x_TD


class Unweighted(MemoryLayer):
    def weigh(self, scores_THK):
        return torch.ones_like(scores_THK)


class Twice(MemoryLayer):
    def read(self, x_TD, slots_THK, weights_THK):
        return 2 * super().read(x_TD, slots_THK, weights_THK)


class Cosine(MemoryLayer):
    def make_keys(self, **where):
        c = self.config
        return NormalisedKeys(c.heads, c.num_subkeys, c.query_dim, c.topk, **where)


class Extended(MemoryLayer):
    """Parts in a container, and a parameter of its own."""

    def __init__(self, config, *, values=None, device=None, dtype=None):
        super().__init__(config, values=values, device=device, dtype=dtype)
        self.extra = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 5)))
        self.scale = nn.Parameter(torch.zeros(2))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.scale)


@pytest.mark.parametrize("value_dim", [None, 5])
def test_the_first_draws_and_the_names_of_parts_are_those_of_the_parts_in_order(value_dim):
    c = config(value_dim=value_dim)
    torch.manual_seed(3)
    parts = nn.Module()
    parts.query = QueryNetwork(c)
    parts.keys = ProductKeys(c.heads, c.num_subkeys, c.query_dim, c.topk)
    parts.values = ValueTable(c.slots, c.width)
    parts.output = nn.Identity() if value_dim is None else nn.Linear(c.width, c.dim, bias=False)
    torch.manual_seed(3)
    layer = MemoryLayer(c)
    assert [*layer.state_dict()] == [*parts.state_dict()]
    for name, tensor in parts.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


def expected_output(layer, x_TD):
    """The layer of these kinds, all steps by hand."""
    scores_THK, slots_THK = layer.keys(layer.query(x_TD))
    weights_THK = torch.ones_like(scores_THK) if isinstance(layer, Unweighted) else scores_THK.softmax(-1)
    y_TV = torch.einsum("thk,thkv->tv", weights_THK, layer.values.weight[slots_THK])
    y_TD = F.linear(2 * y_TV if isinstance(layer, Twice) else y_TV, layer.output.weight)
    return 2 * y_TD + x_TD if isinstance(layer, Doubled) else y_TD


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("kind", [MemoryLayer, Doubled, Unweighted, Twice, Cosine])
def test_a_step_that_is_overridden_is_taken_with_and_without_gradients(kind, gradients):
    x = torch.randn(2, 7, 12)
    layer = kind(config(value_dim=5)).eval()
    expected = expected_output(layer, x.flatten(0, 1)).view(x.shape)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_one_operation_is_for_those_that_weigh_and_read_as_the_paper():
    x = torch.randn(3, 12)
    with torch.no_grad():
        for kind in (MemoryLayer, Doubled, Extended):
            assert try_infer(kind(config()).eval(), x) is not None, kind
        for kind in (Unweighted, Twice, Cosine, MemoryPlus, Experts):
            assert try_infer(kind(config()).eval(), x) is None, kind
        layer = MemoryLayer(config()).eval()
        before = layer(x)
        layer.weigh = torch.zeros_like
        assert try_infer(layer, x) is None
        assert before.any()
        assert not layer(x).any()


@pytest.mark.parametrize("kind", [Unweighted, Twice, Cosine, Doubled])
def test_padding_reads_nothing_whatever_it_holds(kind):
    kept = torch.randn(2, 5, 12)
    for training in (True, False):
        results = []
        for fill in (0.0, torch.nan):
            torch.manual_seed(1)
            layer = kind(config()).train(training)
            x = torch.where(MASK[..., None] == 1, kept, fill)
            y = layer(x, MASK)
            y.sum().backward()
            assert not y[MASK == 0].any()
            gradients = [p.grad for p in layer.parameters() if p.grad is not None]
            with torch.no_grad():
                inferred = layer.eval()(x, MASK)
            assert not inferred[MASK == 0].any()
            results.append([y, inferred, *gradients])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_combine_gets_the_input_before_dropout():
    layer = Doubled(config(input_dropout=0.9, query_norm="none"))
    nn.init.zeros_(layer.values.weight)
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), x)


def test_reset_parameters_reaches_the_parts_of_a_subclass():
    layer = Extended(config())
    spoilt = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in spoilt.state_dict().values():
            tensor.fill_(torch.nan)
    shared = Extended(config(), values=layer.values)
    kept = layer.values.weight.clone()
    for memory in (spoilt, shared):
        before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
        memory.reset_parameters()
        for name, tensor in memory.state_dict().items():
            assert tensor.isfinite().all(), name
            if name.startswith("extra") or name == "keys.weight":
                assert not torch.equal(tensor, before[name]), name
    assert torch.equal(layer.values.weight, kept)


def test_a_class_is_found_by_its_name():
    assert layer_class("MemoryLayer") is MemoryLayer
    assert layer_class("MemoryPlus") is MemoryPlus
    assert layer_class("Experts") is Experts
    assert layer_class("Cosine") is Cosine
    child = type("GrandchildOfALayer", (Cosine,), {})
    assert layer_class("GrandchildOfALayer") is child
    with pytest.raises(ValueError, match="kind must .* got 'Cosin'; known: .*Cosine.*MemoryPlus.*import the module"):
        layer_class("Cosin")


@pytest.mark.parametrize("bases", [(MemoryLayer, Cosine), (Cosine, MemoryLayer), (Cosine, Cosine)], ids=str)
def test_of_two_classes_of_one_name_the_newer_is_meant(bases):
    kinds = [type("DefinedAgain", (base,), {}) for base in bases]
    assert layer_class("DefinedAgain") is kinds[1]


def test_usage_counts_the_weights_of_the_layer():
    layer = Unweighted(config(heads=1)).eval()
    with UsageMeter(layer) as meter:
        layer(torch.randn(50, 12))
    figures = meter.report().overall
    assert figures.kl == pytest.approx(figures.count_kl)
    assert figures.gini == pytest.approx(figures.count_gini)


def test_the_page_s_weights_without_softmax(run_page):
    layer = run_page().SigmoidMemory(config()).eval()
    x = torch.randn(9, 12)
    scores_THK, slots_THK = layer.keys(layer.query(x))
    expected = torch.einsum("thk,thkv->tv", scores_THK.sigmoid(), layer.values.weight[slots_THK])
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_the_page_s_product_of_two_reads_is_that(run_page):
    layer = run_page().TwoTables(config(value_dim=5, query_norm="rms"))
    assert len(RowAdam(layer).tables) == 2
    x = torch.randn(7, 12)
    scores_THK, slots_THK = layer.keys(layer.query(x))
    first_TV, second_TV = (
        torch.einsum("thk,thkv->tv", scores_THK.softmax(-1), table.weight[slots_THK])
        for table in (layer.values, layer.others)
    )
    torch.testing.assert_close(layer(x), layer.output(first_TV * second_TV))


def test_the_page_s_experts_in_a_model_saved_and_loaded(tmp_path, monkeypatch, run_page):
    monkeypatch.chdir(tmp_path)
    page = run_page(with_models=True)
    memories = [module for module in page.model.modules() if isinstance(module, MemoryLayer)]
    assert [type(memory) for memory in memories] == [page.SquaredExperts]
    (trained,) = [module for module in page.trained.modules() if isinstance(module, MemoryLayer)]
    assert torch.equal(memories[0].values.inputs.weight, trained.values.inputs.weight)
