"""Which Auto classes of `transformers` know the models of a configuration."""

import functools
from contextlib import suppress
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

# Where several Auto classes know a class, one of these.
_FIRST_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModel")


@functools.cache
def auto_classes(plain_config: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """The Auto classes that know models of this configuration, each with the classes that it knows."""
    if getattr(transformers, plain_config.__name__, None) is not plain_config:
        return []
    others = [name for name in vars(modeling_auto) if name.startswith("AutoModel") and name not in _FIRST_AUTO_CLASSES]
    found = []
    for name in (*_FIRST_AUTO_CLASSES, *others):
        # A module may have classes for images, too, which need a library that is not here.
        with suppress(ImportError):
            known: Any = getattr(modeling_auto, name)._model_mapping.get(plain_config, ())
            known = known if isinstance(known, tuple) else (known,)
            found.append((name, tuple(each for each in known if each.config_class is plain_config)))
    return [(name, known) for name, known in found if known]
