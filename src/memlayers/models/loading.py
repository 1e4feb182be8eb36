"""load_memory: what `save_memory` saved, into a base model; and a base and its memory at once."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from memlayers.layer import MemoryLayer, memory_layers
from memlayers.models.add import attach
from memlayers.models.added import (
    added_memories,
    added_tensors,
    at_names,
    empty_memories,
    memory_tensors,
    placement_of,
)
from memlayers.models.configs import MemoryConfigMixin
from memlayers.models.files import MEMORY_CONFIG_NAME
from memlayers.models.identity import BaseIdentity, base_name, identity_of
from memlayers.models.install import tensor_like
from memlayers.models.memory_folder import (
    check_files,
    holds_memory_alone,
    is_damaged_memory,
    local_folder,
    read_description,
    stored_tensors,
)
from memlayers.models.placement import MemoryPlacement
from memlayers.models.targets import names_of
from memlayers.models.unwrapping import unwrap
from memlayers.models.wrappers import ParallelMemory

Model = TypeVar("Model", bound=nn.Module)

CHUNK = 2**25  # bytes of a file that are read at once


def load_memory(model: Model, folder: str | os.PathLike[str], *, check_base: bool = True) -> Model:
    """Puts the memories that `save_memory` saved into their base model, in place.

    The model then gives the outputs of the one that was saved, bit for bit in the same precision. Its class changes as
    with `add_memory`. Weights go straight to their device: no table is held twice.

    Args:
        model: the base, without memories; one that `torch.compile` or PEFT is around, too.
        folder: what `save_memory` wrote; or the name of a repository of the Hub, which is fetched.
        check_base: compare a few values of every tensor of `model` with those of the base that was saved with. False:
            take any base into which the memories fit.

    Returns:
        `model` itself. Memories stand on the device, in the dtype and in the mode (train or eval) of their module.

    Raises:
        ValueError: a folder that `save_memory` did not write, or a file of it that is missing or damaged; another base;
            a model that has memories already. The model is then as it was.
    """
    inner = unwrap(model)
    if memories := memory_layers(inner):
        raise ValueError(f"model must have no memory yet, got one with {', '.join(memories)}")
    path = local_folder(folder)
    description = read_description(path)
    placement = MemoryPlacement.from_dict(description["memory"])
    check_files(path, description["files"])
    names = _names_in(inner, placement, description["names"])
    if check_base:
        without = names if placement.mode == "replace" else []
        _check_base(BaseIdentity.from_dict(description["base"]), identity_of(inner, without), path)

    placement = at_names(placement, names)
    by_name = dict(zip(description["names"], empty_memories(inner, placement, names), strict=True))
    stored = stored_tensors(path, description["files"])
    gates = [f"{name}.gate" for name in by_name] if placement.mode == "parallel" else []
    _check_shapes(path, stored, memory_tensors(by_name), {key: [placement.config.dim] for key in gates})
    for name, memory in zip(names, by_name.values(), strict=True):
        like = tensor_like(inner, name)
        if like.is_meta:
            raise ValueError(f"model must hold its weights, got {name} on the meta device")
        _allocate(memory, like.device)
    for key, tensor in memory_tensors(by_name).items():
        _fill(tensor, stored[key][0], key)
    read_gates = [_read(stored[key][0], key) for key in gates]

    attach(inner, placement, names, [*by_name.values()])
    for name, gate in zip(names, read_gates, strict=False):
        wrapper = inner.get_submodule(name)
        assert isinstance(wrapper, ParallelMemory)
        wrapper.gate.data.copy_(gate)
    return model


def refill_memory(model: nn.Module, folder: Path) -> None:
    """Gives memories that are in a model the values that `save_memory` saved; tensors stay the objects that they are.

    Raises `ValueError` as `load_memory` does, and for memories that are not as those that were saved. The model is then
    as it was.
    """
    inner = unwrap(model)
    description = read_description(folder)
    wrappers = added_memories(inner)
    names = list(wrappers)
    placement = at_names(placement_of(inner, wrappers), names)
    if names != description["names"] or placement != MemoryPlacement.from_dict(description["memory"]):
        raise ValueError(
            f"model must have the memories that are saved in {str(folder)!r}, at {', '.join(description['names'])} "
            f"with {description['memory']}; got them at {', '.join(names)} with {placement.to_dict()}"
        )
    check_files(folder, description["files"])
    if differing := BaseIdentity.from_dict(description["base"]).differing(identity_of(inner)):
        raise ValueError(
            f"model must have the base that the memory in {str(folder)!r} was trained with, {len(differing)} tensors "
            f"differ, the first is {differing[0]!r}"
        )
    stored = stored_tensors(folder, description["files"])
    tensors = added_tensors(wrappers)
    _check_shapes(folder, stored, tensors, {})
    for key, tensor in tensors.items():
        _fill(tensor, stored[key][0], key)


def memory_alone(name: str | os.PathLike[str], *, subfolder: str = "", **hub: Any) -> Path | None:
    """The folder, fetched if it is on the Hub, if `name` is a memory without its base; None if it is anything else."""
    found: Any
    if os.path.isdir(name):
        found = Path(name) / subfolder / MEMORY_CONFIG_NAME
        if found.parent.is_dir() and is_damaged_memory(found.parent):
            return found.parent  # and `read_description` says what is wrong with it
    else:
        found = cached_file(
            name,
            MEMORY_CONFIG_NAME,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
    if found is None or not holds_memory_alone(Path(found)):
        return None
    return local_folder(name, subfolder=subfolder, **hub)


def load_base(folder: Path, plain_class: Any, config: Any, **options: Any) -> Any:
    """The base that the memory in `folder` belongs to, from where it was loaded when the memory was added.

    `config` says what the memory's ``config.json`` says, and `options` is what `from_pretrained` takes. Raises
    `ValueError` if nobody knows where the base is, or it is not there.
    """
    name = read_description(folder)["base"]["name_or_path"]
    advice = f"build the base, a {plain_class.__name__}, and call load_memory(model, {str(folder)!r})"
    if not name:
        raise ValueError(
            f"base of {folder / MEMORY_CONFIG_NAME} must have a name_or_path for from_pretrained, got ''; {advice}"
        )
    plain: Any = copy.deepcopy(config)
    if isinstance(plain, MemoryConfigMixin):
        plain = plain.without_memory()
    try:
        # A base that is stored quantised is loaded as such.
        stored, _ = PreTrainedConfig.get_config_dict(name, **_only_hub(options))
        if "quantization_config" in stored:
            plain.quantization_config = stored["quantization_config"]
        return plain_class.from_pretrained(name, config=plain, **options)
    except OSError as error:
        raise ValueError(
            f"base {name!r}, which this memory was added to, cannot be loaded: {error}; {advice}"
        ) from error


def _only_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("cache_dir", "local_files_only", "token") if key in options}


def _names_in(model: nn.Module, placement: MemoryPlacement, names: Sequence[str]) -> list[str]:
    """The names that the modules `names` have in `model`. Raises `ValueError` for a model where memories do not fit."""
    real: dict[str, str] = {}
    for name, _ in model.named_modules():
        real.setdefault(base_name(name), name)
    found = names_of(model, at_names(placement, [real.get(name, name) for name in names]))
    if (places := [base_name(name) for name in found]) != list(names):
        raise ValueError(f"model must have its blocks' feed-forward networks at {', '.join(names)}, got {places}")
    return found


def _check_base(saved: BaseIdentity, base: BaseIdentity, folder: Path) -> None:
    if differing := saved.differing(base):
        raise ValueError(
            f"model must be the base that the memory in {str(folder)!r} was trained with, {saved}; got {base}: "
            f"{len(differing)} of {len(saved.tensors)} tensors differ, the first is {differing[0]!r}. "
            f"check_base=False loads it all the same"
        )


def _check_shapes(
    folder: Path,
    stored: Mapping[str, tuple[Path, list[int]]],
    expected: Mapping[str, Tensor],
    gates: Mapping[str, list[int]],
) -> None:
    shapes = {**{name: list(tensor.shape) for name, tensor in expected.items()}, **gates}
    if missing := [name for name in shapes if name not in stored]:
        raise ValueError(f"files of {str(folder)!r} must have {len(shapes)} tensors, {missing[0]!r} is missing")
    if unknown := [name for name in stored if name not in shapes]:
        raise ValueError(f"files of {str(folder)!r} must have the tensors of the memory alone, got {unknown[0]!r}")
    for name, (file, shape) in stored.items():
        if shape != shapes[name]:
            raise ValueError(f"{name!r} in {file} must be of shape {shapes[name]}, got {shape}")


def _allocate(memory: MemoryLayer, device: torch.device) -> None:
    """Storage for what has none; a shared table has it already when its second memory comes."""
    made: dict[int, Tensor] = {}
    for module in memory.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]


@torch.no_grad()
def _fill(tensor: Tensor, file: Path, name: str) -> None:
    if tensor.ndim == 0:
        tensor.copy_(_read(file, name))
        return
    rows = max(1, CHUNK // max(1, tensor[:1].numel() * tensor.element_size()))
    for start in range(0, len(tensor), rows):
        # Opened anew each time: what was read of a file counts as memory of this process for as long as it is open.
        with safe_open(file, framework="pt") as opened:
            tensor[start : start + rows].copy_(opened.get_slice(name)[start : start + rows])


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
