"""What people do with memories: add them to a model, remove, save and load them, and freeze the model around them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from memlayers.checks import require_bool
from memlayers.config import MemoryConfig
from memlayers.distributed.whole import whole_tables
from memlayers.distributed.wrapping import keep_out_of_ddp
from memlayers.layer import MemoryLayer
from memlayers.models.active import prepare_originals, require_originals
from memlayers.models.classes import MemoryMixin, add_memories, load_memories, remove_memories
from memlayers.models.folder import local_folder, read_description
from memlayers.models.identity import identity_of, recorded_base
from memlayers.models.install import build_memories
from memlayers.models.modules import (
    adapter_parameters,
    memories_in,
    memory_names,
    memory_parameters,
    placed_memories,
    require_memories,
    require_name,
    require_new_name,
    unwrap,
)
from memlayers.models.placement import MemoryPlacement, Mode
from memlayers.models.storage import Values, savable_base, write_memory
from memlayers.models.targets import Layers, choose, names_of, require_suitable
from memlayers.models.wrappers import DEFAULT_NAME, find_wrappers
from memlayers.storage.low_bits import unlisted_numbers
from memlayers.values import TablePlace, value_tables

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


def add_memory(
    model: Model,
    config: MemoryConfig,
    layers: Layers | None = None,
    *,
    mode: Mode = "replace",
    kind: type[MemoryLayer] = MemoryLayer,
    share_values: bool = False,
    values: TablePlace | None = None,
    keep_original: bool = False,
    name: str = DEFAULT_NAME,
) -> Model:
    """Puts memories into a model, in place: m(x) instead of a feed-forward network f(x), or f(x) + gate * m(x).

    A model of `transformers` also changes its class, LlamaForCausalLM to MemoryLlamaForCausalLM: a plain class would be
    saved and loaded back with random feed-forward networks, silently. Create the optimizer afterwards: there are new
    parameters, and in "replace" mode the replaced modules' are gone.

    Args:
        model: any module; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too.
        config: what each memory is; ``config.dim`` is the width of what the modules are given and return.
        layers: where. Blocks counted from 1, for models of `transformers` whose blocks have a feed-forward module
            ``mlp``; or names of modules; or regular expressions that match whole names. None: the block at three
            quarters of the depth (`default_layer`).
        mode: "replace" puts a memory in place of each module (paper, section 3.3). "parallel" keeps the module and
            adds the memory behind a gate that begins at zero: the outputs are bit for bit those of `model`.
        kind: the class of the memories, `MemoryLayer` or one derived from it (`MemoryPlus`, `Experts`).
        share_values: one table of values for all of them; queries and keys stay their own.
        values: where the tables of values are, if not beside the other weights: `memlayers.MappedFile`, each in a
            folder below that has the name of its module, or `memlayers.HostMemory`.
        keep_original: in "replace" mode, keep the replaced modules for `remove_memory`, outside of the model: they are
            in no state_dict and no optimizer.
        name: of these memories, where a model is to have several kinds of them: to switch them (`set_active`), and to
            remove and save them by. At one module there can be several in "parallel" mode.

    Returns:
        `model` itself. Memories stand on the device, in the dtype and in the mode (train or eval) of their module;
        beside float16 they are float32.

    Raises:
        ValueError: a layer that `model` does not have, named twice, or none; ``config.dim`` is another width; a model
            that has memories of this name already; a place that a table cannot have there. The model is then as it was.
    """
    inner = unwrap(model)
    require_new_name(inner, name)
    if values is not None and not isinstance(values, TablePlace):
        raise ValueError(f"values must be None or the place of tables (MappedFile, HostMemory), got {values!r}")
    if not (isinstance(kind, type) and issubclass(kind, MemoryLayer)):
        raise ValueError(f"kind must be MemoryLayer or a class derived from it, got {kind!r}")
    placement = MemoryPlacement(
        config=config, kind=kind.__name__, layers=choose(inner, layers), mode=mode, share_values=share_values
    )
    require_bool("keep_original", keep_original)
    paths = names_of(inner, placement)
    for path in paths:
        require_suitable(inner, path, placement)
    memories = build_memories(inner, placement, paths, kind=kind, values=values)
    base = identity_of(inner, without=paths if mode == "replace" else [], exact=True)
    add_memories(inner, placement, paths, memories, base, name=name, keep_original=keep_original)
    return model


def remove_memory(model: Model, name: str | None = None) -> Model:
    """The inverse of `add_memory`, in place: the model gives the outputs of the base model again, bit for bit.

    Of the memories of one name; None: of all. Removing those of one name leaves the others as they are.

    Removes memories added in "parallel" mode, or in "replace" mode with ``keep_original=True``; a kept module takes the
    device of the memory in its place, and its dtype if the model was cast since. What was frozen stays frozen. Build
    the optimizer anew: the memories' parameters are gone.

    Raises:
        ValueError: a model without memories, or one whose replaced modules were not kept, or kept with adapters of PEFT
            that the model has merged since. The model is then as it was.
    """
    inner = unwrap(model)
    # A part of the model may have been given before, of which its class and configuration do not know.
    known = memory_names(inner) if isinstance(inner, MemoryMixin) and name is None else require_memories(inner)
    wrappers = dict(find_wrappers(inner, None if name is None else require_name(known, name)))
    require_originals(wrappers)
    if not adapter_parameters(inner):
        for path, wrapper in wrappers.items():
            if wrapper.original is not None and adapter_parameters(wrapper.original):
                raise ValueError(
                    f"model must have no adapters in the modules that its memories replaced, got some in {path} that "
                    f"were not merged with the others: call remove_memory first, then merge"
                )
    prepare_originals(inner, wrappers.values())
    base = recorded_base(wrappers.values())
    remove_memories(inner, list(wrappers), "" if base is None else base.name_or_path)
    return model


def save_memory(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Saves what `add_memory` added, and what base model it belongs to; the base itself is not in the files.

    For `load_memory`; for a model of `transformers` also for `from_pretrained`, which then takes the base from where it
    came from. The folder can be uploaded as it is. Files are written aside, flushed and moved into place: a save that
    fails leaves those of an earlier one as they were.

    With tables in columns (`memlayers.distributed.shard_tables`), and under FSDP (`fully_shard`), all ranks call it,
    and the first one writes.

    Args:
        model: one with memories; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too. What PEFT
            has added is not saved with it: save adapters by themselves, to another folder.
        folder: made if it is not there; memories that are in it are replaced.
        name: of the memories that are saved; needed where there are several. It is not in the files.
        max_shard_size: of a file, in bytes or as "5GB". A tensor that is larger gets a file of its own.

    Raises:
        ValueError: a model without memories, or one whose base was trained along and would be lost, or is not frozen
            under FSDP; a folder with a whole model in it. Nothing is written then.
    """
    _check_size(max_shard_size)
    inner = unwrap(model)
    placed = placed_memories(inner, name)
    base = savable_base(inner, placed)
    with whole_tables(placed.tables, folder, placed.tensors.values()) as whole:
        if whole is not None:
            tensors = {name: whole.get(tensor, tensor) for name, tensor in placed.tensors.items()}
            write_memory(inner, replace(placed, tensors=tensors), base, Path(folder), max_shard_size)


def load_memory(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    name: str = DEFAULT_NAME,
    check_base: bool = True,
    mesh: "DeviceMesh | None" = None,
    values: Values = "memory",
) -> Model:
    """Puts the memories that `save_memory` saved into their base model, in place.

    The model then gives the outputs of the one that was saved, bit for bit in the same precision. Its class changes as
    with `add_memory`. Weights go straight to their device: no table is held twice.

    Args:
        model: the base, without memories of this name; one that `torch.compile` or PEFT is around, too.
        folder: what `save_memory` wrote; or the name of a repository of the Hub, which is fetched.
        name: that the memories have in the model, beside memories of other names.
        check_base: compare a few values of every tensor of `model` with those of the base that was saved with. False:
            take any base into which the memories fit.
        mesh: the tables go straight into columns, as by `memlayers.distributed.shard_tables`; all ranks call it then.
        values: "memory" loads tables as they were saved. "int8" and "int4" round those of floats on the way to the
            nearest rows of 8 or 4 bits, as `quantize_memory` does, some rows at a time: for inference. "mapped" reads
            tables, also those of few bits, straight from the files of the folder, which must stay there: for inference
            on the CPU with tables that are larger than memory. "host" leaves tables of floats in the memory of the host
            of a GPU, as `memlayers.HostMemory` does, to read and to train.

    Returns:
        `model` itself. Memories stand on the device, in the dtype and in the mode (train or eval) of their module.

    Raises:
        ValueError: a folder that `save_memory` did not write, or a file of it that is missing or damaged; another base;
            a model that has memories of this name already; values that its tables cannot have. The model is then as it
            was.
    """
    inner = unwrap(model)
    require_new_name(inner, name)
    path = local_folder(folder)
    description = read_description(path)
    load_memories(inner, path, description, name=name, check_base=check_base, mesh=mesh, values=values)
    if mesh is not None or unlisted_numbers(value_tables(inner)):
        keep_out_of_ddp(inner)
    return model


def freeze_base(model: Model) -> Model:
    """Freezes, in place, every parameter that is neither of a memory (its gate included) nor of an adapter of PEFT.

    Those of memories require gradients afterwards, whatever froze them: `peft.get_peft_model` freezes all that is not
    its own. Adapters stay as they are. So both orders work: `add_memory` on a PEFT model, or `get_peft_model` on a
    model with memories, and then `freeze_base`. PEFT's ``modules_to_save`` is not needed; it would keep a second copy
    of the table. Build the optimizer afterwards. Biases that PEFT trains outside of its adapters (``bias="all"``) are
    frozen, too: they are the base's. Modes stay: in ``model.train()`` the base's dropout is on, and running statistics
    of its BatchNorms move.

    Raises:
        ValueError: a model without memories, with tables that nobody can train, or with one that
            ``modules_to_save`` has copied. The model is then as it was.
    """
    inner = unwrap(model)
    memories_in(inner)
    memories = memory_parameters(inner)
    for table in value_tables(inner):
        if table.untrainable:
            raise ValueError(f"{table.untrainable}; or choose what else to train by requires_grad_")
    adapters = adapter_parameters(inner)
    if copied := [name for name, parameter in inner.named_parameters() if parameter in memories & adapters]:
        raise ValueError(
            f"model must have no memory that PEFT has copied, got {copied[0]}: leave memories out of modules_to_save"
        )
    for parameter in inner.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(parameter in memories)
    return model


def trainable_base(model: nn.Module) -> list[str]:
    """The parameters that `freeze_base` would freeze and that are not, by name."""
    inner = unwrap(model)
    spared = memory_parameters(inner) | adapter_parameters(inner)
    return [name for name, parameter in inner.named_parameters() if parameter.requires_grad and parameter not in spared]


def _check_size(size: object) -> None:
    is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    if isinstance(size, str):
        number, unit = size.strip()[:-2], size.strip()[-2:].upper()
        is_size = (
            unit in ("KB", "MB", "GB", "TB") and number.strip().replace(".", "", 1).isdecimal() and float(number) > 0
        )
    if not is_size:
        raise ValueError(f"max_shard_size must be a number of bytes of at least 1 or a text as '5GB', got {size!r}")
