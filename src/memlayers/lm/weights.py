"""The weights of a run's model in a folder: all of them, or the memories alone where their base is frozen."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from memlayers.models.add import save_memory, trainable_base
from memlayers.models.folder import MEMORY_CONFIG_NAME, holds_memory_alone
from memlayers.models.storage import refill_memory
from memlayers.values import left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_weights(model: "PreTrainedModel", folder: Path) -> None:
    """Write them: as `save_memory` does if nothing else is trained, else as `save_pretrained` does."""
    if trainable_base(model):
        model.save_pretrained(folder)
    else:
        save_memory(model, folder)


def load_weights(
    model: "PreTrainedModel", folder: Path, *, beside: tuple[str, ...] = (), without_tables: bool = False
) -> None:
    """Take weights from a verified folder, straight from the disk. Raises `ValueError` for those of another model.

    Args:
        model: One like that which was saved; a memory alone goes into one beside the same base.
        folder: What `save_weights` wrote.
        beside: Files of the folder that are none of the model's.
        without_tables: Those of tables in files are not in the folder.
    """
    if holds_memory_alone(folder / MEMORY_CONFIG_NAME):
        refill_memory(model, folder)
        return
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in beside:
            weights |= load_file(file)
    with left_out(model):
        held = model.state_dict(keep_vars=True)
    result = model.load_state_dict(weights, strict=False)
    loaded = {id(held[name]) for name in weights if name in held}
    missing = [name for name in result.missing_keys if name in held or not without_tables]
    missing = [name for name in missing if name not in held or id(held[name]) not in loaded]  # tied: stored once
    if missing or result.unexpected_keys:
        raise ValueError(f"{folder} is not of this model: missing {missing}, unknown {result.unexpected_keys}")
