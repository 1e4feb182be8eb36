"""MemoryMixin: what a Hugging Face model class needs for its memories to be built, initialised, saved and masked right.

Each method answers one thing that `transformers` does to a model whose feed-forward network was merely swapped:

- it is saved as the plain class and reloads as one, with random feed-forward networks (`post_init`, ``config.memory``);
- the block's own model redraws every linear layer it finds (`initialize_weights`);
- a table in two places cannot be saved (``_tied_weights_keys``), and with untied embeddings no tie is honoured at all
  (`get_expanded_tied_weights_keys`);
- gradient checkpointing runs a block again after the mask is gone (`_set_gradient_checkpointing`);
- a save that is cut off leaves a broken file in place of a good one (`save_pretrained`).
"""

import os
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from memlayers.layer import MemoryLayer
from memlayers.models.configs import MemoryConfigMixin
from memlayers.models.files import written_aside
from memlayers.models.masks import carry_mask_through_checkpoint, install_hooks
from memlayers.models.placement import MemoryPlacement
from memlayers.values import ValueTable


class MemoryMixin(PreTrainedModel):
    """Comes before a causal LM class among its bases; ``config.memory`` says which blocks carry a memory."""

    config: MemoryConfigMixin

    blocks_name: ClassVar[str]  # the base model's list of blocks

    def __init__(self, config: MemoryConfigMixin, *inputs: Any, **kwargs: Any):
        if not isinstance(config, MemoryConfigMixin):
            raise ValueError(f"config must be one with the section memory, got a {type(config).__name__}")
        config.set_placement(config.placement)  # checks it, before anything is built
        super().__init__(config, *inputs, **kwargs)

    def post_init(self) -> None:
        # The end of the plain class's constructor: blocks exist, the outer model is not initialised or tied yet.
        placement = self.config.placement
        self.install_memories(placement, build_memories(self.blocks, placement))
        super().post_init()

    @property
    def blocks(self) -> list[Any]:
        """All blocks of the model, in order; `mlp` of each is its feed-forward network or its memory."""
        return list(getattr(self.base_model, self.blocks_name))

    def install_memories(self, placement: MemoryPlacement, memories: list[MemoryLayer]) -> None:
        """Puts `memories` in the blocks of `placement`, ties shared tables, hands masks over. Raises nothing."""
        blocks = self.blocks
        for number, memory in zip(placement.layers, memories, strict=True):
            blocks[number - 1].mlp = memory.train(blocks[number - 1].training)
            carry_mask_through_checkpoint(blocks[number - 1])
        install_hooks(self.base_model, blocks=self.blocks_name)
        self._tied_weights_keys = {**(type(self)._tied_weights_keys or {}), **self._tied_tables()}
        # Chosen by the class's name, which GPT-2's does not settle; without it every first loss logs a warning.
        self.loss_type = "ForCausalLM"

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
        for memory in self.modules():
            if isinstance(memory, MemoryLayer) and not getattr(memory, "_is_hf_initialized", False):
                _reset_what_was_not_loaded(memory)
                _mark_initialised(memory)
        super().initialize_weights()

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for block in self.blocks:
            if isinstance(block.mlp, MemoryLayer):
                carry_mask_through_checkpoint(block)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `transformers.PreTrainedModel.save_pretrained`, except that a save that fails leaves the folder as it was.

        Files are written aside, flushed and moved into place; for this the folder's file system needs room for a second
        copy. A distributed checkpoint, to which several processes write, goes straight to the folder.
        """
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        # Weights of an earlier save under other names (one file, or shards) would be found first on loading.
        variant = re.escape(f".{kwargs['variant']}") if kwargs.get("variant") else ""
        weights = rf"model{variant}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{variant}\.json"
        with written_aside(save_directory, replaces=weights) as aside:
            super().save_pretrained(aside, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Does nothing, as in `MemoryConfigMixin.register_for_auto_class`."""


def build_memories(blocks: Sequence[Any], placement: MemoryPlacement) -> list[MemoryLayer]:
    """The memories of `placement`, each on the device and in the dtype of its block; `blocks` stay as they are."""
    memories: list[MemoryLayer] = []
    for number in placement.layers:
        like = next(blocks[number - 1].mlp.parameters())
        table = memories[0].values if placement.share_values and memories else None
        memory = MemoryLayer(placement.config, values=table, device=like.device, dtype=like.dtype)
        if not like.is_meta:
            _mark_initialised(memory)  # by its constructor; on the meta device weights are yet to be loaded or drawn
        memories.append(memory)
    return memories


def _mark_initialised(memory: MemoryLayer) -> None:
    for module in memory.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def _reset_what_was_not_loaded(memory: MemoryLayer) -> None:
    """Initialises `memory` as its `reset_parameters` does, without touching what came from a checkpoint."""
    tensors = {**dict(memory.named_parameters()), **dict(memory.named_buffers())}
    loaded = {name: tensor for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    if len(loaded) == len(tensors):
        return
    kept = {name: tensor.clone() for name, tensor in loaded.items()}
    memory.reset_parameters()
    for name, tensor in kept.items():
        loaded[name].copy_(tensor)
