"""SlotTrace against a plain computation: the keys are asked by hand what the hidden states of a call read."""

import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus
from memlayers.explorer import SlotTrace
from memlayers.models import add_memory, causal_lm, memory_layers

CONFIG = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)


def model_with(kind=MemoryLayer, config=CONFIG, **how):
    torch.manual_seed(0)
    model = causal_lm("gpt2", vocab_size=40, layers=3, dim=16, heads=2, context=32)
    return add_memory(model, config, [1, 3], kind=kind, **how).eval()


@torch.no_grad()
def plainly(model, ids, mask=None):
    """All reads of a batch, by memory: a list of (position, token, head, rank, slot, weight)."""
    inputs, handles = {}, []
    for name, layer in memory_layers(model).items():
        keep = lambda layer, args, kwargs, name=name: inputs.__setitem__(name, args[0])  # noqa: E731
        handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    found = {}
    for name, layer in memory_layers(model).items():
        scores, slots = layer.keys(layer.query(inputs[name].flatten(0, 1)))
        weights = scores.softmax(-1)
        found[name] = [
            (position, int(ids.flatten()[position]), head, rank, int(slots[position, head, rank]), weight)
            for position in range(ids.numel())
            if mask is None or mask.flatten()[position]
            for head in range(2)
            for rank, weight in enumerate(weights[position, head].tolist())
        ]
    return found


def rows(columns, name):
    of = columns["memory"] == name
    return [row[1:] for row in zip(*(column[of].tolist() for column in columns.values()), strict=True)]


def same(found, expected):
    """Rows whose last entry is a weight."""
    assert [row[:-1] for row in found] == [row[:-1] for row in expected]
    assert [row[-1] for row in found] == pytest.approx([row[-1] for row in expected], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "how"),
    [(MemoryLayer, {}), (MemoryPlus, {}), (Experts, {}), (MemoryLayer, {"share_values": True}),
     (MemoryLayer, {"mode": "parallel"})],
    ids=["memory", "memory_plus", "experts", "shared table", "parallel"],
)  # fmt: skip
def test_every_read_of_every_memory_is_there(kind, how):
    model = model_with(kind, **how)
    ids = torch.randint(40, (2, 7))
    expected = plainly(model, ids)
    with SlotTrace(model) as trace, torch.no_grad():
        model(input_ids=ids)
    reads = trace.reads()
    assert [*reads] == ["memory", "position", "token", "head", "rank", "slot", "weight"]
    assert [*expected] == ["transformer.h.0.mlp.memory", "transformer.h.2.mlp.memory"]
    for name, of_memory in expected.items():
        same(rows(reads, name), of_memory)
        assert trace.usage[name].report().tokens == 14
    model(input_ids=ids)  # after the block nothing is heard
    assert trace.tokens == 14


def test_flat_keys_are_traced_too():
    layer = MemoryLayer(MemoryConfig(dim=8, heads=2, topk=3, num_subkeys=4, query_dim=4, keys="flat")).eval()
    x = torch.randn(5, 8)
    with SlotTrace(layer) as trace:
        layer(x)
    reads = trace.reads()
    assert reads["slot"].tolist() == layer.keys(layer.query(x)).slots.flatten().tolist()
    assert set(reads["token"].tolist()) == {-1}
    assert reads["position"].tolist() == [position for position in range(5) for _ in range(6)]


@pytest.mark.promise(
    "Masks", "which tokens read which slots, as data", "supported", "`SlotTrace` leaves padding and recomputations out"
)
def test_padding_is_left_out():
    model = model_with()
    ids = torch.randint(40, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = plainly(model, ids, mask)
    with SlotTrace(model) as trace, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert trace.tokens == 8
    for name, of_memory in expected.items():
        same(rows(trace.reads(), name), of_memory)
    assert {0, 1}.isdisjoint(trace.strongest()["position"].tolist())


def test_the_strongest_reads_of_a_slot_are_those_of_all_calls():
    model = model_with()
    calls = [torch.randint(40, (2, 6)) for _ in range(4)]
    expected = {name: [] for name in memory_layers(model)}
    for number, ids in enumerate(calls):
        for name, reads in plainly(model, ids).items():
            expected[name] += [(12 * number + position, *others) for position, *others in reads]
    with SlotTrace(model, tokens=5, strongest=3) as trace, torch.no_grad():
        for ids in calls:
            model(input_ids=ids)
    for name, reads in expected.items():
        for slot in range(36):
            of_slot = sorted((read for read in reads if read[4] == slot), key=lambda read: -read[5])[:3]
            strongest = trace.strongest(slot)
            assert [*strongest] == ["memory", "slot", "head", "position", "token", "weight"]
            same(rows(strongest, name), [(slot, read[2], read[0], read[1], read[5]) for read in of_slot])
    everything = trace.strongest()
    assert len(everything["slot"]) == sum(len(trace.strongest(slot)["slot"]) for slot in range(36))


def test_the_sample_is_bounded_even_and_the_same_in_all_memories():
    model = model_with()
    with SlotTrace(model, tokens=50) as trace, torch.no_grad():
        for _ in range(40):
            model(input_ids=torch.randint(40, (1, 25)))
    assert trace.tokens == 1000
    reads = trace.reads()
    first, second = (np.unique(reads["position"][reads["memory"] == name]).tolist() for name in trace.usage)
    assert first == second
    assert len(first) == 50
    assert len(reads["slot"]) == 2 * 50 * 2 * 3
    assert 350 < np.mean(first) < 650  # neither the first tokens nor the last
    # 12 * H * K + 16 bytes a token and 22 * 4 + 20 * H a slot, and each meter's count of tokens.
    assert trace.nbytes == 2 * (50 * (12 * 6 + 16) + 36 * (22 * 4 + 20 * 2) + 8)


def test_one_call_and_many_give_the_same():
    layer = MemoryLayer(MemoryConfig(dim=8, heads=2, topk=3, num_subkeys=4, query_dim=4)).double().eval()
    x = torch.randn(40, 8, dtype=torch.float64)
    traces = [SlotTrace(layer, tokens=9, strongest=2) for _ in range(2)]
    with traces[0]:
        layer(x)
    with traces[1]:
        for part in x.split(7):
            layer(part)
    for found in (SlotTrace.reads, SlotTrace.strongest):
        whole, streamed = (found(trace) for trace in traces)
        assert all((whole[name] == streamed[name]).all() for name in whole if name != "weight")
        assert np.allclose(whole["weight"], streamed["weight"], atol=1e-6)


def test_top_tokens_and_top_slots_are_sums_of_weights():
    model = model_with()
    ids = torch.randint(6, (2, 12))
    expected = plainly(model, ids)
    with SlotTrace(model) as trace, torch.no_grad():
        model(input_ids=ids)
    for by_head in (False, True):
        for group, what, found in (
            (4, 1, trace.top_tokens(2, by_head=by_head)),
            (1, 4, trace.top_slots(2, by_head=by_head)),
        ):
            for name, reads in expected.items():
                sums = {}
                for read in reads:
                    key = ((read[2],) if by_head else ()) + (read[group],)
                    count, weight = sums.setdefault(key, {}).get(read[what], (0, 0.0))
                    sums[key][read[what]] = count + 1, weight + read[5]
                same(rows(found, name), [
                    (*key, value, *of_key[value])
                    for key, of_key in sorted(sums.items())
                    for value in sorted(of_key, key=lambda value, of=of_key: (-of[value][1], value))[:2]
                ])  # fmt: skip


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_is_traced_and_recomputation_is_not(use_reentrant):
    layer = MemoryLayer(MemoryConfig(dim=8, heads=2, topk=3, num_subkeys=4, query_dim=4))
    x = torch.randn(6, 8, requires_grad=True)
    with SlotTrace(layer) as trace:
        checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert trace.tokens == 6
    assert len(trace.reads()["slot"]) == 36


def test_a_cache_is_one_token_after_the_other():
    model = model_with()
    with SlotTrace(model) as trace:
        written = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    (name, _) = trace.usage
    assert [row[:2] for row in rows(trace.reads(), name)[::6]] == [*enumerate(written[0, :-1].tolist())]


def test_a_compiled_model_is_heard():
    layer = MemoryLayer(MemoryConfig(dim=8, heads=2, topk=3, num_subkeys=4, query_dim=4)).eval()
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(5, 8)
    with torch.no_grad():
        compiled(x)
        with SlotTrace(compiled) as trace:
            compiled(x)
    assert trace.tokens == 5


def test_threads_do_not_mix_their_tokens():
    model = model_with()
    batches = [torch.full((1, 9), number) for number in range(6)]
    with SlotTrace(model) as trace, torch.no_grad():
        threads = [threading.Thread(target=torch.no_grad()(model), kwargs={"input_ids": ids}) for ids in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reads = trace.reads()
    for name in trace.usage:
        of = reads["memory"] == name
        by_call = {
            (position // 9, token)
            for position, token in zip(reads["position"][of].tolist(), reads["token"][of].tolist(), strict=True)
        }
        assert sorted(call for call, _ in by_call) == sorted(token for _, token in by_call) == [*range(6)]


def test_reset_forgets_and_a_call_that_fails_leaves_nothing():
    model = model_with()
    with SlotTrace(model) as trace, torch.no_grad():
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), 99))
        model(input_ids=torch.tensor([[5, 6]]))
        trace.reset()
        model(input_ids=torch.tensor([[7, 8, 9]]))
    assert trace.tokens == 3
    assert trace.usage["transformer.h.0.mlp.memory"].report().tokens == 3
    assert np.unique(trace.reads()["token"]).tolist() == [7, 8, 9]
    assert np.unique(trace.reads()["position"]).tolist() == [0, 1, 2]


def test_pandas_and_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    model = model_with()
    with SlotTrace(model) as trace, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    frame = trace.reads().to_pandas()
    assert len(frame) == 2 * 3 * 6
    assert frame.groupby(["memory", "position", "head"], observed=True).weight.sum().tolist() == pytest.approx([1] * 12)
    trace.reads().to_parquet(tmp_path / "new" / "reads.parquet")  # in a folder that is not there yet
    back = parquet.read_table(tmp_path / "new" / "reads.parquet").to_pandas()
    pandas.testing.assert_frame_equal(back.astype({"memory": "category"}), frame)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["reads.parquet"]


def test_nothing_read_is_an_empty_table():
    trace = SlotTrace(model_with())
    for table in (trace.reads(), trace.strongest(), trace.top_tokens(), trace.top_slots(by_head=True)):
        assert {len(column) for column in table.values()} == {0}
    assert trace.tokens == 0


@pytest.mark.parametrize(("package", "way"), [("pandas", "to_pandas"), ("pyarrow", "to_parquet")])
def test_an_extra_that_is_missing_is_named(package, way, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"Columns.{way} needs {package}: pip install 'memlayers\[data\]'"):
        getattr(SlotTrace(model_with()).reads(), way)(*["x"] * (way == "to_parquet"))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="model must have at least one memory"):
        SlotTrace(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1, got 0"):
        SlotTrace(model_with(), tokens=0)
    with pytest.raises(ValueError, match="strongest must be an integer of at least 1, got 0"):
        SlotTrace(model_with(), strongest=0)
    with pytest.raises(ValueError, match="slot must be an integer from 0 to 35, got 36"):
        SlotTrace(model_with()).strongest(36)
    with pytest.raises(ValueError, match="most must be an integer of at least 1, got 0"):
        SlotTrace(model_with()).top_tokens(0)
