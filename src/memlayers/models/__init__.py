"""Memories in Hugging Face causal LMs. Importing this registers the classes with the Auto classes of `transformers`."""

from memlayers.models.add import add_memory, default_layer, memory_layers
from memlayers.models.carriers import causal_lm
from memlayers.models.classes import MemoryGPT2LMHeadModel, MemoryLlamaForCausalLM, register
from memlayers.models.configs import MemoryGPT2Config, MemoryLlamaConfig
from memlayers.models.placement import MemoryPlacement

register()

__all__ = [
    "MemoryGPT2Config",
    "MemoryGPT2LMHeadModel",
    "MemoryLlamaConfig",
    "MemoryLlamaForCausalLM",
    "MemoryPlacement",
    "add_memory",
    "causal_lm",
    "default_layer",
    "memory_layers",
]
