"""A layer outside of Python: torch.export, ONNX and TorchScript."""

import io
import logging

import pytest
import torch
from torch import nn

from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus, RowAdam

FIELDS = {"dim": 16, "heads": 2, "topk": 3, "num_subkeys": 6, "query_dim": 8}
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def trained(layer):
    """With statistics, where it has some, that are not the first ones."""
    for name, buffer in layer.named_buffers():
        nn.init.uniform_(buffer, 0.5, 2.0) if "var" in name else nn.init.normal_(buffer)
    return layer.eval()


@torch.no_grad()
def with_ties():
    """Its scores of whole numbers are sums of quarters, exact and often equal."""
    layer = MemoryLayer(MemoryConfig(**FIELDS, query_norm="none", query_bias=False))
    for weight in (layer.query.projections[0].weight, layer.keys.weight):
        weight.copy_((2 * weight).round() / 2)
    return layer


LAYERS = {
    "product": lambda: MemoryLayer(MemoryConfig(**FIELDS)),
    "flat": lambda: MemoryLayer(MemoryConfig(**FIELDS, keys="flat")),
    "experts": lambda: Experts(MemoryConfig(**FIELDS)),
    "memory+": lambda: MemoryPlus(MemoryConfig(**FIELDS, query_norm="rms")),
    "ties": with_ties,
    "other widths": lambda: MemoryLayer(MemoryConfig(**FIELDS, query_hidden=(12,), query_norm="none", value_dim=20)),
}


def batch(batch_size, length):
    mask = torch.ones(batch_size, length, dtype=torch.bool)
    mask[0, :2] = False
    return torch.randn(batch_size, length, 16), mask


@pytest.mark.promise(
    "Export and counting",
    "`torch.export.export` of a layer or a model",
    "supported",
    "with any batch size and length; the program holds PyTorch's own operators alone and loads without this package",
)
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load of torch 2.9
def test_an_exported_layer_is_right_for_other_sizes_and_loads_again():
    layer = trained(LAYERS["product"]())
    program = torch.export.export(layer, batch(2, 5), dynamic_shapes=(DYNAMIC, DYNAMIC))
    assert not [node.target for node in program.graph.nodes if "memlayers" in str(node.target)]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x, mask = batch(3, 7)
    torch.testing.assert_close(torch.export.load(file).module()(x, mask), layer(x, mask))


class AllOf(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, mask):
        return [layer(x, mask) for layer in self.layers]


def test_all_kinds_of_layers_are_exported_whoever_trains_their_tables():
    model = AllOf([trained(make()) for make in LAYERS.values()]).eval()
    optimizer = RowAdam([model.layers[0].values])
    program = torch.export.export(model, batch(2, 5))
    assert not [node.target for node in program.graph.nodes if "memlayers" in str(node.target)]
    given = batch(2, 5)
    for found, expected in zip(program.module()(*given), model(*given), strict=True):
        torch.testing.assert_close(found, expected)
    optimizer.release()


@pytest.mark.promise(
    "Export and counting",
    "`torch.onnx.export(..., dynamo=True)` of a layer",
    "supported",
    "standard operators (TopK, Gather, MatMul), any batch size and length; checked in onnxruntime",
)
@pytest.mark.parametrize(
    ("names", "dynamic_shapes"),
    [
        pytest.param(["ties"], None, id="ties"),
        pytest.param(LAYERS, (DYNAMIC, DYNAMIC), marks=pytest.mark.slow, id="other sizes"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.onnx's own
def test_onnxruntime_computes_what_a_layer_does(names, dynamic_shapes, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(logging.getLogger("torch.onnx"), "disabled", True)
    model = AllOf([trained(LAYERS[name]()) for name in names]).eval()
    program = torch.onnx.export(model, batch(2, 5), dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "layers.onnx")
    session = runtime.InferenceSession(tmp_path / "layers.onnx", providers=["CPUExecutionProvider"])
    x, mask = batch(2, 5) if dynamic_shapes is None else batch(3, 7)
    x = x.round()
    given = {place.name: value.numpy() for place, value in zip(session.get_inputs(), (x, mask), strict=True)}
    for found, expected in zip(session.run(None, given), model(x, mask), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.promise(
    "Export and counting",
    "`torch.jit.trace`, `torch.jit.script`, `torch.onnx.export(..., dynamo=False)`",
    "refused",
    "`torch.export.export`, or `torch.onnx.export(..., dynamo=True)`",
)
@pytest.mark.parametrize(
    "export",
    [lambda model: torch.jit.trace(model, torch.randn(2, 5, 16)), lambda model: torch.jit.script(model)],
    ids=["trace", "script"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_torchscript_is_refused_in_words(export):
    model = nn.Sequential(nn.Linear(16, 16), LAYERS["product"]().eval())
    with pytest.raises(ValueError, match="TorchScript cannot hold a memory layer: use torch.export"):
        export(model)
