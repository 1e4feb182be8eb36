"""What is trained for: the loss of a model on a batch, and whether it trains anything."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.diagnosis.findings import Answer, fails, passed
from memlayers.listening import floating


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes, or a fixed random projection of its first floating output."""
    if isinstance(batch, Mapping):
        output = model(**_with_labels(model, batch))
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(value, Tensor):
        return value
    first = next(floating(output), None)
    if first is None:
        raise ValueError(f"loss must be given for a model that returns no floating tensor, got {type(output).__name__}")
    # Not a mean of squares, which has no gradient behind a norm.
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(first.shape, generator=generator).to(first.device, torch.float32)
    tokens = max(1, first.numel() // max(1, first.shape[-1] if first.ndim else 1))
    return (first.float() * direction).sum() / tokens


def check_loss(value: Any, *, counts: bool) -> Answer:
    """The loss is a finite number that depends on something trainable; counts: there is a label that counts.

    Raises `ValueError` for what is no single number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must be a tensor of one number, got {got}")
    if not value.requires_grad:
        return fails("it depends on nothing that requires a gradient", "unfreeze what is trained")
    number = float(value.detach())
    if not counts:
        return fails(
            f"it is {number:.4g}: no label counts (all are -100, or first of a sequence)", "give a batch with labels"
        )
    if number - number != 0:
        return fails(f"it is {number}", "look at the batch, and at the model's parameters")
    return passed(f"{number:.4g}, finite")


def has_labels(model: nn.Module, batch: Any) -> bool:
    """Whether any label counts, where there are some."""
    labels = _with_labels(model, batch).get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return True
    if _is_causal_lm(model):  # the first of a sequence is predicted by nothing
        labels = labels[..., 1:]
    return bool((labels != -100).any())


def _with_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(batch)
    if "input_ids" in given and "labels" not in given and _is_causal_lm(model):
        ids, mask = given["input_ids"], given.get("attention_mask")
        fits = mask is not None and mask.shape == ids.shape
        given["labels"] = ids.masked_fill(mask == 0, -100) if fits else ids
    return given


def _is_causal_lm(model: nn.Module) -> bool:
    """By the names of classes; also inside of what wraps it."""
    names = {kind.__name__ for module in (model, *model.modules()) for kind in type(module).__mro__}
    has_head = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    forward = getattr(model, "_orig_mod", model).forward
    parameters = inspect.signature(forward).parameters.values()
    return has_head and any(entry.name == "labels" or entry.kind is entry.VAR_KEYWORD for entry in parameters)
