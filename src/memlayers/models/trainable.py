"""freeze_base: a model of which the memories are trained, and adapters if there are any."""

from operator import attrgetter
from typing import TypeVar

from torch import nn

from memlayers.layer import memory_layers
from memlayers.models.unwrapping import unwrap
from memlayers.models.wrappers import ParallelMemory
from memlayers.values import modules_of

Model = TypeVar("Model", bound=nn.Module)


def freeze_base(model: Model) -> Model:
    """Freezes, in place, every parameter that is neither of a memory (its gate included) nor of an adapter of PEFT.

    Those of memories require gradients afterwards, whatever froze them: `peft.get_peft_model` freezes all that is not
    its own. Adapters stay as they are. So both orders work: `add_memory` on a PEFT model, or `get_peft_model` on a
    model with memories, and then `freeze_base`. PEFT's ``modules_to_save`` is not needed; it would keep a second copy
    of the table. Build the optimizer afterwards. Biases that PEFT trains outside of its adapters (``bias="all"``) are
    frozen, too: they are the base's. Modes stay: in ``model.train()`` the base's dropout is on, and running statistics
    of its BatchNorms move.

    Raises:
        ValueError: a model without memories, or with a memory that ``modules_to_save`` has copied. The model is then as
            it was.
    """
    inner = unwrap(model)
    memories = memory_parameters(inner)
    if not memories:
        raise ValueError(f"model must have memories (add_memory), got a {type(inner).__name__} without")
    adapters = adapter_parameters(inner)
    if copied := [name for name, parameter in inner.named_parameters() if parameter in memories & adapters]:
        raise ValueError(
            f"model must have no memory that PEFT has copied, got {copied[0]}: leave memories out of modules_to_save"
        )
    for parameter in inner.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(parameter in memories)
    return model


def trainable_base(model: nn.Module) -> list[str]:
    """The parameters that `freeze_base` would freeze and that are not, by name."""
    inner = unwrap(model)
    spared = memory_parameters(inner) | adapter_parameters(inner)
    return [name for name, parameter in inner.named_parameters() if parameter.requires_grad and parameter not in spared]


def memory_parameters(model: nn.Module) -> set[nn.Parameter]:
    """All parameters of memories, and their gates; without those of adapters inside of them."""
    found: set[nn.Parameter] = set()
    for memory in memory_layers(model).values():
        found |= set(memory.parameters()) - adapter_parameters(memory)
    for wrapper in modules_of(model, ParallelMemory).values():
        found.add(wrapper.gate)
    return found


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """All parameters that PEFT has put into modules of `model`."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        # Each of its layers says under which names it keeps what it adds; a dotted one is inside of a part.
        for name in getattr(module, "adapter_layer_names", ()):
            added = attrgetter(name)(module)
            if isinstance(added, nn.Parameter):
                found.add(added)
            elif isinstance(added, nn.Module):
                found.update(added.parameters())
    return found
