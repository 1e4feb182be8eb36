from contextlib import nullcontext

import pytest
import torch
import triton

from memlayers.ops.gpu import read as reading
from memlayers.ops.gpu import select as selection
from memlayers.ops.gpu import tune

GPU = torch.device("cuda", 1)


@pytest.fixture
def tuner(monkeypatch):
    """Nothing is known yet, a run takes as many milliseconds as its blocks are called."""
    monkeypatch.setattr(tune, "_fastest", {})
    monkeypatch.setattr(tune.torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(tune.torch.cuda, "is_current_stream_capturing", lambda: False)
    timed = []

    def do_bench(run, **_):
        timed.append(run())
        if timed[-1] == 0:
            raise triton.OutOfResources(2, 1, "shared memory")
        return float(timed[-1])

    monkeypatch.setattr(tune.triton.testing, "do_bench", do_bench)
    return timed


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_the_table_counts_unless_tuning_is_asked_for(value, expected, monkeypatch):
    monkeypatch.delenv(tune.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(tune.SWITCH, value)
    tune.is_on.cache_clear()
    assert tune.is_on() is expected
    tune.is_on.cache_clear()


def test_the_fastest_is_measured_once_for_each_kind(tuner):
    assert tune.choose(("read", 8), [3, 1, 2], lambda blocks: blocks, GPU) == 1
    assert tune.choose(("read", 8), [3, 1, 2], lambda blocks: 1 / 0, GPU) == 1
    assert tune.choose(("dot", 8), [3, 2], lambda blocks: blocks, GPU) == 2
    assert tuner == [3, 1, 2, 3, 2]


def test_blocks_that_there_is_no_room_for_are_passed_over(tuner):
    assert tune.choose(("read", 8), [0, 5, 4], lambda blocks: blocks, GPU) == 4


def test_nothing_is_measured_while_a_graph_is_captured(tuner, monkeypatch):
    monkeypatch.setattr(tune.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.choose(("read", 8), [3, 1], lambda blocks: 1 / 0, GPU) == 3
    monkeypatch.setattr(tune.torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tune.choose(("read", 8), [3, 1], lambda blocks: blocks, GPU) == 1


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1, 1), (5, 8), (1024, 1024)])
def test_sizes_share_blocks_by_powers_of_two(size, expected):
    assert tune.size_class(size) == expected


@pytest.mark.parametrize("operation", ["read", "dot"])
def test_every_choice_computes_the_same(operation, device, monkeypatch):
    """Wide enough for all of them to differ; each is taken in its turn."""
    table = torch.randn(40, 300, device=device)
    slots = torch.randint(40, (2, 11), device=device)
    factor = torch.randn(2, 11 if operation == "read" else 300, device=device)
    tried, outputs = [], []
    for number in range(5):

        def choose(kind, candidates, run, device, number=number):
            tried.append(candidates[number])
            return candidates[number]

        monkeypatch.setattr(reading, "is_on", lambda: True)
        monkeypatch.setattr(reading, "choose", choose)
        outputs.append(getattr(reading, operation)(table, slots, factor))
    assert len(set(tried)) == 5
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_selection_with_any_number_of_warps(device, monkeypatch):
    first, second = torch.randn(2, 1, 1, 16, device=device)
    tried, outputs = set(), []
    for number in range(4):

        def choose(kind, candidates, run, device, number=number):
            tried.add(candidates[number]["num_warps"])
            return candidates[number]

        monkeypatch.setattr(selection, "is_on", lambda: True)
        monkeypatch.setattr(selection, "choose", choose)
        outputs.append(selection.select(first, second, 4))
    assert len(tried) == 4
    for scores, slots in outputs[1:]:
        assert torch.equal(scores, outputs[0][0])
        assert torch.equal(slots, outputs[0][1])
