"""after_import: what is done to a module of an optional or slow library as soon as somebody imports it."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action` with the module of this name: now if it has been imported, else as soon as it is."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
        return
    waiting = next((finder for finder in sys.meta_path if isinstance(finder, _Waiting)), None)
    if waiting is None:  # one for all: it is asked at every import
        waiting = _Waiting()
        sys.meta_path.insert(0, waiting)
    waiting.actions.setdefault(name, []).append(action)


class _Waiting(MetaPathFinder):
    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}  # by the module that they wait for

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        actions = self.actions.pop(name, None)
        spec: Any = importlib.util.find_spec(name) if actions else None
        if not actions or spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            for action in actions:
                action(module)

        spec.loader.exec_module = execute_and_act
        return spec
