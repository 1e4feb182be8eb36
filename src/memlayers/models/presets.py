"""memory_preset: settings of known worth, as the arguments of `add_memory`."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from memlayers.checks import require_choice
from memlayers.config import MemoryConfig
from memlayers.layer import MemoryLayer
from memlayers.memory_plus import MemoryPlus
from memlayers.models.modules import unwrap
from memlayers.models.targets import Layers, default_layer, hidden_size, num_blocks

PRESETS = ("paper", "memory_plus", "retrofit")
_STRIDE = 8  # blocks between two memories of "memory_plus"


def memory_preset(name: str, model: nn.Module, layers: Layers | None = None, **fields: Any) -> dict[str, Any]:
    """The arguments of `add_memory` for `model`: ``add_memory(model, **memory_preset("retrofit", model))``.

    - "paper": a memory in place of one FFN at three quarters of the depth; 262,144 slots, 4 heads of 32 slots, query
      BatchNorm (Lample et al. 2019, section 4.1).
    - "memory_plus": `MemoryPlus` in place of three FFNs around the middle, 8 blocks apart or a third of the depth in
      shallower models, which share one table of 1,048,576 slots (Berges et al. 2024, section 3).
    - "retrofit": for a pretrained model: one memory of 65,536 slots beside the FFN at three quarters of the depth,
      behind a gate; query RMSNorm, which knows no batch.

    Args:
        name: one of these.
        model: what it is for; says width and depth.
        layers: other modules than the preset's, as in `add_memory`; needed where a model does not say its depth.
        fields: of `MemoryConfig`, instead of the preset's; `dim` is needed where a model does not say its width.

    Raises:
        ValueError: an unknown name or field, a value that is not allowed, or a model that does not say its sizes.
    """
    require_choice("name", name, PRESETS)
    inner = unwrap(model)
    if "dim" not in fields and not isinstance(inner, PreTrainedModel):
        raise ValueError(f"dim must be given for a {type(inner).__name__}, which does not say its width: dim=...")
    dim = fields.pop("dim") if "dim" in fields else hidden_size(inner)
    if layers is None:
        blocks = num_blocks(inner)
        layers = _spread(blocks) if name == "memory_plus" else [default_layer(blocks)]
    settings: dict[str, Any] = {
        "paper": {"heads": 4, "topk": 32, "num_subkeys": 512, "query_dim": 512, "query_norm": "batch"},
        "memory_plus": {"heads": 4, "topk": 32, "num_subkeys": 1024, "query_dim": 512, "query_norm": "none"},
        "retrofit": {"heads": 4, "topk": 32, "num_subkeys": 256, "query_dim": 256, "query_norm": "rms"},
    }[name]
    return {
        "config": MemoryConfig.from_dict({"dim": dim, **settings, **fields}),
        "layers": layers,
        "mode": "parallel" if name == "retrofit" else "replace",
        "kind": MemoryPlus if name == "memory_plus" else MemoryLayer,
        "share_values": name == "memory_plus",
    }


def _spread(blocks: int) -> list[int]:
    """Up to three blocks, counted from 1, as far apart as they may be, the second in the middle."""
    middle = (blocks + 1) // 2
    stride = min(_STRIDE, max(1, blocks // 3))
    return [block for block in (middle - stride, middle, middle + stride) if 1 <= block <= blocks]
