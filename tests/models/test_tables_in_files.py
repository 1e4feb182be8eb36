"""Models whose memories have their tables in files."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlayers import MappedFile, MemoryConfig, add_memory, save_memory
from memlayers.models import causal_lm
from memlayers.optim import MemoryAdamW
from memlayers.values import value_tables

CONFIG = MemoryConfig(dim=32, heads=2, topk=2, num_subkeys=8, query_dim=8)


@pytest.mark.promise(
    "Tables in files", "`add_memory` with tables in files", "supported", "`add_memory(..., values=MappedFile(folder))`"
)
@pytest.mark.parametrize("share_values", [False, True])
def test_each_memory_has_its_table_below_the_place(tmp_path, share_values):
    model = causal_lm("gpt2", layers=2, dim=32, heads=2, context=16, vocab_size=100)
    place = MappedFile(tmp_path / "tables")
    add_memory(model, CONFIG, layers=[1, 2], share_values=share_values, values=place)
    names = ["transformer.h.0.mlp", "transformer.h.1.mlp"][: 1 if share_values else 2]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == names
    assert [table.folder.name for table in value_tables(model)] == names

    ids_BT = torch.randint(100, (2, 16))
    optimizer = MemoryAdamW(model)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for save in (model.save_pretrained, lambda folder: save_memory(model, folder)):
        with pytest.raises(ValueError, match=r"call fill\(\) on it"):
            save(tmp_path / "saved")
    for table in value_tables(model):
        table.fill()
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)


def test_another_place_is_refused(tmp_path):
    model = causal_lm("gpt2", layers=1, dim=32, heads=2, context=16, vocab_size=100)
    with pytest.raises(
        ValueError, match=r"values must be None or the place of tables \(MappedFile, HostMemory\), got '"
    ):
        add_memory(model, CONFIG, layers=[1], values=str(tmp_path))
