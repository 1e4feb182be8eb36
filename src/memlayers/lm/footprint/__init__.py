"""How much memory a training step needs, before it takes any."""

from memlayers.available import available_memory
from memlayers.lm.footprint.estimate import Footprint, explain_out_of_memory, footprint, require_memory
from memlayers.sizes import size_text

__all__ = ["Footprint", "available_memory", "explain_out_of_memory", "footprint", "require_memory", "size_text"]
