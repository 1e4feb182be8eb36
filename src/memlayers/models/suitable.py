"""Whether a memory can stand at a module: what the module takes and returns, as far as that can be told."""

import inspect
from typing import Any

import torch
from torch import nn

from memlayers.models.install import tensor_like
from memlayers.models.placement import MemoryPlacement


def require_suitable(model: nn.Module, name: str, placement: MemoryPlacement) -> None:
    """Raises `ValueError` for a module whose weights were moved away, or that a memory cannot replace.

    A memory takes hidden states and returns as many. One beside a module can do without what else it takes or returns;
    one in its place cannot.
    """
    module = model.get_submodule(name)
    parameters = [*module.parameters()]
    if any(parameter.is_meta for parameter in parameters) and any(
        hasattr(part, "_hf_hook") for part in model.modules()
    ):
        raise ValueError(
            f"model must have its weights in place, got {name!r} with weights that accelerate has offloaded: add "
            f"memories first, then dispatch the model"
        )
    if placement.mode != "replace":
        return
    needed = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:
        raise ValueError(
            f"layers must name modules that need hidden states alone in mode 'replace', got {name!r}, which needs "
            f"{', '.join(needed)}: use mode='parallel'"
        )
    if (returned := _returned(model, name, placement.config.dim)) is not None:
        raise ValueError(
            f"layers must name modules that return as many hidden states as they take in mode 'replace', got {name!r}, "
            f"which returns {returned}: use mode='parallel'"
        )


@torch.no_grad()
def _returned(model: nn.Module, name: str, dim: int) -> str | None:
    """What the module makes of two tokens, if that is no two tokens; None also where it cannot be tried."""
    module, like = model.get_submodule(name), tensor_like(model, name)
    if like.is_meta:
        return None
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        output: Any = module(torch.zeros(1, 2, dim, device=like.device, dtype=like.dtype))
    except Exception:  # it wants something else than [batch, tokens, width], and says it to whoever calls it
        return None
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not isinstance(output, torch.Tensor):
        return f"a {type(output).__name__}"
    return None if output.shape == (1, 2, dim) else f"[1, 2, {dim}] as {[*output.shape]}"
