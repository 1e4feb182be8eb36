"""Patches: what was changed, taken back bit for bit, and refused where it does not belong."""

import copy

import pytest
import torch
from torch import nn

from memlayers import Experts, MappedFile, MemoryLayer, quantize_memory
from memlayers.finetuning import MemoryPatch, memory_diff
from memlayers.optim import RowAdam
from memlayers.values import value_tables


def changed(base, rows=(3, 8), seed=0, table=0):
    """A copy of a model, with other rows."""
    model = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = value_tables(model)[table].weight
        weight[list(rows)] = torch.randn(len(rows), weight.shape[1], generator=draw).to(weight.dtype)
    return model


def bits(model):
    return [table.weight.detach().clone().view(torch.uint8) for table in value_tables(model)]


def same(one, other):
    return all(map(torch.equal, bits(one), bits(other)))


@pytest.mark.promise(
    "Adapters",
    "shipping the rows of a memory that new text has changed",
    "supported",
    "`memory_diff(model, base)`: a patch of rows; apply, then revert, is bit-identical, and another base is refused",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [MemoryLayer, Experts])
def test_apply_makes_the_model_and_revert_the_base_bit_for_bit(make_net, kind, dtype, tmp_path):
    base = make_net(kind, shared=True).to(dtype)
    with torch.no_grad():
        base.first.values.weight[5, 0] = float("nan")
        base.first.values.weight[6, 0] = 0.0
    model = changed(base)
    with torch.no_grad():
        model.first.values.weight[6, 0] = -0.0
    memory_diff(model, base).save(tmp_path / "new" / "patch.safetensors")  # in a folder that is not there yet
    patch = MemoryPatch.load(tmp_path / "new" / "patch.safetensors")
    assert {name: one.slots_R.tolist() for name, one in patch.tables.items()} == {"first.values": [3, 6, 8]}
    assert (patch.rows, patch.nbytes) == (3, 3 * 8 + 2 * 3 * 16 * dtype.itemsize)
    assert repr(patch) == f"MemoryPatch(3 of 36 rows of first.values; {patch.nbytes:,} bytes)"
    other = copy.deepcopy(base)
    patch.apply(other)
    assert same(other, model)
    patch.revert(other)
    assert same(other, base)


def test_a_trained_memory_goes_through_a_patch(make_net, make_batches):
    base = make_net().eval()
    model = copy.deepcopy(base).requires_grad_(False)
    for table in value_tables(model):
        table.weight.requires_grad_(True)
    optimizer = RowAdam(model)
    x, mask = make_batches()[0]
    model(x, mask).square().sum().backward()
    optimizer.step()
    other = torch.compile(copy.deepcopy(base), backend="eager")
    memory_diff(model, base).apply(other)
    assert torch.equal(other(x, mask), model(x, mask))


def test_another_base_is_refused_by_name_and_nothing_is_changed(make_net):
    base = make_net()
    both = changed(changed(base), table=1)
    patch = memory_diff(both, base)
    assert list(patch.tables) == ["first.values", "second.values"]
    for wrong, named in (
        (changed(base, [20], table=1), r"the table second.values must be that of the base of this patch.*SHA-256"),
        (both, r"the table first.values must be that of the base of this patch.*SHA-256"),
        (
            copy.deepcopy(base).bfloat16(),
            r"the table first.values .*in torch.float32, got \[36, 16\] in torch.bfloat16",
        ),
        (make_net(shared=True), "must have the table second.values of this patch, got one with first.values"),
    ):
        before = bits(wrong)
        with pytest.raises(ValueError, match=named):
            patch.apply(wrong)
        assert all(map(torch.equal, before, bits(wrong)))
    for wrong, named in (
        (
            copy.deepcopy(base),
            "first.values must be that of the base with this patch applied: rows of the patch are not",
        ),
        (changed(both, [20], table=1), "second.values must be that of the base with this patch applied, got .*SHA-256"),
    ):
        before = bits(wrong)
        with pytest.raises(ValueError, match=named):
            patch.revert(wrong)
        assert all(map(torch.equal, before, bits(wrong)))


def test_patches_merge_and_their_conflicts_are_listed(make_net):
    base = make_net()
    one = memory_diff(changed(base, [3, 8, 9]), base)
    other_model = changed(base, [4, 8], seed=1)
    with torch.no_grad():
        other_model.first.values.weight[9] = one.tables["first.values"].rows_RV[2]  # both make it the same
        other_model.second.values.weight[1] = 0
    other = memory_diff(other_model, base)
    assert {name: slots.tolist() for name, slots in one.conflicts(other).items()} == {"first.values": [8]}
    with pytest.raises(ValueError, match=r"change the same rows to others: 1 of first.values \(8\)"):
        one.merge(other)
    for prefer, eight in (("self", one), ("other", other)):
        merged = one.merge(other, prefer=prefer)
        assert merged.tables["first.values"].slots_R.tolist() == [3, 4, 8, 9]
        rows = dict(zip([3, 4, 8, 9], merged.tables["first.values"].rows_RV, strict=True))
        place = eight.tables["first.values"].slots_R.tolist().index(8)
        assert torch.equal(rows[8], eight.tables["first.values"].rows_RV[place])
        model = copy.deepcopy(base)
        merged.apply(model)
        assert torch.equal(model.second.values.weight, other_model.second.values.weight)
        merged.revert(model)
        assert same(model, base)
    with pytest.raises(ValueError, match="prefer must be 'self', 'other' or None, got 'mean'"):
        one.merge(other, prefer="mean")
    apart = memory_diff(changed(base, [4, 5]), base)  # of the same table, no row of which both change
    assert one.conflicts(apart) == {}
    assert one.merge(apart).tables["first.values"].slots_R.tolist() == [3, 4, 5, 8, 9]
    elsewhere = changed(base, [30])
    with pytest.raises(ValueError, match="patches must be of one base, got two whose tables first.values differ"):
        one.merge(memory_diff(changed(elsewhere, [3]), elsewhere))


def test_models_that_differ_in_more_than_rows_are_refused_by_name(make_net, tmp_path):
    base = make_net()
    model = changed(base)
    with torch.no_grad():
        model.second.keys.weight += 1
    with pytest.raises(ValueError, match="in rows of tables alone.* but second.keys.weight is another"):
        memory_diff(model, base)
    with pytest.raises(ValueError, match="must have the tables of base, first.values, got first.values, second.values"):
        memory_diff(base, make_net(shared=True))
    with pytest.raises(ValueError, match="at least one memory, got a Linear without"):
        memory_diff(nn.Linear(2, 2), base)
    low = quantize_memory(copy.deepcopy(base), bits=8)
    with pytest.raises(ValueError, match="the table first.values must be of floats: .* got one of 8 bits"):
        memory_diff(low, copy.deepcopy(low))
    layer = MemoryLayer(base.first.config, values=MappedFile(tmp_path / "table"))
    with pytest.raises(ValueError, match="the table values must be whole and in memory, got one in files"):
        memory_diff(layer, layer)


def test_no_change_is_an_empty_patch(make_net, tmp_path):
    base = make_net()
    memory_diff(base, copy.deepcopy(base)).save(tmp_path / "patch")
    patch = MemoryPatch.load(tmp_path / "patch")
    patch.apply(base)
    assert (patch.rows, patch.nbytes, repr(patch)) == (0, 0, "MemoryPatch(nothing; 0 bytes)")


def test_a_damaged_file_and_another_one_are_refused_by_name(make_net, tmp_path):
    base = make_net()
    file = tmp_path / "patch.safetensors"
    memory_diff(changed(base), base).save(file)
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"patch.safetensors' is not: it is damaged: what it holds of first.values"):
        MemoryPatch.load(file)
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="must be one of MemoryPatch.save, .*text' is not"):
        MemoryPatch.load(tmp_path / "text")
