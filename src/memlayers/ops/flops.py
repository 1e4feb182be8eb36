"""flops: what `torch.utils.flop_counter.FlopCounterMode` counts of our operations.

Importing PyTorch's counter takes 0.2 s, for it imports Triton. So whoever imports it first is waited for.
"""

from collections.abc import Callable
from typing import Any

from memlayers.after_import import after_import


def count_flops(operation: Any, formula: Callable[..., int]) -> None:
    """Registers the formula of an operation, which is called with shapes in place of tensors."""
    after_import("torch.utils.flop_counter", lambda counter: counter.register_flop_formula(operation)(formula))
