"""The layer and the textbook layer with the same weights, on one table.

Letters: T tokens, D model width, S slots, V value width.
"""

import torch
from torch import Tensor

from memlayers.bench.baselines import TextbookMemory
from memlayers.bench.shapes import Shape
from memlayers.layer import MemoryLayer
from memlayers.minimal import MinimalMemory
from memlayers.values import ValueTable

# Rows of different values; prime, so that a slot which is wrong in its row or its column of the grid reads other
# values. Filling gigabytes with random numbers would take longer than measuring.
_DISTINCT_ROWS = 1021


def make_table(shape: Shape, device: torch.device) -> Tensor:
    """A table [S, V] in float32, every page of it written."""
    table_SV = torch.empty(shape.slots, shape.value_dim, device=device)
    rows = torch.randn(min(_DISTINCT_ROWS, shape.slots), shape.value_dim, device=device) * shape.value_dim**-0.5
    for start in range(0, shape.slots, len(rows)):
        piece = table_SV[start : start + len(rows)]
        piece.copy_(rows[: len(piece)])
    return table_SV


def table_of(values_SV: Tensor) -> ValueTable:
    """A value table whose rows are this tensor, not a copy."""
    table = ValueTable(1, 1, device="meta")
    table.weight = torch.nn.Parameter(values_SV)
    table.settle_mark()
    return table


def make_textbook(shape: Shape, values_SV: Tensor) -> TextbookMemory:
    """Random weights, and BatchNorm statistics as if it had been trained on random tokens."""
    textbook = TextbookMemory(shape, values_SV)
    with torch.no_grad():
        query_TF = textbook.query(torch.randn(256, shape.dim, device=values_SV.device))
        textbook.load_state_dict(
            {"norm.running_mean": query_TF.mean(0), "norm.running_var": query_TF.var(0)}, strict=False
        )
        torch.nn.init.normal_(textbook.norm.weight, mean=1.0, std=0.1)
        torch.nn.init.normal_(textbook.norm.bias, std=0.1)
    return textbook


def share_textbook(textbook: TextbookMemory, shape: Shape, *, sparse: bool) -> TextbookMemory:
    """Another textbook layer with weights of its own, but on the same table."""
    other = TextbookMemory(shape, textbook.values.data, sparse=sparse)
    weights = {name: value for name, value in textbook.state_dict().items() if name != "values"}
    other.load_state_dict(weights, strict=False)
    return other


def make_layer(textbook: TextbookMemory, shape: Shape) -> MemoryLayer:
    """Our layer with the weights of the textbook layer, on the same table."""
    values_SV = textbook.values.data
    layer = MemoryLayer(shape.config(), values=table_of(values_SV), device=values_SV.device)
    given, own = textbook.state_dict(), layer.state_dict()
    del own["values.weight"]  # the same tensor already
    layer.load_state_dict({name: given[_textbook_name(name)].view_as(own[name]) for name in own}, strict=False)
    return layer


def make_minimal(textbook: TextbookMemory, shape: Shape) -> MinimalMemory:
    """The one-page layer with the same weights; it has no output projection."""
    assert shape.value_dim == shape.dim
    with torch.device("meta"):
        minimal = MinimalMemory(shape.dim, shape.heads, shape.topk, shape.num_subkeys, shape.query_dim)
    weights = {name: value.detach().clone() for name, value in textbook.state_dict().items()}
    minimal.load_state_dict(weights, assign=True)
    return minimal.requires_grad_()


def layer_gradients(layer: MemoryLayer) -> dict[str, Tensor | None]:
    """The gradients of our layer under the names and in the shapes of the textbook's parameters."""
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in layer.named_parameters():
        if parameter is layer.values.row_mark:  # no weight
            continue
        name, grad = _textbook_name(name), parameter.grad
        gradients[name] = grad.flatten() if grad is not None and name.startswith("norm.") else grad
    return gradients


def _textbook_name(name: str) -> str:
    """What a parameter or buffer of our layer is called in the textbook layer."""
    renamed = {"query.projections.0": "query", "query.norm": "norm", "keys.weight": "keys", "values.weight": "values"}
    for own, textbook in renamed.items():
        name = name.replace(own, textbook)
    return name
