"""Models of `transformers` with memories: classes of their own, and all that this library must know of `transformers`.

A GPT-2 whose ``block.mlp`` was swapped is still saved as a GPT-2: `from_pretrained` then builds plain feed-forward
networks, finds no weights for them, and leaves them random with no more than a line in a log. Classes and a model type
of their own make the memory part of what is saved; a reader without memlayers fails on the unknown type instead.

Every model class of `transformers` has its counterpart, made when it is first asked for: ``MemoryGPT2LMHeadModel`` and
``MemoryGPT2Config`` are attributes of this module, and so on for any other class.

In this order: the configuration (`MemoryConfigMixin`), the model (`MemoryMixin`), the classes made of both
(`with_memory`), and how a model that is there changes its class (`add_memories`, `remove_memories`, `load_memories`).
"""

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters

from memlayers.distributed.whole import has_columns, whole_tables, with_whole_tables
from memlayers.files import replaced_together
from memlayers.layer import MemoryLayer, memory_layers
from memlayers.models.adapters import freezing_noticed, warn_of_adapters_alone
from memlayers.models.auto_classes import auto_classes
from memlayers.models.folder import (
    CARD,
    REMOTE_MODULE,
    WEIGHTS,
    Description,
    check_whole_model,
    keeps_card,
    read_description,
    write_placement,
)
from memlayers.models.identity import BaseIdentity
from memlayers.models.install import all_or_nothing, build_memories, mark_built, put_in, reset_unloaded, take_out
from memlayers.models.memory_alone import (
    HUB_OPTIONS,
    OPTIONS_OF_MODELS,
    find_memory_alone,
    load_base,
    saying_whose_memory,
)
from memlayers.models.modules import kind_of, memory_names, placed_memories
from memlayers.models.placement import MemoryPlacement
from memlayers.models.storage import check_values, read_memory
from memlayers.models.targets import names_of
from memlayers.models.wrappers import DEFAULT_NAME, ParallelMemory, base_name, find_wrappers
from memlayers.storage.low_bits import unlisted_numbers
from memlayers.values import ValueTable, left_out, value_tables

PREFIX = "Memory"


class MemoryConfigMixin(PreTrainedConfig):
    """Adds the section ``memory``, `MemoryPlacement.to_dict`, to a configuration class."""

    plain_class: ClassVar[type[PreTrainedConfig]]  # the class without the section

    # None only because `transformers` builds every configuration from nothing for its defaults; no model takes it.
    memory: dict[str, Any] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
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
        if "model_type" in plain.__dict__:  # from a file, of which `transformers` keeps all that it says
            plain.__dict__["model_type"] = plain.model_type.removeprefix(f"{PREFIX.lower()}_")
        return plain

    def set_model_class(self, name: str, auto_class: str | None) -> None:
        """The class of model that this configures, for loading with ``trust_remote_code=True``."""
        self.auto_map = {"AutoConfig": f"{REMOTE_MODULE}.{type(self).__name__}"}
        if auto_class is not None:
            self.auto_map[auto_class] = f"{REMOTE_MODULE}.{name}"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in `transformers.PreTrainedConfig`, with ``memory_config.json`` and the module that `auto_map` names."""
        placement = self.placement
        with replaced_together(save_directory) as aside:
            super().save_pretrained(aside, *args, **kwargs)
            write_placement(aside, placement, self.auto_map)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: the saved folder always points to the installed library, its files are not copied there.

        `transformers` calls this after a load with ``trust_remote_code=True``, so that the next save copies the source
        file of the class beside the weights.
        """


class MemoryMixin(PreTrainedModel):
    """Comes before a model class of `transformers` among its bases; ``config.memory`` says where the memories are.

    Each method answers one thing that `transformers` does to a model of which modules were merely swapped:

    - it is saved as the plain class and reloads as one, with random feed-forward networks (`post_init`,
      ``config.memory``);
    - the block's own model redraws every linear layer it finds (`initialize_weights`);
    - a table in two places cannot be saved (``_tied_weights_keys``), and with untied embeddings no tie is honoured at
      all (`get_expanded_tied_weights_keys`);
    - a save that is cut off leaves a broken file in place of a good one (`save_pretrained`).
    """

    config: MemoryConfigMixin

    plain_class: ClassVar[type[PreTrainedModel]]  # the class without memories
    auto_class_name: ClassVar[str | None]  # the Auto class that knows it; None: a class from outside of transformers

    def __init__(self, config: MemoryConfigMixin, *inputs: Any, **kwargs: Any):
        if not isinstance(config, MemoryConfigMixin):
            raise ValueError(f"config must be one with the section memory, got a {type(config).__name__}")
        placement = config.placement
        config.set_placement(placement)  # checks it, before anything is built
        config.set_model_class(type(self).__name__, self.auto_class_name)
        # Built as the plain model that it is without memories: heads have their base model made from the configuration
        # that they are given, and it would have memories of its own.
        plain = config.without_memory()
        self.config_class = type(plain)  # which the models of two models (EncoderDecoderModel) insist on
        super().__init__(plain, *inputs, **kwargs)
        del self.config_class
        # What the constructor has settled, such as the kind of attention.
        own: Any = {name: vars(config)[name] for name in ("memory", "auto_map", "model_type") if name in vars(config)}
        config.__dict__ = {**plain.__dict__, **own}
        _exchange_config(self, config)
        placement = self._with_own_names(placement)
        config.set_placement(placement)
        names = names_of(self, placement)
        mark_built(put_in(self, placement, names, build_memories(self, placement, names)))
        self.declare_memories()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on demand, and for a plain class from anywhere: pickle finds it through that one.
        return rebuild, (self.plain_class, False), self.__getstate__()

    def _with_own_names(self, placement: MemoryPlacement) -> MemoryPlacement:
        """The same where a head, or none, gives modules other names than in the model that was saved."""
        if placement.is_numbered:
            return placement
        known, prefix = {name for name, _ in self.named_modules()}, f"{self.base_model_prefix}."
        same = [(str(name), f"{prefix}{name}", str(name).removeprefix(prefix)) for name in placement.layers]
        return placement.at([next((name for name in names if name in known), names[0]) for names in same])

    def declare_memories(self) -> None:
        """Tells `transformers` of shared tables, of what no quantiser converts, and of the loss of the plain class."""
        # Of the class, or of the model itself, as some constructors set them.
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **self._tied_tables()}
        # Every quantiser leaves these out; otherwise it means float32 where float16 was asked for, as for new memories.
        self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), *self._parts_of_memories()}
        if self.loss_type is None and self.auto_class_name == "AutoModelForCausalLM":
            # Chosen by the class's name, which GPT-2's does not settle; without it every first loss logs a warning.
            self.loss_type = "ForCausalLM"
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def undeclare_memories(self) -> None:
        """The inverse of `declare_memories`, while the memories are still there."""
        named = self.named_modules(remove_duplicate=False)
        tables = {name for name, module in named if isinstance(module, ValueTable)}
        keys = self._tied_weights_keys or {}
        tied = {key: source for key, source in keys.items() if key.rpartition(".")[0] not in tables}
        self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ())} - self._parts_of_memories()
        self.__dict__.pop("_tied_weights_keys", None)
        if tied != (type(self)._tied_weights_keys or {}):
            self._tied_weights_keys = tied

    def _parts_of_memories(self) -> set[str]:
        return {f"{name}.{part}" for name, _ in find_wrappers(self) for part in ("memory", "gate")}

    def _tied_tables(self) -> dict[str, str]:
        """The names under which a shared table appears again, each with the first one."""
        first: dict[ValueTable, str] = {}
        tied = {}
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, ValueTable) and (source := first.setdefault(module, name)) != name:
                parts = (*module._parameters, *module._buffers)  # none of a table that is mapped
                tied.update({f"{name}.{part}": f"{source}.{part}" for part in parts})
        return tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # The plain rule returns nothing when tie_word_embeddings is off (Llama): a shared table is tied all the same.
        return {**super().get_expanded_tied_weights_keys(all_submodels=all_submodels), **self._tied_tables()}

    def mark_tied_weights_as_initialized(self, *loading_info: Any) -> None:
        # A shared table is one parameter under two names. Marking the tied name marks the other, too, which is then no
        # longer counted as missing: a file without the table would leave it on the meta device, and say nothing.
        missing = [set(info.missing_keys) for info in loading_info]
        # The plain rules take what is tied for parameters. Tables of few bits are buffers: one module has them anyway.
        buffers = {name for name in self._tied_tables() if not name.endswith(".weight")}
        tied = self.all_tied_weights_keys
        self.all_tied_weights_keys = {name: source for name, source in tied.items() if name not in buffers}
        for info in loading_info:
            info.missing_keys -= buffers
        super().mark_tied_weights_as_initialized(*loading_info)
        for info, before in zip(loading_info, missing, strict=True):
            sources = set(self._tied_tables().values()) & before
            info.missing_keys |= {name for name in sources if attrgetter(name)(self).is_meta}

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # The blocks belong to the base model, a plain one, whose rule draws every linear layer from N(0, 0.02), those
        # of a memory, too. So memories are initialised here and marked, and the plain rule passes them by.
        for _, wrapper in find_wrappers(self):
            reset_unloaded(wrapper)
        for table in value_tables(self):
            table.settle_mark()
        # Where custom code is initialised, a module without weights of its own is passed by: buffers in no file that a
        # model fills for its parts (Falcon-H1) would be whatever stood in memory.
        self.is_custom_code = self.plain_class.is_custom_code  # type: ignore[method-assign]
        try:
            super().initialize_weights()
        finally:
            del self.is_custom_code

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in `transformers`, without companions of value tables; `exclude_embeddings` leaves out tables, too.

        By that number Trainer counts operations, six for each parameter and token; of a table a token reads few rows.
        """
        count = super().num_parameters(only_trainable, exclude_embeddings)
        tables = value_tables(self)
        of_floats = [table for table in tables if "weight" in table._parameters]
        left_out = [table.row_mark for table in tables] + [table.weight for table in of_floats if exclude_embeddings]
        count -= sum(one.numel() for one in left_out if one.requires_grad or not only_trainable)
        return count if only_trainable or exclude_embeddings else count + unlisted_numbers(tables)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `transformers.PreTrainedModel.save_pretrained`, except that a save that fails leaves the folder as it was.

        Files are written aside, flushed and moved into place, for which the folder's file system needs room for a
        second copy. A process that is killed leaves what was there, or all that is new, of which the next load moves
        the rest into place. Of several that save to one folder each waits for those before it. A distributed
        checkpoint goes straight to the folder. With tables in columns all ranks call it, and the first one writes. A
        class from outside of `transformers` loads its models itself: ``type(model).from_pretrained(folder)``. Raises
        `ValueError` for a model with memories of several names, or whose memories were all taken out of a part of it.
        Of a model with adapters (`add_adapter`) `transformers` saves those alone; where memories would be lost by that,
        a warning says so.
        """
        if len(names := memory_names(self)) > 1:
            raise ValueError(
                f"model must have memories of one name to be saved whole, got {', '.join(map(repr, names))}: save each "
                f"with save_memory(model, folder, name=...)"
            )
        is_main_process = has_columns(self) or (args[0] if args else kwargs.get("is_main_process", True))
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
        if (placement := self._current_placement()) != self.config.placement:
            with redeclared(self, **vars(placement)):
                pass
        # Old names of weights are translated for the plain type of model, on loading, and back on saving; not for ours.
        kwargs.setdefault("save_original_format", False)
        of_adapters = getattr(self, "_hf_peft_config_loaded", False)
        without_tables = left_out(self) if of_adapters else nullcontext()
        with whole_tables(value_tables(self), save_directory) as whole, without_tables:
            if whole is not None:
                with replaced_together(save_directory, stale=stale) as aside:
                    super().save_pretrained(aside, *args, **with_whole_tables(self, whole, kwargs))
        if of_adapters:
            warn_of_adapters_alone(self, save_directory)

    def _current_placement(self) -> MemoryPlacement:
        """The configuration's placement, brought up to date with the memories that are in the model.

        Memories of a part may have been grown or quantised, blocks copied or cut off, unseen by the whole. Raises
        `ValueError` for a model without memories, and for memories that no placement describes.
        """
        declared = self.config.placement
        if not (wrappers := find_wrappers(self)):
            raise ValueError(
                f"model must have the memories of its configuration (layers {', '.join(map(str, declared.layers))}), "
                f"got a {type(self).__name__} that has lost them: remove_memory(model) makes the whole a plain model, "
                f"which can be saved"
            )
        memory, places = next(iter(memory_layers(self).values())), [base_name(self, path) for path, _ in wrappers]
        updated = dataclasses.replace(
            declared,
            config=memory.config,
            kind=kind_of(memory),
            mode=wrappers[0][1].mode,
            value_bits=getattr(memory.values, "bits", None),
        )
        try:
            if {base_name(self, name) for name in names_of(self, updated)} == {*places}:
                return updated
        except ValueError:  # of a block that is gone
            pass
        return dataclasses.replace(placed_memories(self).placement, layers=places)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`. Memories are frozen by that; those that were trained say so at their next call."""
        with freezing_noticed(self):
            super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`. Memories are frozen by that; those that were trained say so at their next call."""
        with freezing_noticed(self), left_out(self):  # of the state_dict in which adapters are looked for
            return super().load_adapter(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `transformers.PreTrainedModel.from_pretrained`; from a folder with a memory alone, into its base.

        The base comes from where it was loaded when the memory was added, with the options of this call: ``dtype``,
        ``device_map`` and the like; ``values`` is as of `load_memory`. What says where a folder is (``revision``,
        ``subfolder``) is about the memory.

        Raises:
            ValueError: the base is not to be found, or is another one; what `load_memory` raises.
        """
        values = kwargs.pop("values", "memory")
        name = pretrained_model_name_or_path
        hub: Any = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        # As `transformers` does for a whole model: adapters in the folder, or the base of a folder of adapters alone.
        of_adapters, base, adapters = maybe_load_adapters(name, {**hub}, **(kwargs.get("adapter_kwargs") or {}))
        of_base = {key: value for key, value in hub.items() if base == name or key not in ("revision", "subfolder")}
        folder = None if name is None or kwargs.get("gguf_file") else find_memory_alone(base, **of_base)
        if folder is None:
            if values != "memory":
                raise ValueError(
                    f"values must be 'memory' for a whole model, got {values!r}: save its memory by itself "
                    f"(save_memory), and load that with values={values!r}"
                )
            if name is not None and os.path.isdir(name):
                check_whole_model(Path(name, hub.get("subfolder", "")))
            loaded = super().from_pretrained(name, *args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
            memories = tuple(model._parts_of_memories())
            for key, tensor in chain(model.named_parameters(), model.named_buffers()):
                if key.startswith(memories):
                    check_values(tensor, f"{key!r} of {str(name)!r}")
            return loaded
        of_folders = ("revision", "subfolder", "adapter_kwargs")
        options = {key: value for key, value in kwargs.items() if key not in of_folders}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(folder if config is None else config)  # type: ignore[union-attr]
            for key in [key for key in options if hasattr(config, key) and key not in OPTIONS_OF_MODELS]:
                setattr(config, key, options.pop(key))
        description = read_description(folder)
        loaded = load_base(folder, description, cls.plain_class, config, **options)
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)  # with output_loading_info
        with saying_whose_memory(base, description, cls.plain_class):
            load_memories(model, folder, description, values=values)
        # What is trained on this model (an adapter of PEFT) begins with base and memory; the base alone is recorded.
        place = Path(base, of_base.get("subfolder", "")) if os.path.isdir(base) else base
        model.name_or_path = model.config._name_or_path = str(place)
        if of_adapters is not None:
            token = {"token": hub["token"]} if "token" in hub else {}
            adapter_name = kwargs.get("adapter_name", "default")
            model.load_adapter(of_adapters, adapter_name=adapter_name, adapter_kwargs={**adapters, **token})
        return (model, *info) if info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Does nothing, as in `MemoryConfigMixin.register_for_auto_class`."""


def rebuild(plain: Any, is_config: bool) -> Any:
    """An empty model or configuration of the class that `plain` has with memories: for pickle."""
    made = config_with_memory(plain) if is_config else with_memory(plain)
    return made.__new__(made)


def with_memory(plain: Any) -> type[MemoryMixin]:
    """The class of models of class `plain` with memories, known to the Auto classes that know `plain`."""
    _register_models(plain.config_class)
    return _model_class(plain)


@functools.cache
def config_with_memory(plain: Any) -> type[MemoryConfigMixin]:
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


@functools.cache
def _model_class(plain: Any) -> type[MemoryMixin]:
    config_class = config_with_memory(plain.config_class)
    namespace = {
        "__module__": __name__,
        "__doc__": f"`transformers.{plain.__name__}` with the memories that ``config.memory`` names.",
        "__annotations__": {"config": config_class},
        "plain_class": plain,
        "auto_class_name": next((name for name, known in auto_classes(plain.config_class) if plain in known), None),
    }
    return cast(Any, type(f"{PREFIX}{plain.__name__}", (MemoryMixin, plain), namespace))


@functools.cache
def _register_models(plain_config: Any) -> None:
    """Makes all classes of models with memories of this configuration known to the Auto classes."""
    for name, known in auto_classes(plain_config):
        made: Any = tuple(map(_model_class, known))
        config_class = config_with_memory(plain_config)
        getattr(transformers, name).register(config_class, made if len(made) > 1 else made[0], exist_ok=True)


def _registered_config(plain: Any) -> type[MemoryConfigMixin]:
    _register_models(plain)
    return config_with_memory(plain)


def __getattr__(name: str) -> Any:
    plain: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(plain, type) and issubclass(plain, PreTrainedModel):
        return with_memory(plain)
    if isinstance(plain, type) and issubclass(plain, PreTrainedConfig):
        return _registered_config(plain)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _StandIn:
    """Stands for a configuration class in `AutoConfig` until one is asked for: to import all of them takes long."""

    plain_type: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real_class()(*args, **kwargs)

    @classmethod
    def real_class(cls) -> type[MemoryConfigMixin]:
        return _registered_config(CONFIG_MAPPING[cls.plain_type])

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real_class().from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real_class().from_pretrained(*args, **kwargs)


def register() -> None:
    """Makes every type of model with memories known to `AutoConfig`, and through it to the other Auto classes."""
    for plain_type in CONFIG_MAPPING:
        types = {"plain_type": plain_type, "model_type": f"memory_{plain_type}"}
        stand_in: Any = type(f"{PREFIX}_{plain_type}", (_StandIn,), types)
        AutoConfig.register(types["model_type"], stand_in)


def add_memories(
    model: nn.Module,
    placement: MemoryPlacement,
    paths: Sequence[str],
    memories: Sequence[MemoryLayer],
    base: BaseIdentity,
    *,
    name: str = DEFAULT_NAME,
    gates: Sequence[Tensor] = (),
    keep_original: bool = False,
) -> None:
    """Puts finished memories into a model, which was unwrapped, and makes it say that it has them.

    `base` is the identity of the model before. What fails, or is interrupted, leaves the model as it was.
    """
    with all_or_nothing(model):
        if isinstance(model, MemoryMixin):  # with memories of other names, which may get other paths
            model.undeclare_memories()
        wrappers = put_in(model, placement, paths, memories, name=name, keep_original=keep_original)
        mark_built(wrappers)
        for wrapper in wrappers:
            wrapper.base_identity, wrapper.placement = base, placement
        for wrapper, gate in zip(wrappers, gates, strict=False):
            assert isinstance(wrapper, ParallelMemory)
            wrapper.gate.data.copy_(gate)
        if isinstance(model, MemoryMixin):
            model.declare_memories()
        elif isinstance(model, PreTrainedModel):
            _change_class(model, placement)


def _change_class(model: PreTrainedModel, placement: MemoryPlacement) -> None:
    """Gives a model of `transformers` the class and the configuration that know of its memories."""
    plain: Any = type(model)
    memory_class = with_memory(plain)
    # All that it says, also what is in no file; configurations of parts stay those that the parts have.
    config: Any = copy.copy(model.config)
    config.__class__ = config_with_memory(config.__class__)
    config.set_placement(placement)
    config.set_model_class(memory_class.__name__, memory_class.auto_class_name)
    model.__class__ = memory_class
    _exchange_config(model, config)
    assert isinstance(model, MemoryMixin)
    model.declare_memories()


@contextmanager
def redeclared(model: MemoryMixin, **fields: Any) -> Iterator[None]:
    """In its block, the tables of a model are exchanged; its configuration then has these fields of its placement."""
    with all_or_nothing(model):
        model.undeclare_memories()
        config: Any = copy.copy(model.config)  # which others may have
        config.set_placement(dataclasses.replace(config.placement, **fields))
        yield
        _exchange_config(model, config)
        model.declare_memories()


def remove_memories(model: nn.Module, paths: Sequence[str], name_or_path: str) -> None:
    """Puts the modules of the base back, with the last memory also the class and the configuration of the model.

    `paths` are those of the memories' wrappers, `name_or_path` is where the base came from, if it is known. What is
    interrupted leaves the memories in the model.
    """
    with all_or_nothing(model):
        if isinstance(model, MemoryMixin):
            model.undeclare_memories()
        take_out(model, paths)
        if isinstance(model, MemoryMixin):
            if left := memory_names(model):
                config = copy.copy(model.config)
                config.set_placement(placed_memories(model, left[0]).placement)
                _exchange_config(model, config)
                model.declare_memories()
            else:
                _change_class_back(model, name_or_path)


def _change_class_back(model: MemoryMixin, name_or_path: str) -> None:
    plain: Any = model.config.without_memory()
    if plain.architectures == [type(model).__name__]:
        plain.architectures = [model.plain_class.__name__]
    # Not where base and memory came from, which is no base.
    model.name_or_path = plain._name_or_path = name_or_path
    _exchange_config(model, plain)
    model.__class__ = model.plain_class  # type: ignore[assignment]
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def load_memories(
    model: nn.Module, folder: Path, description: Description, *, name: str = DEFAULT_NAME, **how: Any
) -> None:
    """Adds the memories in `folder` to their base, which was unwrapped, and raises, as `load_memory` says."""
    stored = read_memory(model, folder, description, **how)
    add_memories(model, stored.placement, stored.names, stored.memories, stored.base, name=name, gates=stored.gates)


def _exchange_config(model: PreTrainedModel, config: Any) -> None:
    # One object is shared by the model and its parts. It is not changed: the caller may build other models from it.
    before = model.config
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = config
