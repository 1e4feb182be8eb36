"""save_memory: what was added to a model, without the model."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from memlayers.files import file_sha256, write_sealed
from memlayers.models.added import (
    added_memories,
    added_tensors,
    at_names,
    empty_memories,
    memory_of,
    memory_tensors,
    placement_of,
)
from memlayers.models.card import CARD, card, keeps_card
from memlayers.models.files import MEMORY_CONFIG_NAME, written_aside
from memlayers.models.identity import BaseIdentity, base_buffers, identity_of, recorded_base
from memlayers.models.memory_folder import FORMAT, WEIGHTS, is_whole_model
from memlayers.models.mixin import MemoryMixin
from memlayers.models.unwrapping import unwrap
from memlayers.models.wrappers import MemoryWrapper
from memlayers.version import __version__


def save_memory(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Saves what `add_memory` added, and what base model it belongs to; the base itself is not in the files.

    For `load_memory`; for a model of `transformers` also for `from_pretrained`, which then takes the base from where it
    came from. The folder can be uploaded as it is. Files are written aside, flushed and moved into place: a save that
    fails leaves those of an earlier one as they were.

    Args:
        model: one with memories; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too. What PEFT
            has added is not saved with it: save adapters by themselves, to another folder.
        folder: made if it is not there; memories that are in it are replaced.
        max_shard_size: of a file, in bytes or as "5GB". A tensor that is larger gets a file of its own.

    Raises:
        ValueError: a model without memories, or one whose base was trained along and would be lost; a folder with a
            whole model in it. Nothing is written then.
    """
    inner, target = unwrap(model), Path(folder)
    _check_size(max_shard_size)
    wrappers = added_memories(inner)
    names = list(wrappers)
    placement = at_names(placement_of(inner, wrappers), names)
    tensors = added_tensors(wrappers)
    base = check_savable(inner)
    if target.is_dir() and is_whole_model(target):
        raise ValueError(f"folder must not hold a whole model, got {str(target)!r}: name a folder of its own")
    auto_class = inner.auto_class_name if isinstance(inner, MemoryMixin) else None
    with written_aside(target, replaces=WEIGHTS) as aside:
        files = _write_weights(aside, tensors, max_shard_size, mode=target.stat().st_mode & 0o666)
        if isinstance(inner, MemoryMixin) and auto_class is not None:
            _write_model_config(inner, aside)
        write_sealed(
            aside / MEMORY_CONFIG_NAME,
            {
                "format": FORMAT,
                "memlayers": __version__,
                "memory": placement.to_dict(),
                "names": names,
                "base": base.to_dict(),
                "files": files,
            },
        )
        if not keeps_card(target):
            parameters = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))
            text = card(placement, names, base, parameters, auto_class=auto_class)
            (aside / CARD).write_text(text, encoding="utf-8")


def check_savable(model: nn.Module) -> BaseIdentity:
    """The identity of the base of `model`. Raises the `ValueError` of `save_memory` for a model that it cannot save."""
    inner = unwrap(model)
    wrappers = added_memories(inner)
    _check_tensors(inner, wrappers, added_tensors(wrappers))
    return _base_of(inner)


def _check_size(size: object) -> None:
    is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    if isinstance(size, str):
        number, unit = size.strip()[:-2], size.strip()[-2:].upper()
        is_size = (
            unit in ("KB", "MB", "GB", "TB") and number.strip().replace(".", "", 1).isdecimal() and float(number) > 0
        )
    if not is_size:
        raise ValueError(f"max_shard_size must be a number of bytes of at least 1 or a text as '5GB', got {size!r}")


def _check_tensors(model: nn.Module, wrappers: Mapping[str, MemoryWrapper], tensors: Mapping[str, Tensor]) -> None:
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"model must hold the weights of its memories, got {meta[0]} on the meta device")
    # What can be built again: the same as memories that were just made, neither more (adapters) nor less.
    memories = empty_memories(model, placement_of(model, wrappers), _real_names(model, wrappers))
    fresh = memory_tensors(dict(zip(wrappers, memories, strict=True)))
    for name, wrapper in wrappers.items():
        kind = type(memory_of(wrapper)).__name__
        expected = {key for key in fresh if key.startswith(f"{name}.")}
        found = {key for key in tensors if key.startswith(f"{name}.")} - {f"{name}.gate"}
        if expected != found:
            raise ValueError(
                f"{name}.memory must hold what a new {kind} holds, differs in {min(expected ^ found)}: merge or unload "
                f"adapters in memories first"
            )


def _real_names(model: nn.Module, wrappers: Mapping[str, MemoryWrapper]) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(wrapper)] for wrapper in wrappers.values()]


def _base_of(model: nn.Module) -> BaseIdentity:
    """The identity of the base. Raises `ValueError` if it is no longer what `add_memory` was given."""
    now, before = identity_of(model), recorded_base(model)
    if before is None:
        return now
    if differing := before.differing(now):
        advice = "save a base that was trained along with save_pretrained, or freeze it"
        if set(differing) <= base_buffers(model):
            modules = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in differing))
            advice = (
                f"running statistics move in train(), frozen or not; put {modules} in eval() before training (and "
                f"after every train() of the model), or save the whole model with save_pretrained"
            )
        raise ValueError(
            f"model must have the base that its memories were added to: {len(differing)} of {len(before.tensors)} "
            f"tensors of it have changed since, the first is {differing[0]!r}. save_memory keeps the memories only: "
            f"{advice}"
        )
    # As they were, before any rounding since; what was not there yet (meta), as it is now.
    tensors = {name: known if known.values else now.tensors[name] for name, known in before.tensors.items()}
    return BaseIdentity(**{**vars(before), "tensors": tensors})


def _write_weights(aside: Path, tensors: dict[str, Tensor], size: int | str, *, mode: int) -> dict[str, Any]:
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="memory{suffix}.safetensors", max_shard_size=size
    )
    files = {}
    for name, keys in split.filename_to_tensors.items():
        # Only what is on another device is copied, a file's worth at a time.
        shard = {key: tensors[key].detach().cpu().contiguous() for key in keys}
        save_file(shard, aside / name, metadata={"format": "pt"})
        del shard
        (aside / name).chmod(mode)  # safetensors keeps its files from others
        files[name] = {"size": (aside / name).stat().st_size, "sha256": file_sha256(aside / name)}
    return files


def _write_model_config(model: MemoryMixin, aside: Path) -> None:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    # How the base was loaded; the next one may load it otherwise.
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(aside)
