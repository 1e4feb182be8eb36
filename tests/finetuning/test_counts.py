"""SlotCounts against a plain computation: the keys are asked by hand what each batch reads."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus
from memlayers.finetuning import SlotCounts


@torch.no_grad()
def plainly(net, given):
    """By memory, for each batch the slots that real tokens read, as lists."""
    found = {"first": [], "second": []}
    for x, mask in given:
        for name in found:
            layer = getattr(net, name)
            _, slots = layer.keys(layer.query(torch.where(mask[..., None], x, 0).flatten(0, 1)))
            found[name].append(slots[mask.flatten()].flatten().tolist())
            x = x + layer(x, mask)
    return found


def counted(slots_of_batches, slots=36):
    reads = [sum(one.count(slot) for one in slots_of_batches) for slot in range(slots)]
    return reads, [sum(slot in one for one in slots_of_batches) for slot in range(slots)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [MemoryLayer, MemoryPlus, Experts])
def test_counts_are_those_of_a_plain_loop(make_net, make_batches, kind, shared):
    net = make_net(kind, shared).eval()
    with SlotCounts(net) as counts, torch.no_grad():
        for x, mask in make_batches():
            net(x, mask)
    found = plainly(net, make_batches())
    if shared:
        found = {"first": [one + other for one, other in zip(found["first"], found["second"], strict=True)]}
    assert counts.batches == 3
    assert list(counts.reads) == [f"{name}.values" for name in found]
    for name, each in found.items():
        reads, batches_with = counted(each)
        assert counts.reads[f"{name}.values"].tolist() == reads
        assert counts.batches_with[f"{name}.values"].tolist() == batches_with


def test_a_memory_alone_flat_keys_and_calls_in_training_count():
    layer = MemoryLayer(MemoryConfig(dim=16, heads=2, topk=3, keys="flat", num_subkeys=5, query_dim=8)).train()
    with SlotCounts(layer) as counts:
        layer(torch.randn(5, 16)).sum().backward()
    (reads,) = counts.reads.values()
    assert (list(counts.reads), reads.sum().item(), counts.batches) == (["values"], 5 * 6, 1)


def test_recomputations_padding_alone_and_failed_calls_do_not_count(make_net):
    class Checkpointed(make_net):
        def forward(self, x, mask=None):
            if x is None:
                raise KeyError("no input")
            return checkpoint(super().forward, x, mask, use_reentrant=False)

    net = Checkpointed()
    with SlotCounts(net) as counts:
        x = torch.randn(4, 16, requires_grad=True)
        net(x).sum().backward()
        with torch.no_grad():
            net(x, torch.zeros(4, dtype=torch.bool))
        with pytest.raises(KeyError):
            net(None)
    assert [one.sum().item() for one in counts.reads.values()] == [24, 24]
    assert counts.batches == 1
    net(x)
    assert counts.batches == 1


def test_halves_that_are_saved_loaded_and_merged_are_the_whole(make_net, make_batches, tmp_path):
    net = make_net().eval()
    whole, one, other = SlotCounts(net), SlotCounts(net), SlotCounts(net)
    with torch.no_grad():
        for number, (x, mask) in enumerate(make_batches()):
            with whole, one if number == 0 else other:
                net(x, mask)
    one.save(tmp_path / "one.safetensors")
    merged = other.merge(SlotCounts(make_net()).load(tmp_path / "one.safetensors"))
    assert (merged.batches, whole.batches) == (3, 3)
    for name in whole.reads:
        assert merged.reads[name].tolist() == whole.reads[name].tolist()
        assert merged.batches_with[name].tolist() == whole.batches_with[name].tolist()
    assert (tmp_path / "one.safetensors").stat().st_size < 8 * 2 * 36 + 600
    assert merged.load(tmp_path / "one.safetensors").batches == 1


def test_counts_are_saved_to_a_folder_that_is_not_there_yet(make_net, tmp_path):
    counts = SlotCounts(make_net())
    counts.save(tmp_path / "new" / "folder" / "counts.safetensors")
    assert counts.load(tmp_path / "new" / "folder" / "counts.safetensors").batches == 0


def test_other_files_and_the_counts_of_other_tables_are_refused(make_net, tmp_path):
    counts = SlotCounts(make_net())
    counts.save(tmp_path / "counts.safetensors")
    shared = SlotCounts(make_net(shared=True))
    with pytest.raises(
        ValueError, match=r"count the slots of first.values \(36\), got those of first.values \(36\), sec"
    ):
        shared.load(tmp_path / "counts.safetensors")
    with pytest.raises(ValueError, match="other must count the slots of"):
        shared.merge(counts)
    (tmp_path / "text").write_text("text")
    for name in ("text", "nothing"):
        with pytest.raises(ValueError, match=f"one of SlotCounts.save, .*{name}.* cannot be read"):
            counts.load(tmp_path / name)
    whole, about = load_file(tmp_path / "counts.safetensors"), {"format": "memlayers slot counts 1", "batches": "0"}
    name, batches = "reads first.values", "batches first.values"
    for tensors, metadata in (
        (whole, {**about, "batches": "many"}), (whole, {"format": about["format"]}),
        ({**whole, name: whole[name].float()}, about), ({**whole, batches: whole[batches][:9]}, about),
        ({key: one for key, one in whole.items() if key != batches}, about),
    ):  # fmt: skip
        save_file(tensors, tmp_path / "damaged", metadata)
        with pytest.raises(ValueError, match=r"one of SlotCounts.save, .*damaged' is damaged"):
            counts.load(tmp_path / "damaged")
    with pytest.raises(ValueError, match="at least one memory, got a Linear without"):
        SlotCounts(nn.Linear(2, 2))


def test_names_are_those_of_the_model_that_something_is_around(make_net):
    net = make_net()
    compiled = torch.compile(net, backend="eager")
    with SlotCounts(compiled) as counts, torch.no_grad():
        compiled(torch.randn(3, 16))
    assert list(counts.reads) == ["first.values", "second.values"]
    assert [one.sum().item() for one in counts.reads.values()] == [18, 18]
