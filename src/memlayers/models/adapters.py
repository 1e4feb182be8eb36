"""What PEFT does to a model with memories, made right: its classes are told of memories as soon as they are imported.

- `disable_adapter` switches memories off, too: TRL calls its reference model in it.
- Adapters that are put on a model freeze all the rest. A memory that was to be trained remembers that, and says so at
  its first call in training (TRL's trainers do the same where they are given ``peft_config``, and so does `add_adapter`
  of `transformers`).
- To save and load adapters asks for no table that is in files, which has no `state_dict`.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from memlayers.after_import import after_import
from memlayers.models.active import off
from memlayers.models.identity import BaseIdentity
from memlayers.models.wrappers import MemoryWrapper, find_wrappers
from memlayers.values import left_out, value_tables


def _with_memories(module: ModuleType) -> None:
    """Changes the classes of models that a module of PEFT's defines."""
    for kind in list(vars(module).values()):
        if isinstance(kind, type) and kind.__module__ == module.__name__ and "disable_adapter" in vars(kind):
            changed: Any = kind
            changed.disable_adapter = _disable_adapter(changed.disable_adapter)
            changed.__init__ = _init(changed.__init__)
            for name in ("save_pretrained", "load_adapter"):
                setattr(changed, name, _without_tables(getattr(changed, name)))


def _disable_adapter(plain: Any) -> Any:
    @functools.wraps(plain)
    @contextmanager
    def disable_adapter(self: Any) -> Iterator[None]:
        wrappers = [wrapper for _, wrapper in find_wrappers(self) if wrapper.original is not None]
        with plain(self), off(self, wrappers):
            yield

    return disable_adapter


def _init(plain: Any) -> Any:
    @functools.wraps(plain)
    def initialise(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with freezing_noticed(model):
            plain(self, model, *args, **kwargs)

    return initialise


@contextmanager
def freezing_noticed(model: nn.Module) -> Iterator[None]:
    """Memories that adapters freeze in its block, and that were to be trained, say so at their first call."""
    trained = [wrapper for _, wrapper in find_wrappers(model) if _is_to_be_trained(wrapper)]
    yield
    for wrapper in trained:
        wrapper.frozen_by_peft = not wrapper.is_trained()


def _is_to_be_trained(wrapper: MemoryWrapper) -> bool:
    return wrapper.is_trained() and not any(table.untrainable for table in value_tables(wrapper))


def _without_tables(plain: Any) -> Any:
    @functools.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with left_out(self):  # of the state_dict in which adapters are looked for
            return plain(self, *args, **kwargs)

    return method


def warn_of_adapters_alone(model: Any, folder: str | os.PathLike[str]) -> None:
    """Warns that `save_pretrained` has written the adapters alone to `folder`, where memories would be lost by that.

    So it is where what the adapters belong to has no memories, or has them as they were before a training.
    """
    wrappers = [wrapper for _, wrapper in find_wrappers(model)]
    bases = {one.base_identity.name_or_path for one in wrappers if isinstance(one.base_identity, BaseIdentity)}
    of_adapters = {adapter.base_model_name_or_path for adapter in model.peft_config.values()}
    if any(one.is_trained() for one in wrappers) or (bases - {""}) & of_adapters:
        warnings.warn(
            f"save_pretrained has written the adapters alone to {str(folder)!r}, and no memory: "
            f"save_memory(model, another_folder) saves that (in Trainer, the callback SaveMemory)",
            stacklevel=3,
        )


# PEFT is optional, and may be imported later.
for _home in ("peft.peft_model", "peft.mixed_model"):
    after_import(_home, _with_memories)
