"""A memory's usage as a metric of torchmetrics."""

import copy
import dataclasses
import runpy
import sys

import pytest
import torch

from memlayers import MemoryConfig, MemoryLayer, UsageMeter

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
UsageMetric = pytest.importorskip("memlayers.usage_metric").UsageMetric

CONFIG = MemoryConfig(dim=8, heads=2, topk=3, num_subkeys=4, query_dim=4, query_norm="rms")


def batches():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer():
    return MemoryLayer(CONFIG).eval()


def figures(layer, x):
    with UsageMeter(layer) as meter:
        layer(x)
    return dataclasses.asdict(meter.report().overall)


def assert_equal(found, expected):
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


@pytest.mark.promise(
    "Trainers",
    "a memory's usage as a metric of torchmetrics, logged by Lightning or in a `MetricCollection`",
    "supported",
    "`memlayers.usage_metric.UsageMetric(memory)`: its states are summed over processes",
)
def test_updates_add_up_to_what_a_meter_counts_and_a_call_gives_its_batch(layer):
    metric = UsageMetric(layer)
    for x in batches():
        layer(x)
        assert_equal(metric("whatever", else_is="given"), figures_heard_by_none(layer, x, metric))
    assert_equal(metric.compute(), figures_heard_by_none(layer, batches(), metric))
    layer(batches())
    metric.reset()
    with (
        pytest.raises(ValueError, match="at least one measured token, got 0"),
        pytest.warns(UserWarning, match="before the ``update``"),
    ):
        metric.compute()


def figures_heard_by_none(layer, x, metric):
    metric.meter.detach()
    found = figures(layer, x)
    metric.meter.attach()
    return found


def test_two_memories_in_a_collection_stay_apart():
    memories = {"first": MemoryLayer(CONFIG).eval(), "second": MemoryLayer(CONFIG).eval()}
    collection = torchmetrics.MetricCollection({name: UsageMetric(memory) for name, memory in memories.items()})
    collection.update()  # before the first token
    for x in batches():
        for memory in memories.values():
            memory(x)
        collection.update()
    found = collection.compute()
    for name, memory in memories.items():
        expected = figures_heard_by_none(memory, batches(), collection[name])
        for figure, value in expected.items():
            assert found[f"{name}_{figure}"].item() == pytest.approx(value)


def test_states_are_summed_over_processes(layer):
    metric = UsageMetric(
        layer, distributed_available_fn=lambda: True, dist_sync_fn=lambda state, group=None: [state, 2 * state]
    )
    layer(batches())
    metric.update()
    assert metric.tokens == 15
    with metric.sync_context(dist_sync_fn=metric.dist_sync_fn, distributed_available=metric.distributed_available_fn):
        assert metric.tokens == 45
    assert metric.tokens == 15
    assert_equal(metric.compute(), figures_heard_by_none(layer, batches(), metric))  # shares do not change


def test_a_clone_hears_the_same_memory_and_a_copy_of_both_the_copied_one(layer):
    metric = UsageMetric(layer)
    clone = metric.clone()
    layer(batches())
    for one in (metric, clone):
        one.update()
        assert one.tokens == 15
    both = copy.deepcopy(torch.nn.ModuleDict({"memory": layer, "usage": metric}))
    both["usage"].reset()
    both["memory"](batches()[0])
    both["usage"].update()
    metric.update()
    assert (both["usage"].tokens, metric.tokens) == (5, 15)


def test_what_was_heard_in_training_does_not_count_in_evaluation(layer):
    metric = UsageMetric(layer)
    layer.train()(batches()[:2])
    layer.eval()(batches()[0])
    metric.update()
    assert metric.tokens == 5
    layer.train()(batches())
    metric.update()
    assert metric.tokens == 20


def test_it_counts_in_a_compiled_layer(layer):
    metric = UsageMetric(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for count in (5, 10):
        compiled(batches()[0])
        metric.update()
        assert metric.tokens == count


def test_a_plot_and_no_weights(layer):
    metric = UsageMetric(layer)
    layer(batches())
    metric.update()
    _, axes = metric.plot()
    assert len(axes.get_lines()) == 13
    assert [*metric.parameters()] == []
    assert metric.state_dict() == {}


def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    module = sys.modules[UsageMetric.__module__]
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(
        ModuleNotFoundError, match="memlayers.usage_metric needs torchmetrics: pip install torchmetrics"
    ):
        runpy.run_path(module.__file__)
