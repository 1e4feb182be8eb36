"""The registered configurations: a plain one and the section ``memory``, what memories there are and where."""

import os
from typing import Any, ClassVar

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from memlayers.models.files import REMOTE_MODULE, write_identity, written_aside
from memlayers.models.placement import MemoryPlacement


class MemoryConfigMixin(PreTrainedConfig):
    """Adds the section ``memory``, `MemoryPlacement.to_dict`, to a configuration class."""

    model_class_name: ClassVar[str]  # the class of model that this configures, for the Auto classes

    # None only because `transformers` builds every configuration from nothing for its defaults; no model takes it.
    memory: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.memory is not None:
            self.set_placement(self.placement)

    @property
    def placement(self) -> MemoryPlacement:
        """The section ``memory``. Raises `ValueError` if it is missing or says what is not allowed."""
        return MemoryPlacement.from_dict(self.memory)

    def set_placement(self, placement: MemoryPlacement) -> None:
        """Fills in the section ``memory``. Raises `ValueError` if this model cannot carry these memories."""
        placement.check_fits(num_blocks=self.num_hidden_layers, hidden_size=self.hidden_size)
        self.memory = placement.to_dict()
        self.auto_map = {
            "AutoConfig": f"{REMOTE_MODULE}.{type(self).__name__}",
            "AutoModelForCausalLM": f"{REMOTE_MODULE}.{self.model_class_name}",
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in `transformers.PreTrainedConfig`, with ``memory_config.json`` and the module that `auto_map` names."""
        section = self.placement.to_dict()
        with written_aside(save_directory) as aside:
            super().save_pretrained(aside, *args, **kwargs)
            write_identity(aside, section)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: the saved folder always points to the installed library, its files are not copied there.

        `transformers` calls this after a load with ``trust_remote_code=True``, so that the next save copies the source
        file of the class beside the weights.
        """


class MemoryGPT2Config(MemoryConfigMixin, GPT2Config):
    """`transformers.GPT2Config` with the section ``memory``."""

    model_type = "memory_gpt2"
    model_class_name = "MemoryGPT2LMHeadModel"


class MemoryLlamaConfig(MemoryConfigMixin, LlamaConfig):
    """`transformers.LlamaConfig` with the section ``memory``."""

    model_type = "memory_llama"
    model_class_name = "MemoryLlamaForCausalLM"
