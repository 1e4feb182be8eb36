"""What `memlayers info` says of this machine: what is installed, what it runs on, and what runs each operation."""

from memlayers.hardware import hardware, versions
from memlayers.ops.registry import describe as operations
from memlayers.parameters import count_parameters

__all__ = ["count_parameters", "hardware", "operations", "versions"]
