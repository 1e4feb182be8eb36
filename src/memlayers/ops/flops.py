"""flops: what `torch.utils.flop_counter.FlopCounterMode` counts of our operations.

Importing PyTorch's counter takes 0.2 s, for it imports Triton. So whoever imports it first is waited for.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_waiting: dict[Any, Callable[..., int]] = {}


def count_flops(operation: Any, formula: Callable[..., int]) -> None:
    """Registers the formula of an operation, which is called with shapes in place of tensors."""
    counter = sys.modules.get(_COUNTER)
    if counter is None:
        _waiting[operation] = formula
    else:
        counter.register_flop_formula(operation)(formula)


class _WithFormulas(MetaPathFinder):
    """Registers what waits when the counter has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            for operation, formula in _waiting.items():
                module.register_flop_formula(operation)(formula)

        spec.loader.exec_module = execute_and_register
        return spec


sys.meta_path.insert(0, _WithFormulas())
