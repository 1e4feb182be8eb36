"""The registered models: causal LMs some of whose blocks carry a memory in place of their feed-forward network.

A GPT-2 whose ``block.mlp`` was swapped is still saved as a GPT-2: `from_pretrained` then builds plain feed-forward
networks, finds no weights for them, and leaves them random with no more than a line in a log. Classes and a model type
of their own make the memory part of what is saved; a reader without memlayers fails on the unknown type instead.
"""

from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from memlayers.models.configs import MemoryGPT2Config, MemoryLlamaConfig
from memlayers.models.mixin import MemoryMixin


class MemoryGPT2LMHeadModel(MemoryMixin, GPT2LMHeadModel):
    """`transformers.GPT2LMHeadModel` with memories in the blocks that ``config.memory`` names."""

    config: MemoryGPT2Config
    blocks_name = "h"


class MemoryLlamaForCausalLM(MemoryMixin, LlamaForCausalLM):
    """`transformers.LlamaForCausalLM` with memories in the blocks that ``config.memory`` names."""

    config: MemoryLlamaConfig
    blocks_name = "layers"


# Plain class -> class with memories: what `add_memory` supports.
WITH_MEMORY: dict[type[PreTrainedModel], type[MemoryMixin]] = {
    GPT2LMHeadModel: MemoryGPT2LMHeadModel,
    LlamaForCausalLM: MemoryLlamaForCausalLM,
}


def register() -> None:
    """Makes the classes known to `transformers.AutoConfig` and `transformers.AutoModelForCausalLM`."""
    for model_class in WITH_MEMORY.values():
        config_class = model_class.config_class
        assert config_class is not None
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
