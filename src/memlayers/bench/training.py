"""Training steps that share one table and one pair of moments, so that all of them fit where one does.

Letters: T tokens, D model width, S slots, V value width.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.bench.baselines import PackageMemory, TextbookMemory, why_not
from memlayers.bench.layers import make_layer, make_table, make_textbook, share_textbook
from memlayers.bench.machine import references
from memlayers.bench.shapes import Shape
from memlayers.layer import MemoryLayer
from memlayers.ops.row_step import row_adam_
from memlayers.ops.row_sum import Part
from memlayers.optim import RowAdam

REFERENCE = "ours on its references"  # the same layer and optimizer, without kernels
REFERENCE_ON_GPU = (
    f"{REFERENCE}: the time includes waiting, as the selection copies lists to the device, and many small launches; "
    "it is not that of its kernels alone"
)
OURS, DENSE, SPARSE, PACKAGE = "ours", "textbook, fused Adam", "textbook, SparseAdam", "product-key-memory, fused Adam"
TRAINED = (OURS, DENSE, SPARSE, PACKAGE)

# SparseAdam takes its seconds whatever the table, so one shape of the bars is enough.
_SPARSE_ADAM_SLOTS = 2**18
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Moments:
    """Adam's state of the table, which every optimizer here works on in its turn."""

    exp_avg_SV: Tensor
    exp_avg_sq_SV: Tensor

    @classmethod
    def of(cls, table_SV: Tensor, dtype: torch.dtype | None = None) -> "Moments":
        """Zeros, every page of them written; in the dtype of the table if none is given."""
        return cls(*(torch.empty_like(table_SV, dtype=dtype).zero_() for _ in range(2)))


def contender_bytes(name: str, shape: Shape) -> int:
    """What a training step holds at its peak: table, two moments, and what is its own."""
    row_bytes = 4 * shape.value_dim
    touched = min(shape.reads, shape.slots)
    own = {
        OURS: touched * row_bytes,
        REFERENCE: 2 * touched * row_bytes,
        DENSE: shape.table_bytes,
        PACKAGE: shape.table_bytes,
        SPARSE: 2 * shape.reads * row_bytes + 5 * touched * row_bytes,  # as recorded, coalesced, and what Adam makes
    }[name]
    return 3 * shape.table_bytes + own + shape.workspace_bytes


def takes_part(name: str, shape: Shape) -> bool:
    """Whether a contender is measured at a shape at all."""
    return name != SPARSE or shape.slots <= _SPARSE_ADAM_SLOTS


def make_steps(
    names: tuple[str, ...], shape: Shape, device: torch.device, dtype: str = "float32"
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """A training step of each: forward, backward, update. Second, a line for each that does not run.

    dtype: float32; bfloat16 for all, moments included; or autocast, of float32 weights in the forward pass.
    """
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    table_SV = make_table(shape, device).to(kind)
    moments = Moments.of(table_SV)
    textbook = make_textbook(shape, table_SV)
    x_TD = torch.randn(shape.tokens, shape.dim, device=device, dtype=kind)
    grad_TD = torch.randn_like(x_TD)
    steps, notes = {}, []
    for name in names:
        try:
            module, optimizers = _make(name, shape, textbook, moments, kind)
            step = _step(module.train(), optimizers, x_TD, grad_TD, autocast=dtype == "autocast")
            if name == REFERENCE:
                step = _on_references(step)
            if name == PACKAGE:
                step()  # it may fail where it runs as well as where it is built
        except Exception as error:
            if name != PACKAGE:
                raise
            notes.append(f"product-key-memory: {why_not(error)}")
            continue
        steps[name] = step
    return steps, notes


def _make(
    name: str, shape: Shape, textbook: TextbookMemory, moments: Moments, kind: torch.dtype = torch.float32
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    if name in (OURS, REFERENCE):
        layer = make_layer(textbook, shape)
        layer = layer if kind == torch.float32 else layer.to(kind)
        return layer, our_optimizers(layer, moments)
    if name == PACKAGE:
        package = PackageMemory(shape, textbook.values.data)
        return package, [_fused_adam(list(package.parameters()), package.values, moments)]
    other = share_textbook(textbook, shape, sparse=name == SPARSE).to(kind)
    if name == DENSE:
        return other, [_fused_adam(list(other.parameters()), other.values, moments)]
    sparse = torch.optim.SparseAdam([other.values], lr=_LEARNING_RATE)
    sparse.state[other.values] = {"step": 0, **_adam_state(moments)}
    rest = [parameter for parameter in other.parameters() if parameter is not other.values]
    return other, [sparse, torch.optim.Adam(rest, lr=_LEARNING_RATE, fused=True)]


def our_optimizers(layer: MemoryLayer, moments: Moments) -> list[torch.optim.Optimizer]:
    """`RowAdam` for the table, fused Adam for the rest."""
    rest = [parameter for name, parameter in layer.named_parameters() if not name.startswith("values.")]
    rows = RowAdam(layer.values, lr=_LEARNING_RATE)
    steps_S = torch.zeros(len(moments.exp_avg_SV), dtype=torch.int32, device=moments.exp_avg_SV.device)
    rows.state[layer.values.weight] = {**_adam_state(moments), "steps": steps_S}
    return [rows, torch.optim.Adam(rest, lr=_LEARNING_RATE, fused=True)]


def _on_references(step: Callable[[], None]) -> Callable[[], None]:
    def reference() -> None:
        with references():
            step()

    return reference


def make_row_step(table_SV: Tensor, moments: Moments, steps_S: Tensor, part: Part) -> Callable[[], None]:
    """A step of `RowAdam` as its optimizer takes it: a bfloat16 table is rounded stochastically."""
    seeds = itertools.count() if torch.bfloat16 in (table_SV.dtype, moments.exp_avg_SV.dtype) else itertools.repeat(-1)
    slots_TR, weights_TR, grad_TV = part

    def step() -> None:
        row_adam_(
            table_SV, moments.exp_avg_SV, moments.exp_avg_sq_SV, steps_S, [slots_TR], [weights_TR], [grad_TV],
            lr=_LEARNING_RATE, beta1=0.9, beta2=0.999, eps=1e-8, seed=next(seeds),
        )  # fmt: skip

    return step


def row_step_bytes(table_SV: Tensor, moments: Moments, steps_S: Tensor, part: Part) -> float:
    """What a row step must move: rows that were read and their states in and out, the part of the gradient in."""
    columns = table_SV.itemsize + moments.exp_avg_SV.itemsize + moments.exp_avg_sq_SV.itemsize
    row_bytes = 2 * (table_SV.shape[1] * columns + steps_S.itemsize)
    return float(len(part.slots_TK.unique()) * row_bytes + sum(tensor.nbytes for tensor in part))


def _fused_adam(parameters: list[nn.Parameter], table: Tensor, moments: Moments) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE, fused=True)
    optimizer.state[table] = {"step": torch.zeros((), device=table.device), **_adam_state(moments)}
    return optimizer


def _adam_state(moments: Moments) -> dict[str, Any]:
    return {"exp_avg": moments.exp_avg_SV, "exp_avg_sq": moments.exp_avg_sq_SV}


def _step(
    module: nn.Module, optimizers: list[torch.optim.Optimizer], x_TD: Tensor, grad_TD: Tensor, *, autocast: bool = False
) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(x_TD.device.type, torch.bfloat16, enabled=autocast):
            y_TD = module(x_TD)
        y_TD.backward(grad_TD.to(y_TD.dtype))
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:  # frees the gradients, so that the next contender finds room
            optimizer.zero_grad()

    return step
