import pytest
import torch

from memlayers.bench import training
from memlayers.bench.layers import make_layer, make_table, make_textbook, share_textbook
from memlayers.bench.shapes import shape
from memlayers.bench.training import DENSE, OURS, PACKAGE, SPARSE, Moments, contender_bytes, make_steps, takes_part
from memlayers.ops.row_sum import Part

CPU = torch.device("cpu")


def test_every_contender_trains(tiny):
    steps, notes = make_steps((OURS, DENSE, SPARSE), tiny, CPU)
    assert list(steps) == [OURS, DENSE, SPARSE]
    assert notes == []
    for _ in range(2):
        for step in steps.values():
            step()


def test_all_work_on_one_table_and_one_pair_of_moments(tiny, monkeypatch):
    tables, moments = [], []

    def spy(make):
        def made(*arguments):
            found = make(*arguments)
            tables.append(found)
            return found

        return made

    monkeypatch.setattr(training, "make_table", spy(training.make_table))
    monkeypatch.setattr(Moments, "of", classmethod(lambda cls, table: moments.append(spied(table)) or moments[-1]))

    def spied(table_SV):
        return Moments(torch.zeros_like(table_SV), torch.zeros_like(table_SV))

    steps, _ = make_steps((OURS, DENSE, SPARSE), tiny, CPU)
    assert (len(tables), len(moments)) == (1, 1)
    watched = (tables[0], moments[0].exp_avg_SV, moments[0].exp_avg_sq_SV)
    for name, step in steps.items():
        before = [tensor.clone() for tensor in watched]
        step()
        assert all(not torch.equal(tensor, old) for tensor, old in zip(watched, before, strict=True)), name


def test_a_step_leaves_no_gradient_behind(tiny):
    textbook = make_textbook(tiny, make_table(tiny, CPU))
    moments = Moments.of(textbook.values.data)
    x_TD = torch.randn(tiny.tokens, tiny.dim)
    for name in (OURS, DENSE, SPARSE):
        module, optimizers = training._make(name, tiny, textbook, moments)
        training._step(module.train(), optimizers, x_TD, x_TD)()
        assert all(parameter.grad is None for parameter in module.parameters()), name


def test_all_parameters_are_trained(tiny):
    textbook = make_textbook(tiny, make_table(tiny, CPU))
    for name in (OURS, DENSE, SPARSE):
        module, optimizers = training._make(name, tiny, textbook, Moments.of(textbook.values.data))
        groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
        trained = [id(parameter) for group in groups for parameter in group]
        own = [id(parameter) for key, parameter in module.named_parameters() if not key.endswith("row_mark")]
        assert sorted(trained) == sorted(own), name


def test_the_first_step_from_zero_is_the_same_for_all(tiny):
    start = make_textbook(tiny, make_table(tiny, CPU))
    x_TD = torch.randn(tiny.tokens, tiny.dim)
    found = {}
    for name in (OURS, DENSE, SPARSE):
        textbook = share_textbook(start, tiny, sparse=False)
        textbook.values.data = start.values.data.clone()
        module, optimizers = training._make(name, tiny, textbook, Moments.of(textbook.values.data))
        training._step(module.train(), optimizers, x_TD, x_TD)()
        found[name] = textbook.values.data
        assert not torch.equal(found[name], start.values)
    for name in (OURS, SPARSE):  # Adam makes +-lr of a gradient that cancels to rounding
        off = (found[name] - found[DENSE]).abs() > 1e-6
        assert off.float().mean() < 1e-3, name


def test_the_package_is_left_out_where_it_is_not(tiny, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "product_key_memory", None)
    steps, notes = make_steps((OURS, PACKAGE), tiny, CPU)
    assert list(steps) == [OURS]
    assert notes == ["product-key-memory: not installed"]


def test_other_errors_are_not_swallowed(tiny, monkeypatch):
    monkeypatch.setattr(training, "make_layer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_steps((OURS,), tiny, CPU)


def test_what_a_step_needs():
    small, large = shape("512x512"), shape("1024x1024")
    assert takes_part(SPARSE, small)
    assert not takes_part(SPARSE, large)
    assert contender_bytes(OURS, large) < contender_bytes(DENSE, large)
    assert contender_bytes(DENSE, large) > 4 * large.table_bytes


def test_a_row_step_moves_each_row_that_was_read_once(tiny):
    table_SV = make_table(tiny, CPU).bfloat16()
    moments = Moments.of(make_table(tiny, CPU))
    steps_S = torch.zeros(tiny.slots, dtype=torch.int32)
    part = Part(torch.tensor([[3, 3], [5, 3]]), torch.ones(2, 2), torch.ones(2, tiny.value_dim))
    step = training.make_row_step(table_SV, moments, steps_S, part)
    step()
    step()
    assert steps_S[[3, 5]].tolist() == [2, 2]
    assert steps_S.sum() == 4
    rows = 2 * 2 * (32 * (2 + 4 + 4) + 4)  # two of them, in and out: bfloat16, two moments, a count
    assert training.row_step_bytes(table_SV, moments, steps_S, part) == rows + 4 * (8 + 4) + 2 * 32 * 4


def test_layers_of_the_bench_start_equal(tiny):
    textbook = make_textbook(tiny, make_table(tiny, CPU))
    other, layer = share_textbook(textbook, tiny, sparse=True), make_layer(textbook, tiny)
    x_TD = torch.randn(tiny.tokens, tiny.dim)
    for mode in (True, False):
        expected = textbook.train(mode)(x_TD)
        torch.testing.assert_close(other.train(mode)(x_TD), expected)
        torch.testing.assert_close(layer.train(mode)(x_TD), expected, rtol=1e-4, atol=1e-5)
