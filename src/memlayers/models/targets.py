"""Which modules of a model a memory goes to, and whether it can stand there.

`find_layers` lists them. `choose` and `names_of` turn block numbers, names and regular expressions into names of
modules; `require_suitable` looks at what such a module takes and returns, as far as that can be told.
"""

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from memlayers.config import MemoryConfig
from memlayers.models.modules import tensor_like, unwrap, weight_sizes
from memlayers.models.placement import MemoryPlacement, Mode
from memlayers.models.wrappers import MemoryWrapper, ParallelMemory

# What the feed-forward network of a block is called: where there is `mlp`, this one; elsewhere the only one of them.
_FFN = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "shared_mlp", "mlp_block")
# Of torch's modules those that use the weights of their parts without calling them; the first without gradients.
_READ_WEIGHTS = (nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward)

Layers = Sequence[int] | Sequence[str] | str


def default_layer(num_blocks: int) -> int:
    """The block for a single memory, counted from 1: three quarters of the depth, rounded up.

    Middle-to-late is best in the paper's table 3 (5 of 6, then 4; the last is worse again), and 3 of 4 was good in our
    first runs: this gives 3 of 4, 5 of 6, 9 of 12, 18 of 24.
    """
    return math.ceil(num_blocks * 3 / 4)


class Place(NamedTuple):
    """A module that a memory may go to, as `find_layers` lists it."""

    layers: int | str  # what `add_memory(layers=[...])` takes for it: the number of its block, or its name
    name: str  # in the model
    width: int  # what ``config.dim`` must be
    modes: tuple[Mode, ...]  # that it can carry a memory in


def find_layers(model: nn.Module) -> list[Place]:
    """What ``layers=`` of `add_memory` may be for this model of `transformers`, a block at a time.

    A block whose feed-forward network is one module is listed by its number; of any other the block itself by its name,
    for a memory beside the whole of it. `add_memory` takes other modules by name, too, where they return as many
    features as they take.

    Raises:
        ValueError: a model that does not say how many blocks it has, or how wide they are.
    """
    inner = unwrap(model)
    width, count = hidden_size(inner), num_blocks(inner)
    places = []
    for number in range(1, count + 1):
        layer: int | str = number
        tried: tuple[Mode, ...] = get_args(Mode)
        try:
            name = _ffn_name(inner, number)
        except ValueError:
            layer = name = f"{_blocks_name(inner, count)}.{number - 1}"
            tried = ("parallel",)  # in its place, its attention would be gone, too
        modes = tuple(mode for mode in tried if _takes(inner, name, mode, width))
        places += [Place(layer, name, width, modes)] if modes else []
    return places


def _takes(model: nn.Module, name: str, mode: Mode, width: int) -> bool:
    config = MemoryConfig(dim=width, heads=1, topk=1, num_subkeys=2, query_dim=2)
    placement = MemoryPlacement(config=config, layers=[name], mode=mode)
    try:
        names_of(model, placement)
        require_suitable(model, name, placement)
    except ValueError:
        return False
    return True


def choose(model: nn.Module, layers: Layers | None) -> Sequence[int] | Sequence[str]:
    """Block numbers as they are; names and patterns as the names of the modules that they mean, in the model's order.

    A text is the name of a module or else a regular expression that matches the whole of it. None is `default_layer`.
    Raises `ValueError` for a text that means no module, with the names that come closest; for a module that is meant
    twice, or that is inside of another one.
    """
    if layers is None:
        return [default_layer(num_blocks(model))]
    if isinstance(layers, str):
        layers = [layers]
    is_list = isinstance(layers, Sequence) and not isinstance(layers, bytes)
    if not is_list or not any(isinstance(layer, str) for layer in layers):
        return layers  # numbers, or nothing that is allowed: a placement says what is
    names = [name for name, module in model.named_modules() if name and _is_callable(module)]
    chosen: list[str] = []
    for text in layers:
        if not isinstance(text, str):
            raise ValueError(f"layers must be all block numbers or all names of modules, got {list(layers)!r}")
        found = _matches(text, names)
        if again := [name for name in found if name in chosen]:
            raise ValueError(f"layers must not name a module twice, got {again[0]!r} again by {text!r}")
        chosen += found
    for name in chosen:
        for other in chosen:
            if name.startswith(f"{other}."):
                raise ValueError(f"layers must not name a module inside of another one, got {name!r} and {other!r}")
    return sorted(chosen, key=names.index)


def names_of(model: nn.Module, placement: MemoryPlacement) -> list[str]:
    """The names of the modules that `placement` means.

    Raises `ValueError` for a block that `model` does not have or whose feed-forward network is not one module, for a
    name that it does not have, and for a module of another width than the memory's.
    """
    if placement.is_numbered:
        placement.check_fits(num_blocks=num_blocks(model), hidden_size=hidden_size(model))
        names = [_ffn_name(model, layer) for layer in placement.layers]  # type: ignore[arg-type]
    else:
        names = [str(name) for name in placement.layers]
        known = dict(model.named_modules())
        for name in names:
            if name not in known:
                raise ValueError(f"layers must be names of modules of this model, got {name!r}{_closest(name, known)}")
    dim = placement.config.dim
    for name in names:
        sizes = weight_sizes(model.get_submodule(name))
        if sizes and dim not in sizes:
            raise ValueError(
                f"config.dim must be the width of what {name!r} is given and returns, got {dim}, which is no size of "
                f"any of its weights (they have {', '.join(map(str, sorted(sizes)))})"
            )
    return names


def hidden_size(model: nn.Module) -> int:
    """D, the width of a `transformers` model. Raises `ValueError` for a model that does not say it."""
    return _of_config(model, "hidden_size")


def num_blocks(model: nn.Module) -> int:
    """Number of blocks of a `transformers` model. Raises `ValueError` for a model that does not say it."""
    return _of_config(model, "num_hidden_layers")


def _of_config(model: nn.Module, field: str) -> int:
    config: Any = getattr(model, "config", None) if isinstance(model, PreTrainedModel) else None
    value = getattr(config.get_text_config(), field, None) if config is not None else None
    if not isinstance(value, int):
        raise ValueError(
            f"layers must be names of modules, or a regular expression, for a {type(model).__name__}: its "
            f"configuration has no {field}"
        )
    return value


def _ffn_name(model: nn.Module, number: int) -> str:
    name = f"{_blocks_name(model, num_blocks(model))}.{number - 1}"
    whole = model.get_submodule(name)
    while isinstance(whole, ParallelMemory):  # another memory, beside the whole block
        name, whole = f"{name}.base", whole.base
    whole = getattr(whole, "_orig_mod", whole)  # compiled
    networks = [own for own, part in whole.named_children() if own in _FFN and _is_callable(part)]
    if "mlp" in networks:
        return f"{name}.mlp"
    if len(networks) != 1:
        block = re.escape(name.rpartition(".")[0]) + rf"\.{number - 1}"
        what = f"not one module but {', '.join(networks)}" if networks else f"not one module ({', '.join(_FFN)})"
        raise ValueError(
            f"layers must be names of modules for a {type(model).__name__}: the feed-forward network of its blocks is "
            f'{what}, got {number}. Name the block for a memory beside the whole of it: layers=r"{block}", '
            f'mode="parallel"'
        )
    return f"{name}.{networks[0]}"


def _blocks_name(model: nn.Module, count: int) -> str:
    """The list of blocks: the first list of as many modules as there are blocks; an encoder-decoder has two."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name, blocks in lists if len(blocks) == count]
    found = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    if len(found) != 1:
        what = "has no list of them" if not found else f"has {len(found)} lists of them, {', '.join(found)}"
        raise ValueError(
            f"layers must be names of modules for a {type(model).__name__}: blocks have no numbers where a model {what}"
        )
    return found[0]


def _matches(text: str, names: Sequence[str]) -> list[str]:
    if text in names:
        return [text]
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"layers must be names of modules or regular expressions, got {text!r} ({error})") from None
    found = [name for name in names if pattern.fullmatch(name)]
    if not found:
        raise ValueError(f"layers must name modules of this model, got {text!r}, which is none{_closest(text, names)}")
    return found


def _closest(text: str, names: Iterable[str]) -> str:
    plain = text.replace("\\.", ".").replace("\\", "")
    ends = [name for name in names if name.endswith(f".{plain}")][:3]
    close = ends or difflib.get_close_matches(plain, list(names), n=3, cutoff=0.5)
    return f"; closest are {', '.join(map(repr, close))}" if close else ""


def _is_callable(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def require_suitable(model: nn.Module, name: str, placement: MemoryPlacement) -> None:
    """Raises `ValueError` for a module that is never called, whose weights were moved away, or that cannot be replaced.

    A memory takes hidden states and returns as many. One beside a module can do without what else it takes or returns;
    one in its place cannot.
    """
    module = model.get_submodule(name)
    if isinstance(module, MemoryWrapper) and {module.mode, placement.mode} != {"parallel"}:
        raise ValueError(
            f"mode must be 'parallel' of all memories at {name!r}, where the memory {module.memory_name!r} is, got "
            f"{module.mode!r} and {placement.mode!r}"
        )
    parameters = [*module.parameters()]
    if any(parameter.is_meta for parameter in parameters) and any(
        hasattr(part, "_hf_hook") for part in model.modules()
    ):
        raise ValueError(
            f"model must have its weights in place, got {name!r} with weights that accelerate has offloaded: add "
            f"memories first, then dispatch the model"
        )
    parts = name.split(".")
    for outer in (".".join(parts[:end]) for end in range(1, len(parts))):
        if type(around := model.get_submodule(outer)).forward in _READ_WEIGHTS:
            raise ValueError(
                f"layers must name modules that are called, got {name!r}, whose weights torch's "
                f"{type(around).__name__} uses by itself, so the memory would be passed by, if only in eval mode: name "
                f"{outer!r}, with mode='parallel'"
            )
    dim = placement.config.dim  # a sum with one number would be one of all of them
    widths = [getattr(module, side, dim) for side in ("in_features", "out_features", "nx", "nf")]  # of linear maps
    if odd := [width for width in widths if width != dim]:
        raise ValueError(
            f"layers must name modules that return as many features as they take, {dim}, got {name!r}, which takes or "
            f"returns {odd[0]}: name the module that it is a part of"
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
