"""Models with memories outside of Python, and what is counted of them."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments

from memlayers.layer import MemoryLayer, layer_class
from memlayers.models import memory_layers

DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def batch(batch_size, length):
    ids, mask = torch.randint(40, (batch_size, length)), torch.ones(batch_size, length, dtype=torch.int64)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_equal_at_tokens(found, expected, mask):
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.promise(
    "Export and counting",
    "`torch.export.export` of a Hugging Face model with `attention_mask`",
    "supported",
    "with `use_cache=False`; any batch size and length",
)
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_an_exported_model_takes_masks_of_other_sizes(with_memory, family):
    given = batch(2, 5)
    shapes = dict.fromkeys(given, DYNAMIC)
    program = torch.export.export(
        with_memory, (), given | {"use_cache": False}, dynamic_shapes=shapes | {"use_cache": None}
    )
    other = batch(3, 7)
    found = program.module()(**other, use_cache=False).logits
    assert_equal_at_tokens(found, with_memory(**other).logits, other["attention_mask"])
    # PyTorch has made classes of the same names around its modules meanwhile, and they stay.
    assert layer_class("MemoryLayer") is MemoryLayer


@pytest.mark.promise(
    "Export and counting",
    "`torch.onnx.export(..., dynamo=True)` of a Hugging Face model with `attention_mask`",
    "supported",
    "with `use_cache=False`; any batch size and length; checked in onnxruntime for GPT-2 and Llama",
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.onnx's own
def test_onnxruntime_computes_what_a_model_does(with_memory, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(logging.getLogger("torch.onnx"), "disabled", True)
    given = batch(2, 5)
    shapes = dict.fromkeys(given, DYNAMIC)
    program = torch.onnx.export(
        with_memory,
        (),
        kwargs=given | {"use_cache": False},
        dynamo=True,
        dynamic_shapes=shapes | {"use_cache": None},
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    other = batch(3, 7)
    (found,) = session.run(None, {name: value.numpy() for name, value in other.items()})
    assert_equal_at_tokens(torch.from_numpy(found), with_memory(**other).logits, other["attention_mask"])


@pytest.mark.promise(
    "Export and counting",
    "Trainer's `total_flos`",
    "supported",
    "leaves tables out, as it does embeddings (`num_parameters(exclude_embeddings=True)`): a token reads few rows",
)
@pytest.mark.parametrize("family", ["gpt2"])
def test_trainer_does_not_count_the_operations_of_a_whole_table(with_memory, tmp_path):
    trainer = Trainer(with_memory, TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    table, embeddings = 36 * 16, (40 + 32) * 16  # one table, of both memories
    counted = with_memory.num_parameters() - table - embeddings
    assert trainer.floating_point_ops(batch(2, 5)) == 6 * 10 * counted
    for memory in memory_layers(with_memory).values():
        memory.values.weight.requires_grad_(False)
    assert with_memory.num_parameters(exclude_embeddings=True) == counted
    assert with_memory.num_parameters(only_trainable=True, exclude_embeddings=True) == counted
