"""MemoryConfigMixin: a configuration of `transformers` and the section ``memory``, what memories are where."""

import copy
import os
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from memlayers.models.files import REMOTE_MODULE, write_identity, written_aside
from memlayers.models.placement import MemoryPlacement


class MemoryConfigMixin(PreTrainedConfig):
    """Adds the section ``memory``, `MemoryPlacement.to_dict`, to a configuration class."""

    plain_class: ClassVar[type[PreTrainedConfig]]  # the class without the section

    # None only because `transformers` builds every configuration from nothing for its defaults; no model takes it.
    memory: dict[str, Any] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        from memlayers.models.classes import rebuild

        return rebuild, (self.plain_class, True), self.__getstate__()

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.memory is not None:
            self.set_placement(self.placement)

    @property
    def placement(self) -> MemoryPlacement:
        """The section ``memory``. Raises `ValueError` if it is missing or says what is not allowed."""
        return MemoryPlacement.from_dict(self.memory)

    def set_placement(self, placement: MemoryPlacement) -> None:
        """Fills in the section ``memory``. Raises `ValueError` if a model of these sizes cannot carry them."""
        sizes: Any = self.get_text_config()
        if hasattr(sizes, "num_hidden_layers") and hasattr(sizes, "hidden_size"):
            placement.check_fits(num_blocks=sizes.num_hidden_layers, hidden_size=sizes.hidden_size)
        self.memory = placement.to_dict()
        if getattr(self, "auto_map", None) is None:
            self.auto_map = {"AutoConfig": f"{REMOTE_MODULE}.{type(self).__name__}"}

    def without_memory(self) -> PreTrainedConfig:
        """The plain configuration, another object; configurations of parts are the same objects."""
        plain: Any = copy.copy(self)
        plain.__class__ = self.plain_class
        for field in ("memory", "auto_map"):
            plain.__dict__.pop(field, None)
        return plain

    def set_model_class(self, name: str, auto_class: str | None) -> None:
        """The class of model that this configures, for loading with ``trust_remote_code=True``."""
        self.auto_map = {"AutoConfig": f"{REMOTE_MODULE}.{type(self).__name__}"}
        if auto_class is not None:
            self.auto_map[auto_class] = f"{REMOTE_MODULE}.{name}"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in `transformers.PreTrainedConfig`, with ``memory_config.json`` and the module that `auto_map` names."""
        section = self.placement.to_dict()
        with written_aside(save_directory) as aside:
            super().save_pretrained(aside, *args, **kwargs)
            write_identity(aside, section, self.auto_map)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: the saved folder always points to the installed library, its files are not copied there.

        `transformers` calls this after a load with ``trust_remote_code=True``, so that the next save copies the source
        file of the class beside the weights.
        """
