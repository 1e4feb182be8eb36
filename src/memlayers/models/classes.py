"""The registered models: `transformers` models some of whose modules are a memory, or carry one beside them.

A GPT-2 whose ``block.mlp`` was swapped is still saved as a GPT-2: `from_pretrained` then builds plain feed-forward
networks, finds no weights for them, and leaves them random with no more than a line in a log. Classes and a model type
of their own make the memory part of what is saved; a reader without memlayers fails on the unknown type instead.

Every model class of `transformers` has its counterpart, made when it is first asked for: ``MemoryGPT2LMHeadModel`` and
``MemoryGPT2Config`` are attributes of this module, and so on for any other class.
"""

import functools
from typing import Any, cast

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import is_tokenizers_available

from memlayers.models.configs import MemoryConfigMixin
from memlayers.models.mixin import MemoryMixin

PREFIX = "Memory"

# What is known to the Auto classes of `transformers` as soon as this is imported.
REGISTERED = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "GPTNeoXForCausalLM",
    "OPTForCausalLM",
)

# Where several Auto classes know a class, one of these.
_FIRST_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModel")


def rebuild(plain: Any, is_config: bool) -> Any:
    """An empty model or configuration of the class that `plain` has with memories: for pickle."""
    made = config_with_memory(plain) if is_config else with_memory(plain)
    return made.__new__(made)


@functools.cache
def with_memory(plain: type[Any]) -> type[MemoryMixin]:
    """The class of models of class `plain` with memories, known to the Auto class that knows `plain`."""
    config_class = config_with_memory(plain.config_class)
    auto = _auto_class(plain, plain.config_class)
    namespace = {
        "__module__": __name__,
        "__doc__": f"`transformers.{plain.__name__}` with the memories that ``config.memory`` names.",
        "__annotations__": {"config": config_class},
        "plain_class": plain,
        "auto_class_name": auto,
    }
    made: type[Any] = type(f"{PREFIX}{plain.__name__}", (MemoryMixin, plain), namespace)
    if auto is not None:
        getattr(transformers, auto).register(config_class, made, exist_ok=True)
    return made


@functools.cache
def config_with_memory(plain: type[Any]) -> type[MemoryConfigMixin]:
    """The class of configurations of class `plain` with the section ``memory``, known to `AutoConfig`."""
    namespace = {
        "__module__": __name__,
        "__doc__": f"`transformers.{plain.__name__}` with the section ``memory``.",
        "model_type": f"memory_{plain.model_type}",
        "plain_class": plain,
    }
    made: type[Any] = type(f"{PREFIX}{plain.__name__}", (MemoryConfigMixin, plain), namespace)
    if getattr(transformers, plain.__name__, None) is plain:  # a derived one may have the type of another
        AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


def _auto_class(plain: type[PreTrainedModel], plain_config: type[PreTrainedConfig]) -> str | None:
    if getattr(transformers, plain.__name__, None) is not plain:
        return None
    others = [name for name in vars(modeling_auto) if name.startswith("AutoModel") and name not in _FIRST_AUTO_CLASSES]
    for name in (*_FIRST_AUTO_CLASSES, *others):
        known = getattr(modeling_auto, name)._model_mapping.get(plain_config, ())
        if plain is known or (isinstance(known, tuple) and plain in known):
            return name
    return None


def __getattr__(name: str) -> Any:
    plain = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(plain, type) and issubclass(plain, PreTrainedModel):
        return with_memory(cast(Any, plain))
    if isinstance(plain, type) and issubclass(plain, PreTrainedConfig):
        return config_with_memory(cast(Any, plain))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Makes the classes known to the Auto classes of `transformers`."""
    for name in REGISTERED:
        # Its module has classes for images, too, which import tokenizers; without them it is made when it is asked for.
        if name != "Gemma3ForCausalLM" or is_tokenizers_available():
            with_memory(getattr(transformers, name))
