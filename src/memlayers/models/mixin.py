"""MemoryMixin: what a Hugging Face model class needs for its memories to be built, initialised, saved and masked right.

Each method answers one thing that `transformers` does to a model of which modules were merely swapped:

- it is saved as the plain class and reloads as one, with random feed-forward networks (`post_init`, ``config.memory``);
- the block's own model redraws every linear layer it finds (`initialize_weights`);
- a table in two places cannot be saved (``_tied_weights_keys``), and with untied embeddings no tie is honoured at all
  (`get_expanded_tied_weights_keys`);
- a save that is cut off leaves a broken file in place of a good one (`save_pretrained`).
"""

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from memlayers.models.configs import MemoryConfigMixin
from memlayers.models.files import written_aside
from memlayers.models.install import build_memories, install, reset_what_was_not_loaded
from memlayers.models.memory_folder import WEIGHTS
from memlayers.models.targets import names_of
from memlayers.models.wrappers import find_wrappers
from memlayers.values import ValueTable

# Options of `from_pretrained` that say where a folder is,
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# and those that a configuration has a field for, but that are no changes of it.
OPTIONS_OF_MODELS = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "generation_config")


class MemoryMixin(PreTrainedModel):
    """Comes before a model class of `transformers` among its bases; ``config.memory`` says where the memories are."""

    config: MemoryConfigMixin

    plain_class: ClassVar[type[PreTrainedModel]]  # the class without memories
    auto_class_name: ClassVar[str | None]  # the Auto class that knows it; None: a class from outside of transformers

    def __init__(self, config: MemoryConfigMixin, *inputs: Any, **kwargs: Any):
        if not isinstance(config, MemoryConfigMixin):
            raise ValueError(f"config must be one with the section memory, got a {type(config).__name__}")
        config.set_placement(config.placement)  # checks it, before anything is built
        config.set_model_class(type(self).__name__, self.auto_class_name)
        super().__init__(config, *inputs, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on demand, and for a plain class from anywhere: pickle finds it through that one.
        from memlayers.models.classes import rebuild

        return rebuild, (self.plain_class, False), self.__getstate__()

    def post_init(self) -> None:
        # The end of the plain class's constructor: blocks exist, the outer model is not initialised or tied yet.
        placement = self.config.placement
        names = names_of(self, placement)
        install(self, placement, names, build_memories(self, placement, names))
        self.declare_memories()
        super().post_init()

    def declare_memories(self) -> None:
        """Tells `transformers` of shared tables, and of the loss of the plain class."""
        # Of the class, or of the model itself, as some constructors set them.
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **self._tied_tables()}
        if self.loss_type is None and self.auto_class_name == "AutoModelForCausalLM":
            # Chosen by the class's name, which GPT-2's does not settle; without it every first loss logs a warning.
            self.loss_type = "ForCausalLM"

    def undeclare_memories(self) -> None:
        """The inverse of `declare_memories`, while the memories are still there."""
        tables = self._tied_tables()
        tied = {name: source for name, source in (self._tied_weights_keys or {}).items() if name not in tables}
        self.__dict__.pop("_tied_weights_keys", None)
        if tied != (type(self)._tied_weights_keys or {}):
            self._tied_weights_keys = tied

    def _tied_tables(self) -> dict[str, str]:
        """The names under which a shared table appears again, each with the first one."""
        first: dict[ValueTable, str] = {}
        tied = {}
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, ValueTable):
                source = first.setdefault(module, f"{name}.weight")
                if source != f"{name}.weight":
                    tied[f"{name}.weight"] = source
        return tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # The plain rule returns nothing when tie_word_embeddings is off (Llama): a shared table is tied all the same.
        return {**super().get_expanded_tied_weights_keys(all_submodels=all_submodels), **self._tied_tables()}

    def mark_tied_weights_as_initialized(self, *loading_info: Any) -> None:
        # A shared table is one parameter under two names. Marking the tied name marks the other, too, which is then no
        # longer counted as missing: a file without the table would leave it on the meta device, and say nothing.
        missing = [set(info.missing_keys) for info in loading_info]
        super().mark_tied_weights_as_initialized(*loading_info)
        for info, before in zip(loading_info, missing, strict=True):
            sources = set(self._tied_tables().values()) & before
            info.missing_keys |= {name for name in sources if self.get_parameter(name).is_meta}

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # The blocks belong to the base model, a plain one, whose rule draws every linear layer from N(0, 0.02), those
        # of a memory, too. So memories are initialised here and marked, and the plain rule passes them by.
        for _, wrapper in find_wrappers(self):
            reset_what_was_not_loaded(wrapper)
        super().initialize_weights()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `transformers.PreTrainedModel.save_pretrained`, except that a save that fails leaves the folder as it was.

        Files are written aside, flushed and moved into place; for this the folder's file system needs room for a second
        copy. A distributed checkpoint, to which several processes write, goes straight to the folder. A model of a
        class from outside of `transformers` is loaded by its own class: ``type(model).from_pretrained(folder)``.
        """
        from memlayers.models.card import CARD, keeps_card  # it needs this class

        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        # Weights of an earlier save under other names (one file, or shards) would be found first on loading; those of a
        # memory alone belong to a description that is replaced.
        variant = re.escape(f".{kwargs['variant']}") if kwargs.get("variant") else ""
        stale = rf"model{variant}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{variant}\.json|{WEIGHTS}"
        if not keeps_card(Path(save_directory)):  # of a memory alone, which was here before
            stale += "|" + re.escape(CARD)
        # Old names of weights are translated for the plain type of model, on loading, and back on saving; not for ours.
        kwargs.setdefault("save_original_format", False)
        with written_aside(save_directory, replaces=stale) as aside:
            super().save_pretrained(aside, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `transformers.PreTrainedModel.from_pretrained`; from a folder with a memory alone, into its base.

        The base comes from where it was loaded when the memory was added, with the options of this call: ``dtype``,
        ``device_map`` and the like. What says where a folder is (``revision``, ``subfolder``) is about the memory.

        Raises:
            ValueError: the base is not to be found, or is another one; what `load_memory` raises.
        """
        from memlayers.models.loading import load_base, load_memory, memory_alone  # they need this class

        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        folder = None if name is None or kwargs.get("gguf_file") else memory_alone(name, **hub)
        if folder is None:
            return super().from_pretrained(name, *args, config=config, **kwargs)
        options = {
            key: value for key, value in kwargs.items() if key not in ("revision", "subfolder", "adapter_kwargs")
        }
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(folder if config is None else config)  # type: ignore[union-attr]
            for key in [key for key in options if hasattr(config, key) and key not in OPTIONS_OF_MODELS]:
                setattr(config, key, options.pop(key))
        loaded = load_base(folder, cls.plain_class, config, **options)
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)  # with output_loading_info
        load_memory(model, folder)
        # What is trained on this model (an adapter of PEFT) begins with base and memory; the base alone is recorded.
        place = Path(name, hub.get("subfolder", "")) if os.path.isdir(name) else name
        model.name_or_path = model.config._name_or_path = str(place)
        return (model, *info) if info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Does nothing, as in `MemoryConfigMixin.register_for_auto_class`."""
