"""Sweeps: the cost of ours and of the textbook layer against slots, neighbours, or tokens."""

import dataclasses
from collections.abc import Iterator

import torch

from memlayers.bench import gate
from memlayers.bench.cases import Bench, call_of, time_training
from memlayers.bench.layers import make_layer, make_table, make_textbook
from memlayers.bench.result import OURS, Result
from memlayers.bench.shapes import Axis, Shape, sweep
from memlayers.bench.training import DENSE, contender_bytes
from memlayers.layer import MemoryLayer

FORWARD, TRAINING = "forward", "training step"
_NARROW = 256  # of values, where wider ones do not fit
_FLAT_SLOTS = 2**14  # searching more keys than this takes seconds


def sweep_axis(bench: Bench, axis: Axis, base: Shape) -> Iterator[Result]:
    """Forward in evaluation, and a training step, at each value of the axis."""
    for shape in sweep(axis, base):
        yield _forward(bench, axis, *_fitting(bench, shape, shape.table_bytes + shape.workspace_bytes))
        # BatchNorm cannot be trained on one token.
        if shape.tokens > 1:
            narrower, notes = _fitting(bench, shape, contender_bytes(OURS, shape))
            result = time_training(bench, axis, narrower, (OURS, DENSE), TRAINING)
            yield dataclasses.replace(result, notes=(*notes, *result.notes))


def _fitting(bench: Bench, shape: Shape, needed: int) -> tuple[Shape, tuple[str, ...]]:
    """The shape, or one with narrower values where that would not fit."""
    lack = bench.lacks(needed)
    if lack is None or shape.value_dim <= _NARROW:
        return shape, ()
    narrower = dataclasses.replace(shape, value_dim=_NARROW)
    return narrower, (f"values of width {_NARROW}: width {shape.value_dim} {lack}",)


@torch.no_grad()
def _forward(bench: Bench, axis: Axis, shape: Shape, notes: tuple[str, ...]) -> Result:
    lack = bench.lacks(shape.table_bytes + shape.workspace_bytes)
    if lack:
        return Result(case=axis, part=FORWARD, shape=shape, notes=(*notes, lack))
    textbook = make_textbook(shape, make_table(shape, bench.device)).eval()
    layer = make_layer(textbook, shape).eval()
    x_TD = gate.draw_tokens(shape, textbook)
    gate.check_outputs(shape, layer, textbook, x_TD)
    contenders = {OURS: call_of(layer, x_TD), "textbook": call_of(textbook, x_TD)}
    if axis == "slots" and shape.slots <= _FLAT_SLOTS:
        config = dataclasses.replace(shape.config(), keys="flat")
        flat = MemoryLayer(config, values=layer.values, device=bench.device).eval()
        contenders["flat keys"] = call_of(flat, x_TD)
    return Result(case=axis, part=FORWARD, shape=shape, samples=bench.watch.rounds(contenders), notes=notes)
