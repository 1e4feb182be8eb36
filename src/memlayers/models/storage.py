"""Memory <-> folder: the tensors of memories and the files that hold them, and the base that they belong to.

`write_memory` and `read_memory` are inverse to each other; `refill_memory` reads into memories that are in a model
already.
"""

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlayers.checks import require_choice
from memlayers.distributed.agreement import own_part
from memlayers.distributed.columns import own_bounds, put_in_columns
from memlayers.files import describe_files, replaced_together, verify_files
from memlayers.layer import MemoryLayer
from memlayers.models.folder import (
    CARD,
    FLOATS,
    TORCH_DTYPES,
    WEIGHTS,
    Description,
    Stored,
    card,
    is_whole_model,
    keeps_card,
    read_description,
    stored_tensors,
    tensor_start,
    write_description,
    write_remote_code,
    write_tensors,
)
from memlayers.models.identity import BaseIdentity, base_buffers, divided_parameters, identity_of, recorded_base
from memlayers.models.install import build_memories
from memlayers.models.modules import PlacedMemories, memory_tensors, placed_memories, tensor_like
from memlayers.models.placement import MemoryPlacement
from memlayers.models.targets import names_of
from memlayers.models.wrappers import base_name, find_wrappers
from memlayers.storage.host import put_on_host
from memlayers.storage.low_bits import LowBitTable, unlisted_numbers
from memlayers.storage.saved import Place, SavedTable
from memlayers.values import ValueTable, value_tables

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

Values = Literal["memory", "int8", "int4", "mapped", "host"]

CHUNK = 2**25  # bytes of a file that are read at once


def write_memory(
    model: nn.Module, placed: PlacedMemories, base: BaseIdentity, folder: Path, max_shard_size: int | str
) -> None:
    """Writes the memories `placed` of `model` and their description to `folder`: all of it, or nothing.

    For a model of a class that an Auto class knows, also the configuration that names this class. Raises `ValueError`
    for a folder with a whole model.
    """
    if folder.is_dir() and is_whole_model(folder):
        raise ValueError(f"folder must not hold a whole model, got {str(folder)!r}: name a folder of its own")
    kind: Any = type(model)
    auto_class = getattr(kind, "auto_class_name", None)
    with replaced_together(folder, stale=WEIGHTS) as aside:
        files = _write_weights(aside, placed.tensors, max_shard_size)
        if auto_class is not None:
            _write_model_config(model, aside)
        description = Description(placed.placement, list(placed.wrappers), base, files)
        write_description(aside, description)
        if not keeps_card(folder):
            parameters = sum(tensor.numel() for tensor in placed.tensors.values() if isinstance(tensor, nn.Parameter))
            parameters += unlisted_numbers(placed.tables)
            text = card(description, parameters, auto_class=auto_class)
            (aside / CARD).write_bytes(text.encode())


def savable_base(model: nn.Module, placed: PlacedMemories) -> BaseIdentity:
    """The identity of the base of `model`. Raises the `ValueError` of `save_memory` for a model that it cannot save."""
    tensors, kind = placed.tensors, placed.placement.kind
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(
            f"model must hold the weights of its memories, got {meta[0]} on the meta device: load it without "
            f"offloading (device_map='cpu'), or save the whole model with save_pretrained"
        )
    for table in placed.tables:
        table.require_whole()
    base = _base_of(model, placed)
    # What can be built again: the same as memories that were just made, neither more (adapters) nor less.
    memories = _empty_memories(model, placed.placement, placed.paths)
    fresh = memory_tensors(dict(zip(placed.wrappers, memories, strict=True)))
    if differing := fresh.keys() ^ (tensors.keys() - {f"{name}.gate" for name in placed.wrappers}):
        name = min(differing)
        raise ValueError(
            f"{name.partition('.memory.')[0]}.memory must hold what a new {kind} holds, differs in {name}: merge or "
            f"unload adapters in memories first"
        )
    _require_its_size(model, base)
    return base


def _base_of(model: nn.Module, placed: PlacedMemories) -> BaseIdentity:
    """The identity of the base. Raises `ValueError` if it is no longer what `add_memory` was given."""
    before = recorded_base(placed.wrappers.values())
    if unseen := divided_parameters(model, trained=before is not None):
        raise ValueError(
            f"model must have a base that was frozen (freeze_base) before FSDP sharded it, got {unseen[0]} sharded and "
            f"trained: save the whole model, on all ranks, by model.save_pretrained(folder, state_dict=state) with the "
            f"state of torch.distributed.checkpoint.state_dict.get_model_state_dict (full_state_dict=True)"
        )
    now = identity_of(model, exact=before is not None)
    if before is None:
        return now
    if differing := before.differing(now):
        # Modules that memories of another name have replaced since are not what these were trained beside.
        others = [path for path, one in find_wrappers(model) if one.mode == "replace" and path not in placed.paths]
        gone = tuple(f"{base_name(model, path)}." for path in others)
        differing = [name for name in differing if not name.startswith(gone)]
    if differing:
        wanted = f"model must be the one that add_memory was given, got a {type(model).__name__}"
        if part := _part_of(now.tensors, before.tensors):
            raise ValueError(f"{wanted} around it: it is model.{part}")
        if part := _part_of(before.tensors, now.tensors):
            raise ValueError(f"{wanted}, its part {part}: save the whole one")
        advice = "save a base that was trained along with save_pretrained, or freeze it"
        if set(differing) <= base_buffers(model):
            modules = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in differing))
            advice = (
                f"running statistics move in train(), frozen or not; put {modules} in eval() before training (and "
                f"after every train() of the model), or save the whole model with save_pretrained"
            )
        if any(getattr(config, "layer_replication", None) for config in getattr(model, "peft_config", {}).values()):
            advice = (
                "PEFT's layer_replication has moved and copied blocks since: replicate first (get_peft_model), add "
                "memories then; load_memory wants a model that was replicated likewise"
            )
        raise ValueError(
            f"model must have the base that its memories were added to: {len(differing)} of {len(before.tensors)} "
            f"tensors of it have changed since, the first is {_change(differing[0], before, now)}. save_memory keeps "
            f"the memories only: {advice}"
        )
    # As they were, before any rounding since; what was not there yet (meta), as it is now.
    tensors = {name: known if known.values else now.tensors[name] for name, known in before.tensors.items()}
    return BaseIdentity(**{**vars(before), "tensors": tensors})


def _part_of(whole: Collection[str], part: Collection[str]) -> str | None:
    """Where in a model with tensors of names `whole` the part stands whose names are `part`; None: nowhere."""
    known, first = {*whole}, next(iter(part), "")
    paths = (name.removesuffix(f".{first}") for name in known if name.endswith(f".{first}"))
    return next((path for path in paths if all(f"{path}.{name}" in known for name in part)), None)


def _change(name: str, before: BaseIdentity, now: BaseIdentity) -> str:
    then, found = before.tensors[name], now.tensors.get(name)
    if found is None:
        return f"{name!r}, which is gone"
    return repr(name) if then.shape == found.shape else f"{name!r} of shape {[*found.shape]}, was {[*then.shape]}"


def _require_its_size(model: nn.Module, base: BaseIdentity) -> None:
    """Raises `ValueError` for a base with other embeddings, or more blocks, than it has where it was loaded from."""
    if not (isinstance(model, PreTrainedModel) and base.name_or_path):
        return
    plain: Any = getattr(type(model), "plain_class", type(model))
    try:
        stored = plain.config_class.from_pretrained(base.name_or_path, local_files_only=True)
    except (OSError, ValueError):  # it is not here: loading will see
        return
    for field, parts in (("vocab_size", "embeddings"), ("num_hidden_layers", "blocks")):
        sizes: list[Any] = [getattr(config.get_text_config(), field, None) for config in (stored, model.config)]
        is_cut = None not in sizes and field == "num_hidden_layers" and sizes[0] > sizes[1]  # so it is loaded, too
        if sizes[0] != sizes[1] and not is_cut:
            raise ValueError(
                f"model must have as many {parts} as its base {base.name_or_path!r}, {sizes[0]}, got {sizes[1]}: the "
                f"others would be in no file. Save the whole model with save_pretrained; or, for another time, save "
                f"the resized base first, load it from there, and add memories to that"
            )


def _write_weights(aside: Path, tensors: dict[str, Tensor], size: int | str) -> dict[str, Any]:
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="memory{suffix}.safetensors", max_shard_size=size
    )
    for name, keys in split.filename_to_tensors.items():
        # Only what is on another device is copied, a file's worth at a time.
        shard = {key: tensors[key].detach().cpu().contiguous() for key in keys}
        write_tensors(aside / name, shard)
        del shard
    return describe_files(aside, split.filename_to_tensors)


def _write_model_config(model: Any, aside: Path) -> None:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # of fully_shard
    config.dtype = str(model.dtype).removeprefix("torch.")
    # How the base was loaded; the next one may load it otherwise.
    config.__dict__.pop("quantization_config", None)
    config.plain_class.save_pretrained(config, aside)  # ours writes a description, too, and aside once more
    write_remote_code(aside, config.auto_map)


@dataclass(frozen=True)
class StoredMemories:
    """Memories from a folder, for a model that they are not in yet."""

    placement: MemoryPlacement
    names: list[str]  # of the modules that they are for, in this model
    memories: list[MemoryLayer]
    gates: list[Tensor]  # in "parallel" mode, of each memory
    base: BaseIdentity  # of the model


def read_memory(
    model: nn.Module,
    folder: Path,
    description: Description,
    *,
    check_base: bool = True,
    mesh: "DeviceMesh | None" = None,
    values: Values = "memory",
) -> StoredMemories:
    """What `write_memory` wrote, each memory on the device of its module; `model`, its base, stays as it is.

    Weights go straight to their device, and with a mesh into columns, or are rounded on the way: no table is held
    twice. Raises the `ValueError` of `load_memory`.
    """
    placement = _placement_of(folder, description, values, mesh)
    verify_files(folder, description.files, links=True)
    names = _names_in(model, description)
    base = identity_of(model, names if description.placement.mode == "replace" else [], exact=True)
    if check_base and (differing := description.base.differing(base)):
        raise ValueError(
            f"model must be the base that the memory in {str(folder)!r} was trained with, {description.base}; got "
            f"{base}: {len(differing)} of {len(description.base.tensors)} tensors differ, the first is "
            f"{differing[0]!r}. check_base=False loads it all the same"
        )
    placement = placement.at(names)
    by_name = dict(zip(description.names, _empty_memories(model, placement, names), strict=True))
    gates = [f"{name}.gate" for name in by_name] if placement.mode == "parallel" else []
    stored = stored_tensors(folder, description.files)
    gate_like = torch.empty(placement.config.dim, device="meta")
    rounded = _rounded_on_the_way(by_name, stored)
    expected = {name: like for name, like in memory_tensors(by_name).items() if _float_name(name) not in rounded}
    expected |= {name: torch.empty(table.shape, device="meta") for name, table in rounded.items()}
    _check_stored(folder, stored, {**expected, **dict.fromkeys(gates, gate_like)})
    mapped = _map_tables(by_name, stored) if values == "mapped" else set()
    tables = value_tables(nn.ModuleList(by_name.values()))
    if mesh is not None:
        put_in_columns(tables, mesh)
    for table in tables if values == "host" else []:
        put_on_host(table)
    for name, memory in zip(names, by_name.values(), strict=True):
        like = tensor_like(model, name)
        if like.is_meta:
            raise ValueError(f"model must hold its weights, got {name} on the meta device")
        if mapped and like.device.type != "cpu":
            raise ValueError(f"model must be on the CPU for values='mapped', got {name} on {like.device}")
        _allocate(memory, like.device)
    for key, table in rounded.items():
        for start, part in _chunks(stored[key].file, key):
            check_values(part, f"{key!r} in {stored[key].file}")
            table.fill(start, part.to(table.codes.device))
    loaded = {key: tensor for key, tensor in memory_tensors(by_name).items() if key in expected.keys() - mapped}
    for key, tensor in loaded.items():
        _fill(tensor, stored[key].file, key)
    read_gates = [_read(stored[gate].file, gate) for gate in gates]
    for key, tensor in {**loaded, **dict(zip(gates, read_gates, strict=True))}.items():
        check_values(tensor, f"{key!r} in {stored[key].file}")
    return StoredMemories(placement, names, list(by_name.values()), read_gates, base)


def _placement_of(folder: Path, description: Description, values: Values, mesh: "DeviceMesh | None") -> MemoryPlacement:
    """What is in the folder, with tables as they are asked for. Raises `ValueError` where they cannot be had."""
    require_choice("values", values, get_args(Values))
    placement = description.placement
    asked = {"int8": 8, "int4": 4}.get(values, placement.value_bits)
    if asked != placement.value_bits and placement.value_bits is not None:
        raise ValueError(
            f"values must be 'memory' or 'int{placement.value_bits}' for {str(folder)!r}, whose tables have "
            f"{placement.value_bits} bits, got {values!r}: quantise from a folder of floats"
        )
    if mesh is not None and (asked is not None or values in ("mapped", "host")):
        raise ValueError(f"mesh must be None for tables of few bits and values={values!r}, which are whole, got one")
    return dataclasses.replace(placement, value_bits=asked)


def _rounded_on_the_way(memories: Mapping[str, MemoryLayer], stored: Mapping[str, Stored]) -> dict[str, LowBitTable]:
    """By their names in the files, the tables that are floats there and of fewer bits in the memories."""
    tables: dict[LowBitTable, str] = {}
    for name, memory in memories.items():
        for part, module in memory.named_modules():
            if isinstance(module, LowBitTable):
                tables.setdefault(module, f"{name}.memory.{part}.weight")
    return {name: table for table, name in tables.items() if name in stored}


def _map_tables(memories: Mapping[str, MemoryLayer], stored: Mapping[str, Stored]) -> set[str]:
    """Puts tables in the place of those of memories that have no storage yet; returns the names of what they map."""
    made: dict[ValueTable, SavedTable] = {}
    names: set[str] = set()
    for name, memory in memories.items():
        table, bits = memory.values, getattr(memory.values, "bits", None)
        if type(table) not in (ValueTable, LowBitTable):
            raise ValueError(
                f"values must be 'memory' for memories with a {type(table).__name__}, got 'mapped': only plain tables "
                f"are read from their file"
            )
        if table not in made:
            parts = [f"{name}.memory.values.{part}" for part in (("weight",) if bits is None else ("codes", "scales"))]
            places = [Place(stored[part].file, tensor_start(stored[part].file, part)) for part in parts]
            slots, dim = table.shape
            made[table] = SavedTable(
                slots,
                dim,
                places[0],
                TORCH_DTYPES[stored[parts[0]].dtype],
                scales=None if bits is None else places[1],
                bits=bits,
            )
            names.update(parts)
        memory.values = made[table]
    return names


def _float_name(name: str) -> str:
    """The name of a table of floats, of the name of a part of one of fewer bits."""
    place, _, last = name.rpartition(".")
    return f"{place}.weight" if last in ("codes", "scales") else ""


def refill_memory(model: nn.Module, folder: Path, name: str | None = None) -> None:
    """Gives memories of `model`, which was unwrapped, the values in `folder`; tensors stay the objects they are.

    Raises `ValueError` as `load_memory` does, and for memories that are not as those that were saved. The model is then
    as it was.
    """
    description = read_description(folder)
    placed = placed_memories(model, name)
    if list(placed.wrappers) != description.names or placed.placement != description.placement:
        raise ValueError(
            f"model must have the memories that are saved in {str(folder)!r}, at {', '.join(description.names)} "
            f"with {description.placement.to_dict()}; got them at {', '.join(placed.wrappers)} with "
            f"{placed.placement.to_dict()}"
        )
    verify_files(folder, description.files, links=True)
    if differing := description.base.differing(identity_of(model)):
        raise ValueError(
            f"model must have the base that the memory in {str(folder)!r} was trained with, {len(differing)} tensors "
            f"differ, the first is {differing[0]!r}"
        )
    stored = stored_tensors(folder, description.files)
    _check_stored(folder, stored, placed.tensors)
    for key in placed.tensors:  # all of them before the first is filled
        for _, part in _chunks(stored[key].file, key):
            check_values(part, f"{key!r} in {stored[key].file}")
    for key, tensor in placed.tensors.items():
        _fill(tensor, stored[key].file, key)


def _names_in(model: nn.Module, description: Description) -> list[str]:
    """The names that the described modules have in `model`. Raises `ValueError` where memories do not fit."""
    real: dict[str, str] = {}
    for name, _ in model.named_modules():
        real.setdefault(base_name(model, name), name)
    found = names_of(model, description.placement.at([real.get(name, name) for name in description.names]))
    if (places := [base_name(model, name) for name in found]) != description.names:
        raise ValueError(
            f"model must have its blocks' feed-forward networks at {', '.join(description.names)}, got {places}"
        )
    return found


def _empty_memories(model: nn.Module, placement: MemoryPlacement, names: Sequence[str]) -> list[MemoryLayer]:
    """The memories of `placement` without storage, on the meta device: shapes and dtypes only.

    Raises `ValueError` for a kind that is not known, and for one that holds what is in no file.
    """
    memories = build_memories(model, placement, names, device="meta")
    for part in (part for memory in memories for part in memory.modules()):
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"kind must keep all tensors as parameters or buffers to be saved and loaded, got "
                    f"{placement.kind} with the tensor {name!r} in its {type(part).__name__}: use register_buffer"
                )
    return memories


def _check_stored(folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, Tensor]) -> None:
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(f"files of {str(folder)!r} must have {len(expected)} tensors, {missing[0]!r} is missing")
    if unknown := [name for name in stored if name not in expected]:
        raise ValueError(f"files of {str(folder)!r} must have the tensors of the memory alone, got {unknown[0]!r}")
    for name, (file, shape, dtype) in stored.items():
        if shape != [*expected[name].shape]:
            raise ValueError(f"{name!r} in {file} must be of shape {[*expected[name].shape]}, got {shape}")
        if expected[name].is_floating_point() is not (dtype in FLOATS):
            kind = ", ".join(FLOATS) if expected[name].is_floating_point() else str(expected[name].dtype)
            raise ValueError(f"{name!r} in {file} must be of {kind}, got {dtype}")


def check_values(tensor: Tensor, what: str) -> None:
    """Raises `ValueError` for a weight that is no finite number, and for a variance below zero."""
    if tensor.is_meta or not tensor.numel():
        return
    if ".scales'" in what and tensor.dtype == torch.uint8:  # of a table of few bits
        tensor = tensor.view(torch.float32)
    if not tensor.is_floating_point():
        return
    low, high = own_part(tensor.detach()).aminmax()  # which a NaN is both of; neither copies a table
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{what} must hold finite numbers, got NaN or infinite ones: take an earlier save")
    if "running_var" in what and low < 0:
        raise ValueError(f"{what} must hold variances of at least 0, got {low.item():g}")


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
    own = own_part(tensor)
    for start, part in _chunks(file, name):
        if own is not tensor:
            first, last = own_bounds(tensor.shape[1], tensor.device_mesh)  # type: ignore[attr-defined]
            part = part[:, first:last]
        (own[start : start + len(part)] if part.ndim else own).copy_(part)


def _chunks(file: Path, name: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor of a file, a few rows at a time, each time with the number of the first."""
    with safe_open(file, framework="pt") as opened:
        shape = opened.get_slice(name).get_shape()
        row = opened.get_slice(name)[:1] if shape and shape[0] else None
    if row is None:
        yield 0, _read(file, name)
        return
    rows = max(1, CHUNK // max(1, row.numel() * row.element_size()))
    for start in range(0, shape[0], rows):
        # Opened anew each time: what was read of a file counts as memory of this process for as long as it is open.
        with safe_open(file, framework="pt") as opened:
            yield start, opened.get_slice(name)[start : start + rows]


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
