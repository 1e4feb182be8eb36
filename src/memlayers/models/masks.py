"""How a model's padding mask reaches its memories.

A block calls ``self.mlp(hidden)``: no mask arrives there, yet padding must count neither in the query's BatchNorm nor
in the usage figures, and train no row (`memlayers.layer` leaves it out). So a pre-forward hook enters the mask of the
call in the thread's `calls`, where the wrapper of a memory finds it, and a forward hook takes it out again. `columns`
says which columns of a mask are those of the call's tokens, `fitted` which entry is that of which hidden state.

The hooks sit on the *base model* (``model.transformer``, ``model.model``), not on the outermost one: wrappers such as
PEFT's call ``model.forward`` directly, which skips the outermost model's hooks, but every forward of the outer model
calls the base model as a module. A model of several parts (the halves of an encoder-decoder, towers for text and for
images) has masks of its own for each, or none: there they sit on the part, too. They hold names and no state, and are
found by their functions, so deepcopy and pickle carry them along.

Under gradient checkpointing a block runs a second time during backward: see `calls`.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlayers.models import calls
from memlayers.query import MaskedBatchNorm

# What a forward's arguments say about masks, with the names that they have.
_MASK = "attention_mask"
_INPUTS = ("input_ids", "inputs_embeds")
_CACHES = ("past_key_values", "cache_params")

# Types of models whose blocks work on [tokens, batch, width]; a square batch does not show it.
_TOKENS_FIRST = ("fsmt", "xlnet")

# Types of models whose heads are given a mask and keep it from the base model.
_HEADS_KEEP_MASKS = ("rwkv",)


def install_hooks(model: nn.Module, memories: Sequence[str]) -> None:
    """Hands the masks that `model` is called with to its memories of these names from now on.

    A model whose forward takes no ``attention_mask`` hands over none.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "").removeprefix("memory_")
    parts: dict[str, bool] = {}  # givers of masks: whether each is a part of another one
    for memory in memories:
        wrapper: Any = model.get_submodule(memory.rpartition(".")[0])
        wrapper.givers = tuple(_givers(model, memory))
        wrapper.tokens_first = kind in _TOKENS_FIRST
        for giver in wrapper.givers:
            parts.setdefault(giver, giver != wrapper.givers[0])
    for giver, is_part in parts.items():
        base: Any = model.get_submodule(giver)
        # Their places differ between models, and between versions of transformers for one model.
        places = {name: place for place, name in enumerate(_parameters(base))}
        base.register_forward_pre_hook(partial(begin_call, giver, is_part, places), with_kwargs=True)
        base.register_forward_hook(partial(end_call, giver), always_call=True)


def _givers(model: nn.Module, memory: str) -> list[str]:
    """The modules around a memory that its mask comes from, from the outside in: the base model, a part of it, both."""
    if not isinstance(model, PreTrainedModel):
        return [""] if _MASK in _parameters(model) else []
    parts = memory.split(".")
    around = [".".join(parts[:count]) for count in range(len(parts))]
    whole = next(name for name, module in model.named_modules() if module is model.base_model)
    if model.config.model_type.removeprefix("memory_") in _HEADS_KEEP_MASKS:
        whole = ""
    models = [name for name in around if isinstance(model.get_submodule(name), PreTrainedModel)]
    models = [name for name in models if len(name) >= len(whole)]
    if not models or _MASK not in _parameters(model.get_submodule(models[-1])):
        return []  # of images, say
    if getattr(model.config, "is_encoder_decoder", False):
        return models[-1:]
    takes = [name for name in models if _MASK in _parameters(model.get_submodule(name))]
    return [takes[0], *takes[-1:]] if len(takes) > 1 else takes


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def remove_hooks(model: nn.Module) -> None:
    """The inverse of `install_hooks`, and of what they did to checkpointed blocks."""
    for module in model.modules():
        hooks: Any
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, partial) and hook.func in (begin_call, end_call):
                    del hooks[number]
                    for marks in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                        marks.pop(number, None)
        calls.carry_no_more(module)


def begin_call(
    giver: str,
    is_part: bool,
    places: Mapping[str, int],
    base: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Pre-forward hook: enters the mask of this call, [B, T] with True for real tokens."""
    named = {name: args[place] for name, place in places.items() if place < len(args)} | kwargs
    mask = named.get(_MASK)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        inputs, caches = (
            [named[name] for name in names if named.get(name) is not None] for names in (_INPUTS, _CACHES)
        )
        mask_BT = columns(mask, _num_tokens([*inputs, *args]), caches[0] if caches else None)
    else:
        if mask is not None and base.training:
            _require_no_statistics(mask, base, giver)
        # A prepared mask (a static cache's, that of packed sequences, [B, 1, T, S]) no longer says which tokens are
        # padding. The output at a real token does not depend on it where no statistics are taken.
        mask_BT = None
    calls.begin(giver, mask_BT, says=mask_BT is not None or not is_part)
    if mask_BT is not None and base.training and not torch.compiler.is_compiling():
        for path, _ in _given(base, giver):
            for module in _along(base, path):
                calls.carry_through_checkpoints(module)


def end_call(giver: str, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: the mask belongs to one call only."""
    calls.end(giver)


def _given(base: nn.Module, giver: str) -> Iterator[tuple[str, Any]]:
    """The wrappers below `base` that take its masks, by their paths: blocks may have been moved since the hooks."""
    for path, module in base.named_modules():
        if giver in getattr(module, "givers", ()):
            yield path, module


def _along(base: nn.Module, path: str) -> Iterator[Any]:
    """The modules from `base` to the one at `path`, both included."""
    module: Any = base
    yield module
    for name in path.split("."):
        module = getattr(module, name)
        yield module


def _num_tokens(inputs: Sequence[Any]) -> int | None:
    """T, from the first of the inputs that is a tensor: token numbers [B, T] or embeddings [B, T, D]."""
    for given in inputs:
        if isinstance(given, Tensor):
            return given.shape[1 if given.ndim > 2 else -1]
    return None


def _require_no_statistics(mask: Any, base: nn.Module, giver: str) -> None:
    """Raises `ValueError` if a memory would take statistics over tokens of which some may be padding."""
    for _, wrapper in _given(base, giver):
        if any(isinstance(module, MaskedBatchNorm) and module.training for module in wrapper.memory.modules()):
            got = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(
                f"attention_mask must have 2 dimensions [batch, tokens] when a memory with query_norm 'batch' is "
                f"trained (the query's statistics must not see padding), got {got}; query_norm 'rms' takes any mask"
            )


def columns(mask: Tensor, num_tokens: int | None, cache: Any = None) -> Tensor | None:
    """The columns of `mask` that belong to the tokens of a call, [B, T] with True for real tokens.

    A mask has a column for each place of the cache, [B, past + T] or more: `transformers` reads the first columns, and
    of these the last T are those of the call. Raises `ValueError` for a mask with too few.
    """
    if num_tokens is None:
        return None  # the model's own forward reports that neither input_ids nor inputs_embeds came
    past = 0 if cache is None else _num_past(cache, mask.shape[1] - num_tokens)
    if isinstance(past, Tensor):
        if torch.compiler.is_compiling():  # to ask for the number would split the graph; a missing column is padding
            places_T = past.to(mask.device) + torch.arange(num_tokens, device=mask.device)
            return F.pad(mask, (0, num_tokens)).index_select(1, places_T).to(torch.bool)
        past = int(past)
    if past == 0 and mask.shape[1] == num_tokens:  # sliced, it would tie `torch.export` to one number of tokens
        return mask.to(torch.bool)
    if past < 0 or mask.shape[1] < past + num_tokens:
        cached = f" and the {past} before them that are in the cache" if past > 0 else ""
        raise ValueError(
            f"attention_mask must have a column for each of the {num_tokens} tokens{cached}, got {mask.shape[1]}"
        )
    return mask[:, past : past + num_tokens].to(torch.bool)


def _num_past(cache: Any, otherwise: int) -> int | Tensor:
    """The tokens that a cache holds; `otherwise` for one that does not count them, as those of recurrent models."""
    if not hasattr(cache, "get_seq_length"):
        return otherwise
    try:
        return cache.get_seq_length()
    except ValueError:
        return otherwise


def fitted(mask_BT: Tensor, leading: torch.Size, *, tokens_first: bool = False) -> Tensor:
    """The entries of a mask for hidden states of a leading shape, which a block may have arranged in another way.

    It may be [B, T], [T, B], either flattened, or have further sizes before them, of streams that a token has.

    Args:
        mask_BT: of the call.
        leading: the shape of the hidden states, without their width.
        tokens_first: whether the model's blocks work on [T, B].

    Raises:
        ValueError: another shape.
    """
    mask = mask_BT.T if tokens_first else mask_BT
    if len(leading) == 1 and leading[0] == math.prod(mask.shape):
        return mask.reshape(-1)
    for arranged in (mask, mask.T):
        if leading[-2:] == arranged.shape:
            return arranged.expand(leading)
    raise ValueError(
        f"attention_mask must fit the hidden states that a memory reads, got {[*mask_BT.shape]} for a leading shape of "
        f"{[*leading]}: call the model without a mask, or give the memory another place"
    )
